"""Model and optimizer state, whole and by parameter name, out of any plugin's pieces and back into them.

ZeRO keeps a flat slice of each tensor on each data-parallel rank, Gemini what falls into its slice of a chunk, tensor
parallelism rows or columns. Joined to whole fp32 tensors with names, the state depends neither on the plugin nor on parallel
sizes: others can take it up.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator
from colossalai.amp.naive_amp.mixed_precision_optimizer import MixedPrecisionOptimizer
from colossalai.interface import OptimizerWrapper
from colossalai.zero import GeminiDDP
from colossalai.zero.low_level import LowLevelZeroOptimizer

from opt.colossal.adam import MOMENTS, adam_state
from opt.model.weights import TIED_HEAD

if TYPE_CHECKING:
    from opt.colossal.build import Built

# Adam's update is made in fp32: on the fp32 weights, or on an fp32 copy of 16-bit ones, which are that copy rounded.
WEIGHTS = "weights"
KINDS = (WEIGHTS, *MOMENTS)


@dataclass
class _Piece:
    """What this process holds of one parameter."""

    name: str
    shape: torch.Size  # of the parameter on this tensor-parallel rank
    start: int  # of the piece in that parameter, flattened
    size: int  # elements of the piece; 0 where this process holds none
    key: torch.Tensor | None  # what Adam's state is found by
    weights: torch.Tensor | None  # the flat fp32 weights, `size` elements, a view
    group: dist.ProcessGroup | None  # the processes whose pieces make up the parameter; None: this one holds it all


class TrainingState:
    """Reads and writes the fp32 weights and Adam's state of a boosted model."""

    def __init__(self, built: "Built"):
        self._parallel, self._shapes, self._adam = built.parallel, built.shapes, built.optimizer
        while isinstance(self._adam, OptimizerWrapper):
            self._adam = self._adam.optim
        find = _gemini_pieces if isinstance(built.model, GeminiDDP) else _pieces
        self._pieces = list(find(built.model, built.optimizer))

    def own_share(self, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and whole fp32 tensors (host memory, copies) of one of KINDS. A collective.

        Each tensor of the model comes out on one process alone, which is to write it; they are dealt out by size.
        """
        parallel = self._parallel
        dealt = [0] * (parallel.dp_size * parallel.tp_size)  # elements so far, by process of this pipeline stage
        for piece in self._pieces:
            if piece.name == TIED_HEAD:  # the embedding itself, on a last stage its twin
                continue
            owner = dealt.index(min(dealt))
            whole = self._shapes[piece.name]
            dealt[owner] += whole.numel()
            is_owner = owner == parallel.dp_rank * parallel.tp_size + parallel.tp_rank
            split = _split_dim(piece.shape, whole)
            if piece.group is None and split is None and not is_owner:
                continue
            tensor = self._flat(piece, kind).view(piece.shape)
            if split is not None:
                parts = [torch.empty_like(tensor) for _ in range(parallel.tp_size)]
                dist.all_gather(parts, tensor, group=parallel.tp_group)
                # The vocabulary is padded to a multiple of the ranks.
                tensor = torch.cat(parts, split).narrow(split, 0, whole[split]).contiguous()
            if is_owner:
                yield piece.name, tensor.cpu()

    def load(self, kind: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take this process's pieces of whole tensors."""
        for piece in self._pieces:
            if piece.size:
                flat = self._part(tensors[piece.name], piece.shape).flatten()[piece.start : piece.start + piece.size]
                self._own(piece, kind)[: flat.numel()].copy_(flat)

    @property
    def updates(self) -> int:
        """How many updates Adam has made: its bias correction depends on it. Skipped steps make it fewer than the steps."""
        return max((int(state["step"]) for state in self._adam.state.values()), default=0)

    @updates.setter
    def updates(self, number: int) -> None:
        for state in self._adam.state.values():
            state["step"] = number

    def _own(self, piece: _Piece, kind: str) -> torch.Tensor:
        """This process's piece, flat; a view, to be written through."""
        if kind == WEIGHTS:
            return piece.weights
        # Adam makes its state at the first update; what is saved or loaded before that has to be there. Gemini's keys are empty
        # between updates.
        return adam_state(self._adam, piece.key, piece.key.shape if piece.key.numel() else (piece.size,))[kind].view(-1)

    def _flat(self, piece: _Piece, kind: str) -> torch.Tensor:
        """The parameter on this tensor-parallel rank, flat, put together from all pieces; a copy."""
        numel = piece.shape.numel()
        # A slice of ZeRO's may reach past the parameter's end, into padding.
        flat = torch.zeros(max(piece.start + piece.size, numel), device=get_accelerator().get_current_device())
        if piece.size:
            flat[piece.start : piece.start + piece.size] = self._own(piece, kind)
        flat = flat[:numel]
        if piece.group is not None:
            flat = flat.contiguous()
            dist.all_reduce(flat, group=piece.group)
        return flat

    def _part(self, whole: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """This tensor-parallel rank's part of a whole tensor, filled up with zeros."""
        split = _split_dim(shape, whole.shape)
        if split is None:
            return whole
        first = min(self._parallel.tp_rank * shape[split], whole.shape[split])
        there = min(shape[split], whole.shape[split] - first)
        part = whole.new_zeros(shape)
        part.narrow(split, 0, there).copy_(whole.narrow(split, first, there))
        return part


def fill_copies(built: "Built", weights: Mapping[str, torch.Tensor]) -> None:
    """Where there are fp32 copies of 16-bit weights, fill them from the whole `weights`, in the precision that these have.

    ColossalAI 0.5.0 makes them of the 16-bit weights (update_master_params, and Gemini's shards). Updates too small to show in
    those then wait for one another: after one step at a learning rate of 5e-6 the loss of OPT-350m, from scratch, was 10.82
    instead of 10.74.
    """
    if isinstance(built.optimizer, (LowLevelZeroOptimizer, MixedPrecisionOptimizer)) or isinstance(built.model, GeminiDDP):
        TrainingState(built).load(WEIGHTS, weights)


def _split_dim(part, whole) -> int | None:
    return next((d for d, (p, w) in enumerate(zip(part, whole, strict=True)) if p != w), None)


def _pieces(model, optimizer) -> Iterator[_Piece]:
    """torch_ddp, low_level_zero and hybrid_parallel: a tensor a parameter, or a slice of it."""
    for name, working in model.unwrap().named_parameters():
        key, start, group = working, 0, None
        if isinstance(optimizer, LowLevelZeroOptimizer):
            key, group = optimizer.working_to_master_param[id(working)], optimizer.param_to_pg[working]
            start = dist.get_rank(group) * key.numel()
        elif isinstance(optimizer, MixedPrecisionOptimizer):
            key = optimizer.working_to_master_map[working]
        yield _Piece(name, working.shape, start, key.numel(), key, key.data.view(-1), group)


def _gemini_pieces(model: GeminiDDP, optimizer) -> Iterator[_Piece]:
    """Gemini: what lies in this process's slice of each parameter's chunk."""
    for number, working in optimizer.id_to_real_params.items():
        chunk = model.chunk_manager.get_chunk(working)
        offset, start, size = optimizer.get_offsets(number)  # -1 each where nothing of it is here
        key = optimizer.id_to_fake_params.get(number)
        weights = chunk.paired_chunk.payload[offset : offset + size] if key is not None else None
        group = None if chunk.keep_gathered else chunk.torch_pg
        yield _Piece(model.param2name[working], working.shape, max(0, start), max(0, size), key, weights, group)


def scaler_state(optimizer) -> dict[str, float] | None:
    """Loss scale and counters of a boosted optimizer in fp16, else None."""
    scaler, fields = _scaler(optimizer)
    return {field: float(getattr(scaler, attribute)) for field, attribute in fields.items()} if scaler else None


def load_scaler_state(optimizer, state: dict[str, float]) -> None:
    """Take up what scaler_state gave; of another plugin's, the loss scale alone."""
    scaler, fields = _scaler(optimizer)
    for field, attribute in fields.items():
        if field in state:
            old = getattr(scaler, attribute)
            setattr(scaler, attribute, torch.full_like(old, state[field]) if isinstance(old, torch.Tensor) else type(old)(state[field]))


def _scaler(optimizer):
    """The loss scaler and where it keeps what changes. ColossalAI 0.5.0's own state_dict leaves its counters out."""
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
            return mixin.grad_scaler, {"scale": "_scale", "growth_step": "_growth_step", "hysteresis_step": "_hysteresis_step"}
    return None, {}
