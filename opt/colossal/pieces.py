"""Model and optimizer state, whole and by parameter name, out of any plugin's pieces and back into
them.

ZeRO keeps a flat slice of each tensor on each data-parallel rank, Gemini what falls into its slice
of a chunk, tensor parallelism rows or columns. Joined to whole tensors with names, in fp32 or as
--optim keeps them, the state depends neither on the plugin nor on parallel sizes: others can take
it up.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator
from colossalai.checkpoint_io.utils import gather_distributed_param
from colossalai.tensor.padded_tensor import is_padded_tensor, to_unpadded_tensor

from opt.colossal.adam import adam_state, innermost
from opt.colossal.processes import Spread
from opt.model.four_bits import FourBits
from opt.model.linear import Linear
from opt.model.weights import HEAD, Weights

# What Adam updates: fp32 weights, or an fp32 copy of 16-bit ones, which are that copy rounded; with
# low_memory.LowMemoryAdam 16-bit weights that have no copy.
WEIGHTS = "weights"


@dataclass
class Piece:
    """What this process holds of one parameter."""

    name: str
    shape: torch.Size  # of the parameter on this tensor-parallel rank
    start: int  # of the piece in that parameter, flattened
    size: int  # elements of the piece; 0 where this process holds none
    key: torch.Tensor | None  # what Adam's state is found by
    weights: torch.Tensor | None  # what Adam updates, flat, `size` elements, a view
    # The processes whose pieces make up the parameter; None: this one holds it all
    group: dist.ProcessGroup | None


class Form:
    """The form in which a boosted model's optimizer keeps its state. A subclass says where the
    pieces are, and how they are updated."""

    replay = None  # replays run(), with --cuda_graph: a graphs.GraphedUpdate

    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer

    @property
    def is_tied(self) -> bool:
        """Whether the output projection is the embedding."""
        return self.model.unwrap().config.tie_word_embeddings

    def finish(self) -> None:
        """End what is under way of the last update, before weights or state are read or written."""

    def pieces(self) -> Iterator[Piece]:
        """All parameters of this pipeline stage that are trained, in the same order on all its
        processes."""
        raise NotImplementedError

    def trained(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and parameters of this pipeline stage, without frozen ones."""
        for name, parameter in self.model.unwrap().named_parameters():
            if parameter.requires_grad:
                yield name, parameter

    def place(self, weights: Weights, spread: Spread) -> None:
        """[F10] Fill the model, and [F11] the fp32 copies of 16-bit weights in the precision that
        `weights` have."""
        pieces = {piece.name: piece for piece in self.pieces()}
        packed = self._packed()
        for name, working in self.model.unwrap().named_parameters():
            if working in packed:
                packed[working].fill(working, weights[name])
                continue
            part = _part(weights[name], working.shape, spread.tp_rank)
            working.data.copy_(part)
            piece = pieces.get(name)
            if piece and piece.size and piece.weights.data_ptr() != working.data_ptr():
                own = part.flatten()[piece.start : piece.start + piece.size]
                piece.weights[: own.numel()].copy_(own)

    def _packed(self) -> dict[torch.Tensor, FourBits]:
        """Frozen weights in 4 bits, and what packs them."""
        return {
            module.weight: module.product
            for module in self.model.unwrap().modules()
            if isinstance(module, Linear) and isinstance(module.product, FourBits)
        }

    def held(self) -> Iterator[tuple[str, torch.Size, int, torch.Tensor]]:
        """What this process holds of each parameter: its name, its shape on this tensor-parallel
        rank, and elements of that, flat, from a position on. As they compute and, where Adam
        updates others, as these."""
        pieces = {piece.name: piece for piece in self.pieces()}
        packed = self._packed()
        for name, working in self.model.unwrap().named_parameters():
            if working in packed:  # no longer what was read
                continue
            yield name, working.shape, 0, working.data.flatten()
            piece = pieces.get(name)
            if piece and piece.size:
                yield name, working.shape, piece.start, piece.weights

    def check(self, weights: Weights, spread: Spread) -> None:
        """Raise RuntimeError unless the model holds what `weights` has, by a sample of each
        tensor."""
        names, wanted, found = [], [], []
        for name, shape, start, held in self.held():
            positions, values = weights.sample(name)
            own = _own_positions(positions, weights.shape(name), shape, spread.tp_rank)
            here = (own >= start) & (own < start + len(held))
            here &= own >= 0
            if here.any():
                # In the precision that they are held in
                wanted.append(values[here.to(values.device)].to(held.device, held.dtype).float())
                found.append(held[(own[here] - start).to(held.device)].float())
                names += [name] * len(found[-1])
        if not names:
            return
        by_device = {tensor.device for tensor in found}
        device = next(iter(by_device)) if len(by_device) == 1 else torch.device("cpu")
        wanted, found = (torch.cat([t.to(device) for t in parts]) for parts in (wanted, found))
        wrong = (~torch.isclose(found, wanted, rtol=0.01, atol=1e-6)).nonzero().flatten().tolist()
        if wrong:
            first = wrong[0]
            raise RuntimeError(
                f"weights did not arrive: of {names[first]} this process holds "
                f"{found[first].item():g} where {wanted[first].item():g} was read, and "
                f"{len({names[i] for i in wrong})} tensors differ"
            )

    def whole_weights(self, only_trained=False) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and whole, unpadded tensors of this pipeline stage as they compute; a head that
        is tied to the embedding is left out. A collective. With `only_trained` no frozen ones."""
        # Weights may still be on their way from other processes, see reduction.LayerwiseZero
        get_accelerator().synchronize()
        for name, parameter in self.model.unwrap().named_parameters():
            if name == HEAD and self.is_tied:
                continue
            if parameter.requires_grad or not only_trained:
                whole = gather_distributed_param(parameter, keep_vars=False)
                yield name, to_unpadded_tensor(whole) if is_padded_tensor(whole) else whole.data


class TrainingState:
    """Reads and writes the weights that Adam updates and its state, of a boosted model."""

    def __init__(self, form: Form, spread: Spread, shapes: dict[str, torch.Size]):
        """`shapes`: of the named parameters in the whole model, unsplit and unpadded."""
        self._spread, self._shapes, self._form = spread, shapes, form
        self._adam = innermost(form.optimizer)
        self._pieces = list(form.pieces())

    @property
    def kinds(self) -> tuple[str, ...]:
        """What there is to read and write, the weights first."""
        return (WEIGHTS, *self._adam.moments)

    def own_entries(self, kind: str) -> Iterator[tuple[str, tuple[torch.dtype, torch.Size]]]:
        """What own_share gives this process, in its order: names, dtypes and shapes."""
        for piece, is_owner in self._dealt():
            own = self._own(piece, kind) if piece.size else None
            if not is_owner or (piece.size and own is None):
                continue
            span, shape = self._span(kind), self._shapes[piece.name]
            if span > 1:
                shape = torch.Size([shape.numel() // span])
            yield piece.name, (self._adam.dtype if own is None else own.dtype, shape)

    def own_share(self, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and whole tensors (host memory, copies) of one of `kinds`. A collective.

        Each tensor of the model comes out on one process alone, which is to write it; they are
        dealt out by size.
        """
        self._form.finish()
        spread = self._spread
        for piece, is_owner in self._dealt():
            whole = self._shapes[piece.name]
            split = _split_dim(piece.shape, whole)
            if piece.group is None and split is None and not is_owner:
                continue
            tensor = self._flat(piece, kind, is_joined=split is not None)
            if tensor is None:
                continue
            tensor = tensor.view(piece.shape if self._span(kind) == 1 else -1)
            if split is not None:
                parts = [torch.empty_like(tensor) for _ in range(spread.tp_size)]
                dist.all_gather(parts, tensor, group=spread.tp_group)
                # The vocabulary is padded to a multiple of the ranks.
                tensor = torch.cat(parts, split).narrow(split, 0, whole[split]).contiguous()
            if is_owner:
                yield piece.name, tensor.cpu()

    def _dealt(self) -> Iterator[tuple[Piece, bool]]:
        """All pieces, and whether this process is to write their tensor."""
        spread = self._spread
        # Elements so far, by process of this pipeline stage
        dealt = [0] * (spread.dp_size * spread.tp_size)
        for piece in self._pieces:
            if piece.name not in self._shapes:  # a tied head: on a last stage the embedding's twin
                continue
            owner = dealt.index(min(dealt))
            dealt[owner] += self._shapes[piece.name].numel()
            yield piece, owner == spread.dp_rank * spread.tp_size + spread.tp_rank

    def load(self, kind: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take this process's pieces of whole tensors."""
        self._form.finish()
        span = self._span(kind)
        for piece in self._pieces:
            own = self._own(piece, kind) if piece.size else None
            if own is not None:
                part = tensors[piece.name]
                if span == 1:
                    part = _part(part, piece.shape, self._spread.tp_rank)
                start = piece.start // span
                flat = part.flatten()[start : start + own.numel()]
                own[: flat.numel()].copy_(flat)

    @property
    def updates(self) -> int:
        """How many updates Adam has made: its bias correction depends on it. Skipped steps make it
        fewer than the steps."""
        self._adam.settle()
        return max((int(state["step"]) for state in self._adam.state.values()), default=0)

    @updates.setter
    def updates(self, number: int) -> None:
        for state in self._adam.state.values():
            state["step"] = number

    def _span(self, kind: str) -> int:
        """Of how many elements of a parameter a number of `kind` is."""
        return self._adam.moments.get(kind, 1)

    def _own(self, piece: Piece, kind: str) -> torch.Tensor | None:
        """This process's piece, flat; a view, to be written through. None if the parameter has
        nothing of this kind."""
        if kind == WEIGHTS:
            return piece.weights
        # Adam makes its state at the first update; what is saved or loaded before that has to be
        # there. Gemini's keys are empty between updates.
        own = adam_state(
            self._adam, piece.key, piece.key.shape if piece.key.numel() else (piece.size,)
        ).get(kind)
        return None if own is None else own.view(-1)

    def _flat(self, piece: Piece, kind: str, is_joined: bool) -> torch.Tensor | None:
        """The parameter on this tensor-parallel rank, flat, put together from all pieces; a copy.
        On the device if processes do so, or if it `is_joined` to others."""
        span, own = self._span(kind), self._own(piece, kind) if piece.size else None
        if piece.size and own is None:
            return None
        stays = own is not None and not is_joined
        stays &= piece.group is None or dist.get_world_size(piece.group) == 1
        start, numel = piece.start // span, piece.shape.numel() // span
        # A slice of ZeRO's may reach past the parameter's end, into padding.
        flat = torch.zeros(
            max((piece.start + piece.size) // span, numel),
            dtype=self._adam.dtype if own is None else own.dtype,
            device=own.device if stays else get_accelerator().get_current_device(),
        )
        if own is not None:
            flat[start : start + own.numel()] = own
        flat = flat[:numel]
        if piece.group is not None and not stays:
            flat = flat.contiguous()
            dist.all_reduce(flat, group=piece.group)
        return flat


def _part(whole: torch.Tensor, shape: torch.Size, tp_rank: int) -> torch.Tensor:
    """A tensor-parallel rank's part, of `shape`, of a whole tensor, filled up with zeros."""
    split = _split_dim(shape, whole.shape)
    if split is None:
        return whole
    first = min(tp_rank * shape[split], whole.shape[split])
    there = min(shape[split], whole.shape[split] - first)
    part = whole.new_zeros(shape)
    part.narrow(split, 0, there).copy_(whole.narrow(split, first, there))
    return part


def _own_positions(
    positions: torch.Tensor, whole: tuple[int, ...], shape: torch.Size, tp_rank: int
) -> torch.Tensor:
    """Where elements of a whole tensor, flattened, are in a tensor-parallel rank's part of it; -1:
    not there."""
    split = _split_dim(shape, whole)
    if split is None:
        return positions
    at = list(torch.unravel_index(positions, whole))
    at[split] = at[split] - tp_rank * shape[split]
    is_here = (at[split] >= 0) & (at[split] < shape[split])
    own = torch.zeros_like(positions)
    for index, size in zip(at, shape, strict=True):
        own = own * size + index
    return torch.where(is_here, own, -1)


def _split_dim(part, whole) -> int | None:
    return next((d for d, (p, w) in enumerate(zip(part, whole, strict=True)) if p != w), None)


def scaler_state(optimizer) -> dict[str, float] | None:
    """Loss scale and counters of a boosted optimizer in fp16, else None."""
    scaler, fields = _scaler(optimizer)
    return (
        {field: float(getattr(scaler, attribute)) for field, attribute in fields.items()}
        if scaler
        else None
    )


def load_scaler_state(optimizer, state: dict[str, float]) -> None:
    """Take up what scaler_state gave; of another plugin's, the loss scale alone."""
    scaler, fields = _scaler(optimizer)
    for field, attribute in fields.items():
        if field in state:
            old = getattr(scaler, attribute)
            setattr(
                scaler,
                attribute,
                torch.full_like(old, state[field])
                if isinstance(old, torch.Tensor)
                else type(old)(state[field]),
            )


def _scaler(optimizer):
    """The loss scaler and where it keeps what changes. [F13] ColossalAI 0.5.0's own state_dict
    leaves its counters out."""
    if hasattr(optimizer, "scaler"):
        scaler = optimizer.scaler
        if not scaler.is_enabled():
            return None, {}
        if scaler._scale is None:
            scaler._lazy_init_scale_growth_tracker(get_accelerator().get_current_device())
        return scaler, {"scale": "_scale", "torch_growth_tracker": "_growth_tracker"}
    for attribute in ("mixed_precision_mixin", "mix_precision_mixin", "mixed_precision"):
        mixin = getattr(optimizer, attribute, None)
        if hasattr(mixin, "grad_scaler"):
            return mixin.grad_scaler, {
                "scale": "_scale",
                "growth_step": "_growth_step",
                "hysteresis_step": "_hysteresis_step",
            }
    return None, {}
