"""Gemini without what it does for each gradient and each chunk in vain (ColossalAI 0.5.0).

A gradient's memory is let go of by a deprecated way of PyTorch that takes a quarter of the time of its bookkeeping (profile of 24
layers on a CPU); each chunk's norm is taken of an fp32 copy of the chunk, and waited for in the middle of backward; and bf16
gradients are searched for overflows, which only fp16's loss scale asks about.
"""

import torch

from . import light_imports  # noqa: F401  before colossalai
from colossalai.zero.gemini import gemini_ddp
from colossalai.zero.gemini.chunk import Chunk

_finds_overflow = Chunk.has_inf_or_nan.fget


def speed_up() -> None:
    """Apply to all models that Gemini will wrap. What it computes stays the same."""
    gemini_ddp.free_storage = _free_storage
    Chunk.set_l2_norm = _set_l2_norm
    Chunk.has_inf_or_nan = property(_has_inf_or_nan)


def _free_storage(tensor: torch.Tensor) -> None:
    tensor.untyped_storage().resize_(0)


def _set_l2_norm(self) -> None:
    """Record the square of this chunk's L2 norm, on the device: GeminiOptimizer reads it when all are there."""
    values = self.cuda_global_chunk[: self.utilized_size] if self.is_gathered else self.cuda_shard[: self.valid_end]
    self.l2_norm = torch.linalg.vector_norm(values, dtype=torch.float32).square()


def _has_inf_or_nan(self):
    return _finds_overflow(self) if self.dtype == torch.float16 else False
