"""The optimizer's state, whole and by parameter name, out of any plugin's pieces and back into them.

ZeRO keeps a flat slice of each tensor on each data-parallel rank, Gemini what falls into its slice of a chunk, tensor
parallelism rows or columns. Joined to whole tensors with names, the state does not depend on plugin or parallel sizes: it can
be read back by another number of ranks, from safetensors, without unpickling anything.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from . import light_imports  # noqa: F401  before colossalai
from colossalai.amp.naive_amp.mixed_precision_optimizer import MixedPrecisionOptimizer
from colossalai.zero import GeminiDDP
from colossalai.zero.low_level import LowLevelZeroOptimizer

from .plugins import Parallel

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "master"  # the fp32 copy of 16-bit weights, where there is one


@dataclass
class _Piece:
    """What this process holds of one parameter's state."""

    name: str
    shape: torch.Size  # of the parameter on this tensor-parallel rank
    start: int  # of the piece in that parameter, flattened
    size: int  # elements of the piece; 0 where this process holds none
    key: torch.Tensor | None  # what the torch optimizer's state is found by
    master: torch.Tensor | None  # flat fp32 weights, `size` elements
    group: dist.ProcessGroup | None  # the processes whose pieces make up the parameter; None: this one holds it all
    device: torch.device


class OptimizerState:
    """Reads and writes the state of a boosted HybridAdam."""

    def __init__(self, model: nn.Module, optimizer, parallel: Parallel, whole_shapes: Mapping[str, tuple]):
        """`whole_shapes`: the shape of each named parameter in the unsplit, unpadded model."""
        self._parallel, self._shapes = parallel, whole_shapes
        self._torch_optimizer = optimizer.optim
        self._pieces = list(_gemini_pieces(model, optimizer) if isinstance(model, GeminiDDP) else _pieces(model, optimizer))
        self.keys = MOMENTS if all(p.master is None for p in self._pieces) else (*MOMENTS, MASTER)

    def whole(self, key: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and whole fp32 tensor of each parameter of this pipeline stage. A collective."""
        for piece in self._pieces:
            # A slice of ZeRO's may reach past the parameter's end, into padding.
            flat = torch.zeros(max(piece.start + piece.size, piece.shape.numel()), device=piece.device)
            own = self._own(piece, key)
            if own is not None:
                flat[piece.start : piece.start + piece.size] = own
            if piece.group is not None:
                flat = flat[: piece.shape.numel()].contiguous()
                dist.all_reduce(flat, group=piece.group)
            yield piece.name, self._join(flat.view(piece.shape), self._shapes[piece.name])

    def load(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take this process's pieces of whole tensors."""
        for piece in self._pieces:
            own = self._own(piece, key)
            if own is None:
                continue
            flat = self._part(tensors[piece.name], piece.shape).flatten()[piece.start : piece.start + piece.size]
            own[: flat.numel()].copy_(flat)

    def set_steps(self, step: int) -> None:
        """Tell Adam how many updates there have been: its bias correction depends on it."""
        for piece in self._pieces:
            if piece.key is not None:
                self._torch_optimizer.state[piece.key]["step"] = step

    def _own(self, piece: _Piece, key: str) -> torch.Tensor | None:
        """The flat tensor of this process, made if the optimizer has not yet; a view, to be written through."""
        if piece.size == 0:
            return None
        if key == MASTER:
            return piece.master
        state = self._torch_optimizer.state[piece.key]
        if not state:
            shape = piece.key.shape if piece.key.numel() else (piece.size,)
            state |= {"step": 0, **{m: torch.zeros(shape, device=piece.key.device) for m in MOMENTS}}
        return state[key].view(-1)

    def _join(self, part: torch.Tensor, whole: tuple) -> torch.Tensor:
        """The whole of a tensor that is split over the tensor-parallel ranks, padding cut off."""
        dim = _split_dim(part.shape, whole)
        if dim is None:
            return part
        parts = [torch.empty_like(part) for _ in range(self._parallel.tp_size)]
        dist.all_gather(parts, part.contiguous(), group=self._parallel.tp_group)
        return torch.cat(parts, dim).narrow(dim, 0, whole[dim])

    def _part(self, whole: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        dim = _split_dim(shape, whole.shape)
        if dim is None:
            return whole
        first = self._parallel.tp_rank * shape[dim]
        there = max(0, min(shape[dim], whole.shape[dim] - first))
        part = whole.new_zeros(shape)
        part.narrow(dim, 0, there).copy_(whole.narrow(dim, min(first, whole.shape[dim]), there))
        return part


def _split_dim(part, whole) -> int | None:
    return next((d for d, (p, w) in enumerate(zip(part, whole, strict=True)) if p != w), None)


def _pieces(model: nn.Module, optimizer) -> Iterator[_Piece]:
    """torch_ddp, low_level_zero and hybrid_parallel: a tensor a parameter, or a slice of it."""
    for name, working in model.unwrap().named_parameters():
        master, start, group = None, 0, None
        key = working
        if isinstance(optimizer, LowLevelZeroOptimizer):
            key = optimizer.working_to_master_param[id(working)]
            master, group = key.data.view(-1), optimizer.param_to_pg[working]
            start = dist.get_rank(group) * key.numel()
        elif isinstance(optimizer, MixedPrecisionOptimizer):
            key = optimizer.working_to_master_map[working]
            master = key.data.view(-1) if key is not working else None
        yield _Piece(name, working.shape, start, key.numel(), key, master, group, working.device)


def _gemini_pieces(model: GeminiDDP, optimizer) -> Iterator[_Piece]:
    """Gemini: what lies in this process's slice of each parameter's chunk."""
    for number, working in optimizer.id_to_real_params.items():
        chunk = model.chunk_manager.get_chunk(working)
        offset, start, size = optimizer.get_offsets(number)
        key = optimizer.id_to_fake_params.get(number)
        master = chunk.paired_chunk.payload[offset : offset + size] if key is not None else None
        group = None if chunk.keep_gathered else chunk.torch_pg
        yield _Piece(model.param2name[working], working.shape, max(0, start), max(0, size), key, master, group, model_device())


def model_device() -> torch.device:
    """The device that ColossalAI computes on."""
    from colossalai.accelerator import get_accelerator

    return get_accelerator().get_current_device()


def grad_scaler(optimizer):
    """The loss scaler of a boosted optimizer in fp16, else None. Every plugin has it in another place."""
    if hasattr(optimizer, "scaler"):
        return optimizer.scaler
    for attribute in ("mixed_precision_mixin", "mix_precision_mixin", "mixed_precision"):
        mixin = getattr(optimizer, attribute, None)
        if hasattr(mixin, "grad_scaler"):
            return mixin.grad_scaler
    return None
