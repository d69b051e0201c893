"""Frozen weights in 4 bits, for LoRA on models that do not fit otherwise (QLoRA, Dettmers et al.,
arXiv:2305.14314): nf4 in blocks of 64, whose scales are in 8 bits themselves, by bitsandbytes,
which is asked for when there is a weight to put in."""

import torch
from torch import nn

from opt.model.linear import product_dtype
from opt.model.lora import TARGETS
from opt.model.opt import recomputes

BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # of a weight: itself, its part of a scale, of that one's


class FourBits:
    """A linear.Product of one map, whose weight (out, in) is packed: uint8 (out x in / 2, 1)."""

    def __init__(self, dtype: torch.dtype, is_kept: bool):
        """`dtype`: that it is unpacked to. `is_kept`: whether what forward has unpacked is kept for
        backward; where activations are recomputed that is a layer's at a time, and saves a third of
        the unpacking."""
        self._dtype, self._is_kept, self._state = dtype, is_kept, None

    @torch.no_grad()
    def fill(self, weight: torch.Tensor, whole: torch.Tensor) -> None:
        """Pack `whole` into `weight`, on the weight's device."""
        from bitsandbytes.functional import quantize_4bit

        whole = whole.to(weight.device, self._dtype).contiguous()
        packed, self._state = quantize_4bit(
            whole, blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        weight.copy_(packed)

    def unpack(self, weight: torch.Tensor) -> torch.Tensor:
        """(out, in)."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight, self._state)

    def __call__(self, x, weight, bias):
        dtype = product_dtype(x)
        out = _UnpackedProduct.apply(x.to(dtype), weight, self.unpack, self._is_kept)
        return out if bias is None else out + bias.to(dtype)


class _UnpackedProduct(torch.autograd.Function):
    """x (..., in) -> (..., out); the weight is frozen."""

    @staticmethod
    def forward(ctx, x, weight, unpack, is_kept):
        whole = unpack(weight).to(x.dtype)
        ctx.save_for_backward(whole if is_kept else weight)
        ctx.unpack = None if is_kept else unpack
        return x @ whole.t()

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        whole = ctx.unpack(weight).to(grad.dtype) if ctx.unpack else weight
        return grad @ whole, None, None, None


def prepare(model: nn.Module, dtype: torch.dtype, recompute_every: int) -> None:
    """Give the matrices of a new OPTForCausalLM's layers packed weights, still to be filled, and
    products of their own, which linear.attach finds. In the place of weights that need no memory
    yet. `recompute_every`: see opt.recomputes."""
    for number, layer in enumerate(model.model.decoder.layers):
        for place in TARGETS.values():
            linear = layer.get_submodule(place)
            packed = torch.empty(
                (linear.in_features * linear.out_features + 1) // 2,
                1,
                dtype=torch.uint8,
                device=linear.weight.device,
            )
            linear.weight = nn.Parameter(packed, requires_grad=False)
            linear.product = FourBits(dtype, recomputes(number, recompute_every))
