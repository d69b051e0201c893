"""Gemini without what it does for each gradient and each chunk in vain (ColossalAI 0.5.0).

Its backward takes gradients one by one, each in a Python hook of its own: 388 hooks a step for OPT-350m, which keep the host busy
for longer than the GPU computes. Here a decoder layer, which is one operation (see modeling.run_layer), hands over all its gradients
at once. Besides, a gradient's memory is let go of by a deprecated way of PyTorch that takes a quarter of the time of its
bookkeeping (profile of 24 layers on a CPU); each chunk's norm is taken of an fp32 copy of the chunk, and waited for in the middle of
backward; and bf16 gradients are searched for overflows, which only fp16's loss scale asks about.
"""

import torch

from . import light_imports  # noqa: F401  before colossalai
from colossalai.accelerator import get_accelerator
from colossalai.tensor import param_op_hook
from colossalai.zero import GeminiDDP
from colossalai.zero.gemini import TensorState, gemini_ddp
from colossalai.zero.gemini.chunk import Chunk

_Original = param_op_hook.PreFwdPostBwd
_finds_overflow = Chunk.has_inf_or_nan.fget


def speed_up(model: torch.nn.Module) -> None:
    """Apply to a boosted model, in place, if it is Gemini's. What it computes stays the same."""
    if not isinstance(model, GeminiDDP):
        return
    gemini_ddp.free_storage = _free_storage
    Chunk.set_l2_norm = _set_l2_norm
    Chunk.has_inf_or_nan = property(_has_inf_or_nan)
    # Gradients that accumulate have chunks of their own, and one more state to go through: left to ColossalAI.
    if model.chunk_manager.reuse_fp16_chunk:
        param_op_hook.PreFwdPostBwd = _PreForwardPostBackward
        for layer in model.unwrap().model.decoder.layers:
            for parameter in layer.parameters():
                parameter._grad_handle.remove()
                parameter._gemini = model


def _free_storage(tensor: torch.Tensor) -> None:
    tensor.untyped_storage().resize_(0)


def _set_l2_norm(self) -> None:
    """Record the square of this chunk's L2 norm, on the device: GeminiOptimizer reads it when all are there."""
    values = self.cuda_global_chunk[: self.utilized_size] if self.is_gathered else self.cuda_shard[: self.valid_end]
    self.l2_norm = torch.linalg.vector_norm(values, dtype=torch.float32).square()


def _has_inf_or_nan(self):
    return _finds_overflow(self) if self.dtype == torch.float16 else False


class _PreForwardPostBackward(_Original):
    """What an operation's inputs go through; backward it has their gradients, of a decoder layer the parameters' come last."""

    @staticmethod
    def backward(ctx, *grads):
        out = _Original.backward(ctx, *grads)
        model = getattr(ctx.params[0], "_gemini", None)
        if model is None:
            return out
        _take_gradients(model, ctx.params, grads[-len(ctx.params) :])
        return *out[: -len(ctx.params)], *[None] * len(ctx.params)


def _take_gradients(model: GeminiDDP, parameters: list[torch.Tensor], grads: tuple[torch.Tensor, ...]) -> None:
    """GeminiDDP.grad_handle for all parameters of a layer: their gradients take their place in the chunks, and a chunk that has
    all of its gradients is reduced."""
    manager, stream = model.chunk_manager, model.async_reduce_stream
    with torch._C.DisableTorchFunction():
        torch._foreach_copy_([p.data for p in parameters], grads)
        for parameter in parameters:
            parameter._gemini_reduced = True  # which GeminiDDP checks after backward
            manager.trans_tensor_state(parameter, TensorState.READY_FOR_REDUCE)
        if stream is not None:
            stream.wait_stream(get_accelerator().current_stream())
        with get_accelerator().stream(stream):
            for chunk in manager.get_chunks(parameters):
                if not manager.reduce_chunk(chunk, async_op=stream is not None):
                    continue
                chunk.wait_async_reduce()
                (chunk.cuda_global_chunk if chunk.is_gathered else chunk.cuda_shard).div_(chunk.pg_size)
                manager.overflow_counter += chunk.has_inf_or_nan
                if chunk.l2_norm_flag:
                    chunk.set_l2_norm()
                device = model.grads_device[chunk.get_tensors()[0]]
                manager.move_chunk(chunk, device, force_copy=True, async_move=stream is not None)
