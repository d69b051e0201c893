"""A layer's dropout, the residual that it is added to, and the norm behind them, in one pass on a
GPU (residual_kernels).

An element is dropped by 16 bits, so its probability is p to within 1/131072. They come from a seed
that is a tensor on the device: recorded steps draw another one each time, layers that are computed
again have the one of before, and so has backward, which needs no mask.
"""

import torch
from torch import nn

from opt.model import operations
from opt.model.formats import threshold
from opt.model.kernel_probe import has_kernel

WIDEST = 8192  # that a program holds in its registers


def fits(columns: int) -> bool:
    """Whether the kernels take hidden states of this width."""
    return columns % 64 == 0 and columns <= WIDEST


def are_fused(layers: nn.ModuleList, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `layers`, DecoderLayers, have kernels there for hidden states in `dtype`: in 16 bits,
    and no autocast."""
    layer = layers[0]
    norm = layer.final_layer_norm
    if (
        dtype not in (torch.float16, torch.bfloat16)
        or any(p.dtype != dtype for p in layer.parameters() if p.is_floating_point())
        or norm.weight is None
        or not fits(layer.embed_dim)
    ):
        return False
    given = layer.dropout, layer.do_layer_norm_before, norm.weight.requires_grad
    return has_kernel("residual", device, dtype, layer.embed_dim, *given)


def budget(is_before: bool, trains_all: bool) -> float:
    """The compiler's memory budget (see opt.compile_layers) for fused layers: there is no mask that
    it could draw again, and no norm behind a dropout to be computed again by itself. That in front
    of attention alone is what 0.92 asks for; of layers whose norm is not there, and of the first
    one of those with adapters, it would ask for more."""
    return 0.92 if is_before and trains_all else 1.0


def draw_seeds(
    layers: nn.ModuleList, parts: int, hidden_states: torch.Tensor
) -> torch.Tensor | None:
    """Of the dropouts of `layers` in training, which hidden_states go through in `parts`: (layers,
    parts, 2), int64. None where there are no kernels for them."""
    device = hidden_states.device
    if not are_fused(layers, device, hidden_states.dtype):
        return None
    return torch.empty(len(layers), parts, 2, dtype=torch.int64, device=device).random_()


def add(
    x: torch.Tensor, residual: torch.Tensor, seeds: torch.Tensor, place: int, p: float
) -> torch.Tensor:
    """residual + dropout(x), both (..., columns); seeded by seeds[place]."""
    return _Add.apply(x, residual, seeds, place, threshold(p)) if p else residual + x


def add_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    norm: nn.LayerNorm,
    seeds: torch.Tensor,
    place: int,
    p: float,
    goes_on: str,
) -> tuple[torch.Tensor, ...]:
    """residual + dropout(x), both (..., columns), and the norm of that.

    `goes_on`: what comes back ahead of the norm's output, as the next residual: "total", what was
    added up, "normed", the norm's output as well, or "" for nothing.
    """
    given = norm.weight, norm.bias, norm.eps, seeds, place, threshold(p), goes_on
    return _AddNorm.apply(x, residual, *given)


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, seeds, place, threshold):
        ctx.save_for_backward(seeds)
        ctx.given = place, threshold
        return torch.ops.opt.add(x, residual, seeds, place, threshold)

    @staticmethod
    def backward(ctx, grad):
        (seeds,) = ctx.saved_tensors
        return torch.ops.opt.add(grad, None, seeds, *ctx.given), grad, None, None, None


class _AddNorm(torch.autograd.Function):
    """The residual goes to two places: here their gradients are added up where they are read."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, seeds, place, threshold, goes_on):
        total, normed, means, inverses = torch.ops.opt.add_norm(
            x, residual, weight, bias, eps, seeds, place, threshold
        )
        ctx.save_for_backward(total, means, inverses, weight, seeds)
        ctx.given, ctx.goes_on = (place, threshold), goes_on
        if goes_on == "total":
            return total, normed
        return (normed.view_as(normed), normed) if goes_on == "normed" else (normed,)

    @staticmethod
    def backward(ctx, *grads):
        *saved, weight, seeds = ctx.saved_tensors
        trained = ctx.needs_input_grad[2]
        residual_grad, x_grad, sums = torch.ops.opt.add_norm_backward(
            grads[0] if ctx.goes_on else None,
            grads[-1],
            *saved,
            weight,
            seeds,
            *ctx.given,
            ctx.goes_on == "total",
            trained,
        )
        of_norm = sums.to(weight.dtype).unbind() if trained else (None, None)
        if ctx.given[1] == 0:
            x_grad = residual_grad
        return x_grad, residual_grad, *of_norm, None, None, None, None, None


def _add(x, residual, seeds, place, threshold):
    from opt.model import residual_kernels

    given = residual if residual is None else residual.contiguous()
    return residual_kernels.add(x.contiguous(), given, seeds, place, threshold)


def _add_norm(x, residual, *given):
    from opt.model import residual_kernels

    return residual_kernels.add_norm(x.contiguous(), residual.contiguous(), *given)


def _add_norm_backward(grad, normed_grad, *given):
    from opt.model import residual_kernels

    grad = grad if grad is None else grad.contiguous()
    return residual_kernels.add_norm_backward(grad, normed_grad.contiguous(), *given)


def _new(like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(like.shape)


def _shapes_of_norm(x, residual, *_):
    rows = x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)
    return _new(x), _new(x), rows, torch.empty_like(rows)


def _shapes_of_backward(grad, normed_grad, total, *given):
    *_, threshold, is_total, trained = given
    x_grad = _new(total) if threshold else total.new_empty(0)
    sums = (2, total.shape[-1]) if trained else (0,)
    return _new(total), x_grad, total.new_empty(sums, dtype=torch.float32)


def _cost(like, *_) -> int:
    """As much as keeps the compiler from doing it again."""
    return 10**4 * torch.Size(like).numel()


operations.define(
    "add(Tensor x, Tensor? residual, Tensor seeds, int place, int threshold) -> Tensor",
    _add,
    lambda x, *_: _new(x),
    _cost,
)
operations.define(
    "add_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, Tensor seeds, "
    "int place, int threshold) -> (Tensor, Tensor, Tensor, Tensor)",
    _add_norm,
    _shapes_of_norm,
    _cost,
)
operations.define(
    "add_norm_backward(Tensor? grad, Tensor normed_grad, Tensor total, Tensor means, "
    "Tensor inverses, Tensor weight, Tensor seeds, int place, int threshold, bool is_total, "
    "bool trained) -> (Tensor, Tensor, Tensor)",
    _add_norm_backward,
    _shapes_of_backward,
    lambda grad, normed_grad, *_: _cost(normed_grad),
)
