"""Matrix products of the decoder layers in 8-bit floating point, on GPUs that multiply those twice as fast as bf16.

ColossalAI 0.5.0's own (`use_fp8`) raises RuntimeError: its `_LinearFp8` takes the `[0]` of what `torch._scaled_mm` returns, which
in PyTorch 2.5 and later is the product itself, not a pair (seen with 2.11; it can go when that indexing is gone).
"""

import torch
from torch import nn

from opt.model.linear import product_dtype

UNIT = 16  # the kernel takes matrices whose sizes are multiples of this


def use_fp8(layers: nn.ModuleList) -> None:
    """Let the linear maps in `layers` multiply in fp8, in place; weights, gradients and everything between stay what they are.

    A map with a size that is no multiple of 16 is left alone, and so are the names of all parameters.
    """
    for module in layers.modules():
        if type(module) is nn.Linear and module.in_features % UNIT == module.out_features % UNIT == 0:
            module.__class__ = Float8Linear


class Float8Linear(nn.Linear):
    """A linear map whose three products, the output's, the input's and the weight's gradient, are in fp8.

    Each factor is scaled so that its largest element is the largest number of its format: e4m3 forward, e5m2, with more range
    and less precision, for the output's gradient (Micikevicius et al., arXiv:2209.05433).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features), in autocast's dtype or else the input's."""
        if x.shape[:-1].numel() % UNIT:  # an epoch's last batch may be smaller; the weight's gradient is a sum over tokens
            return super().forward(x)
        dtype = product_dtype(x)
        out = _Float8Product.apply(x.flatten(0, -2).to(dtype), self.weight)
        if self.bias is not None:
            out = out + self.bias.to(dtype)
        return out.view(*x.shape[:-1], -1)


class _Float8Product(torch.autograd.Function):
    """x (tokens, in) and weight (out, in) -> (tokens, out), in x's dtype."""

    @staticmethod
    def forward(ctx, x, weight):
        x8, x_scale = _quantize(x, torch.float8_e4m3fn)
        weight8, weight_scale = _quantize(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, x_scale, weight8, weight_scale)
        ctx.weight_dtype = weight.dtype
        return _multiply(x8, x_scale, weight8.t(), weight_scale, x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x8, x_scale, weight8, weight_scale = ctx.saved_tensors
        grad8, grad_scale = _quantize(grad, torch.float8_e5m2)
        # The kernel wants the left factor by rows and the right one by columns.
        x_grad = _multiply(grad8, grad_scale, weight8.t().contiguous().t(), weight_scale, grad.dtype)
        weight_grad = _multiply(grad8.t().contiguous(), grad_scale, x8.t().contiguous().t(), x_scale, grad.dtype)
        return x_grad, weight_grad.to(ctx.weight_dtype)


def _quantize(tensor: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """`tensor` in fp8 and the fp32 scalar that it is to be multiplied by. An infinity in it becomes nan."""
    largest = torch.finfo(dtype).max
    scale = tensor.abs().amax().float().clamp(min=1e-12) / largest
    return (tensor.float() / scale).clamp(-largest, largest).to(dtype), scale


def _multiply(a, a_scale, b, b_scale, dtype):
    return torch._scaled_mm(a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=True)
