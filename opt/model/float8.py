"""Matrix products in 8-bit floats, which GPUs from Ada on multiply twice as fast as bf16; weights,
gradients and everything between stay what they are.

[C31] A product wants its factors by rows or by columns, and backward wants those of forward the
other way round. Compiled, the transposing is part of kernels that write byte by byte: OPT-1.3b's
quantization took 76 ms of a step of 249, the products themselves 80 (H100, 16 x 1024 tokens). So a
tensor is quantized by a kernel of ours, once for both products, by rows and by columns, after one
pass that finds its largest element, and, of gradients, the bias's.
"""

import torch

from opt.model import operations
from opt.model.formats import SMALLEST_LARGEST
from opt.model.kernel_probe import has_kernel

UNIT = 16  # the fp8 kernel takes matrices whose sizes are multiples of this
FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (tokens, in), weight (out, in) and bias (out,) -> (tokens, out), in x's dtype: the three
    products, the output's, the input's and the weight's gradient, in fp8. All sizes are multiples
    of UNIT.

    Each factor is scaled so that its largest element is the largest number of its format: e4m3
    forward, e5m2, with more range and less precision, for the output's gradient (Micikevicius et
    al., arXiv:2209.05433).
    """
    return _Product.apply(x, weight, bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        of_x, of_weight = ctx.needs_input_grad[:2]
        # A frozen weight's gradient alone would ask for x; and the weight itself, which is there
        # anyway, is quantized again, or a large model would be there in fp8 as well.
        x8, x8_t, x_scale, _ = quantize(x, FORWARD, of_weight, False)
        weight8, weight8_t, weight_scale, _ = quantize(weight, FORWARD, of_x and of_weight, False)
        if bias is not None:
            bias = bias.to(x.dtype)
        out = _multiply(x8, x_scale, weight8, weight_scale, x.dtype, bias)
        if of_weight:
            ctx.save_for_backward(x8_t, x_scale, weight8_t, weight_scale)
        else:
            ctx.save_for_backward(weight)
        ctx.weight_dtype, ctx.has_bias = weight.dtype, bias is not None
        return out

    @staticmethod
    def backward(ctx, grad):
        of_x, of_weight, of_bias = ctx.needs_input_grad
        if of_weight:
            x8_t, x_scale, weight8_t, weight_scale = ctx.saved_tensors
        else:
            _, weight8_t, weight_scale, _ = quantize(*ctx.saved_tensors, FORWARD, True, False)
        grad8, grad8_t, scale, sums = quantize(grad, BACKWARD, of_weight, of_bias)
        x_grad = weight_grad = bias_grad = None
        if of_x:
            x_grad = _multiply(grad8, scale, weight8_t, weight_scale, grad.dtype)
        if of_weight:
            weight_grad = _multiply(grad8_t, scale, x8_t, x_scale, grad.dtype)
            weight_grad = weight_grad.to(ctx.weight_dtype)
        if of_bias:
            bias_grad = sums.to(grad.dtype)
        return x_grad, weight_grad, bias_grad


def _multiply(a, a_scale, b, b_scale, dtype, bias=None):
    """a (m, k), b (n, k), by rows -> a @ b.T (m, n)."""
    scales = {"scale_a": a_scale, "scale_b": b_scale}
    return torch._scaled_mm(a, b.t(), bias=bias, out_dtype=dtype, use_fast_accum=True, **scales)


def quantize(
    tensor: torch.Tensor, dtype: torch.dtype, transposed: bool, summed: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix (rows, columns) in fp8, so that its largest element is the format's largest number;
    an infinity in it becomes nan.

    Returns:
        quantized: (rows, columns) in `dtype`.
        turned: (columns, rows), the same by columns, if it is `transposed`, else empty.
        scale: the fp32 scalar that both are to be multiplied by.
        sums: (columns,) fp32, of the matrix itself over its rows, if it is `summed`, else empty.
    """
    return torch.ops.opt.quantize(tensor, dtype, transposed, summed)


def _quantize(tensor, dtype, transposed, summed):
    if has_kernel("fp8", tensor.device, tensor.dtype, dtype):
        from opt.model.kernels import quantize

        return quantize(tensor.contiguous(), dtype, transposed, summed)
    largest = torch.finfo(dtype).max
    scale = tensor.abs().amax().float().clamp(min=SMALLEST_LARGEST) / largest
    quantized = (tensor.float() / scale).clamp(-largest, largest).to(dtype)
    turned = quantized.t().contiguous() if transposed else quantized.new_empty(0)
    sums = tensor.sum(0, dtype=torch.float32) if summed else scale.new_empty(0)
    return quantized, turned, scale, sums


def _shapes(tensor, dtype, transposed, summed):
    rows, columns = tensor.shape
    return (
        tensor.new_empty((rows, columns), dtype=dtype),
        tensor.new_empty((columns, rows) if transposed else (0,), dtype=dtype),
        tensor.new_empty((), dtype=torch.float32),
        tensor.new_empty((columns,) if summed else (0,), dtype=torch.float32),
    )


operations.define(
    "quantize(Tensor tensor, ScalarType dtype, bool transposed, bool summed) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _quantize,
    _shapes,
    # As much as keeps the compiler from doing it again in backward
    cost=lambda tensor, *_: 10**4 * tensor[0] * tensor[1],
)
