"""The one linear map of the decoder layers, put together of parts: how matrices are multiplied, an
adapter (LoRA) beside the product, and what goes over a tensor-parallel group before and after.
Weights in 4 bits (four_bits) are another product.

`attach` puts it in the place of PyTorch's, and of what a plugin has cut, around the same
parameters: after the plugin, and before the layers are compiled.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache

import torch
from torch import nn
from torch.nn import functional as F

from opt.model import float8, operations
from opt.model.float8 import UNIT

# (x (..., in), weight (out, in), bias (out,) or None) -> (..., out)
Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


class Linear(nn.Module):
    """x (..., in) -> (..., out), x @ weight.T + bias, in autocast's dtype or else x's; and what
    an adapter adds to it.

    Args:
        weight, bias: parameters to take over, (out, in) and (out,) or None; parts of them where a
            plugin has cut them.
        product: how they are multiplied.
        enter: of x, before the product; tensor parallelism by columns adds up x's gradient there.
        leave: of the product, before the bias; tensor parallelism by rows adds up the processes'
            parts there.
        adapter: a lora.Adapter, which takes x and the product and gives their sum, ahead of
            `leave`: what it has to add up over the processes goes with the product.
    """

    is_cut = False  # whether it is a part of a map that a plugin has cut
    # (out, in), where the weight's gradients of several backwards are added up, see adding_up; the
    # product is to be `plain` then
    total: torch.Tensor | None = None

    def __init__(
        self,
        weight,
        bias,
        product: Product,
        enter: Callable | None = None,
        leave: Callable | None = None,
        adapter: nn.Module | None = None,
    ):
        super().__init__()
        self.weight, self.bias, self.product, self.enter, self.leave = (
            weight,
            bias,
            product,
            enter,
            leave,
        )
        self.adapter = adapter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        if self.enter is not None:
            x = self.enter(x)
        bias = self.bias if self.leave is None else None
        if self.is_one_sum:
            out = _one_sum([(self.adapter, self.weight, bias)], x)[0]
        else:
            if self.total is None:
                out = self.product(x, self.weight, bias)
            else:
                out = adding_up(x, self.weight, bias, self.total)
            if self.adapter is not None:
                out = self.adapter(x, out)
        if self.leave is None:
            return out
        out = self.leave(out)
        return out if self.bias is None else out + self.bias

    @property
    def is_one_sum(self) -> bool:
        """Whether product and adapter are computed together."""
        is_plain = self.product in (plain, few_tokens)
        return is_plain and self.adapter is not None and not self.adapter.drops


def attach(
    layers: nn.ModuleList,
    product: Product,
    cut: Callable[[nn.Module], dict | None] = lambda module: None,
) -> None:
    """Make every linear map in `layers` a Linear with `product`, and with its adapter in the
    layer's `adapters` (see lora.add_adapters), if there are any.

    `cut`: of a module, the Linear's arguments that replace `product` or come to it, if it is a
    linear map that a plugin has cut.
    """
    adapters = {}
    for layer in layers:
        own = layer._modules.pop("adapters", None) or {}
        for name, child in layer.named_modules():
            if name.split(".")[-1] in own:
                adapters[child] = own[name.split(".")[-1]]
    for parent in list(layers.modules()):
        for name, child in list(parent.named_children()):
            parts = cut(child)
            if isinstance(child, nn.Linear) or parts is not None:
                # One that it has already is of its weight's own form
                own_product = getattr(child, "product", product)
                given = {"product": own_product, "adapter": adapters.get(child)} | (parts or {})
                linear = Linear(child.weight, child.bias, **given)
                linear.is_cut = parts is not None
                setattr(parent, name, linear)


def each(maps: list[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    """What `maps` make of the same x (..., in): (..., out) of each."""
    if all(isinstance(m, Linear) and m.is_one_sum and not (m.enter or m.leave) for m in maps):
        return _one_sum([(m.adapter, m.weight, m.bias) for m in maps], x)
    return [m(x) for m in maps]


def side_by_side(maps: list[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """What `maps` make of x (tokens, in), next to one another: (tokens, all their out). By one
    product, unless a part of them, or what they multiply by, does not allow it."""
    product = getattr(maps[0], "product", plain)
    if product not in (plain, few_tokens) or any(
        m.bias is None or getattr(m, "is_cut", False) or getattr(m, "adapter", None) for m in maps
    ):
        return torch.cat(each(maps, x), dim=-1)
    dtype = product_dtype(x)
    weight, bias = (
        torch.cat([getattr(m, name).to(dtype) for m in maps]) for name in ("weight", "bias")
    )
    return product(x.to(dtype), weight, bias)


def product_dtype(tensor: torch.Tensor) -> torch.dtype:
    """What matrix products of `tensor` are computed in: autocast's dtype where it is on, else its
    own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


# ---- products

plain: Product = F.linear


def few_tokens(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """For few tokens, as a fine-tune on short rows has: there each of a layer's small kernels
    counts.

    [C19] A bias's gradient is a matrix product, which a GPU does in half the time of PyTorch's sum
    over tokens: OPT-350m's 145 sums take 8 us each for 1,024 tokens, as products 4 (H100, bf16).
    Compiled layers do not need that: there the sums are part of other kernels.
    """
    if bias is None or not weight.requires_grad:
        return plain(x, weight, bias)
    dtype = product_dtype(x)
    return _FewTokens.apply(x.flatten(0, -2).to(dtype), weight.to(dtype), bias.to(dtype)).view(
        *x.shape[:-1], -1
    )


class _FewTokens(torch.autograd.Function):
    """x (tokens, in), weight (out, in), bias (out,) -> (tokens, out)."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return torch.addmm(bias, x, weight.t())

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x, sum_over_tokens(grad)


def sum_over_tokens(grad: torch.Tensor) -> torch.Tensor:
    """A bias's gradient, of the output's (tokens, out); see few_tokens."""
    if torch.compiler.is_compiling() or not grad.is_cuda:
        return grad.sum(0)
    return grad.t() @ _ones(len(grad), grad.dtype, grad.device)


@lru_cache(maxsize=64)
def _ones(length: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Made once: a kernel less for each bias, 145 a step of OPT-350m."""
    return torch.ones(length, dtype=dtype, device=device)


def adding_up(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, total: torch.Tensor
) -> torch.Tensor:
    """plain, whose backward adds the weight's gradient to `total` (out, in) within the product, and
    leaves none to autograd: which would write it out, read it and the sum, and write the sum.

    Of several micro-batches each changes what the others' backwards have taken along: they are to
    run within in_place(totals).
    """
    return _AddsUp.apply(x.flatten(0, -2), weight, bias, total).view(*x.shape[:-1], -1)


class _AddsUp(torch.autograd.Function):
    """x (tokens, in), weight (out, in), bias (out,) or None -> (tokens, out)."""

    @staticmethod
    def forward(ctx, x, weight, bias, total):
        ctx.save_for_backward(x, weight, total)
        ctx.has_bias = bias is not None
        return plain(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight, total = ctx.saved_tensors
        torch.ops.opt.add_product(total, grad.t(), x)
        return grad @ weight, None, sum_over_tokens(grad) if ctx.has_bias else None, None


# Where products go instead of being computed, and those of which totals, by their place in memory:
# a copy that a compiler has made has to have its product at once
_put_off: tuple[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], set[int]] = [], set()


def _add_product(total, a, b) -> None:
    products, places = _put_off
    if total.data_ptr() in places:
        products.append((total, a.detach(), b.detach()))
    else:
        total.addmm_(a, b)


# An operation of its own, or a compiled layer would add in a second pass
operations.define(
    "add_product(Tensor(a!) total, Tensor a, Tensor b) -> ()",
    _add_product,
    lambda total, a, b: None,
    cost=lambda total, a, b: 2 * a[0] * a[1] * b[1],
)


@contextmanager
def in_place(totals: Iterable[torch.Tensor]) -> Iterator[None]:
    """The backwards of one micro-batch: autograd takes no notice that `totals` change."""
    with ExitStack() as stack:
        for total in totals:
            stack.enter_context(torch.autograd._unsafe_preserve_version_counter(total))
        yield


@contextmanager
def put_off(products: list, totals: Iterable[torch.Tensor]) -> Iterator[None]:
    """Backwards of `adding_up` put what they would add to `totals` into `products`, for add_up.

    Compiled layers are to be of opt.compile_layers(..., products_wait=True): the compiler believes
    that the operation has read what it is given, and would write other things there.
    """
    global _put_off
    before, _put_off = _put_off, (products, {total.data_ptr() for total in totals})
    try:
        yield
    finally:
        _put_off = before


@torch.no_grad()
def add_up(products: list) -> None:
    """Add what has been put off, in that order; `products` is empty then."""
    for total, a, b in products:
        total.data.addmm_(a, b)  # of which autograd takes no notice, as in in_place
    products.clear()


def fp8(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """All three products in 8-bit floats, see float8; in x's dtype where a size is no multiple of
    16."""
    # An epoch's last batch may be smaller: the weight's gradient is a sum over tokens.
    if x.shape[:-1].numel() % UNIT or weight.shape[0] % UNIT or weight.shape[1] % UNIT:
        return plain(x, weight, bias)
    return float8.product(x.flatten(0, -2).to(product_dtype(x)), weight, bias).view(
        *x.shape[:-1], -1
    )


# ---- frozen weights with adapters


def _one_sum(maps: list[tuple], x: torch.Tensor) -> list[torch.Tensor]:
    """What maps of the same x (..., in), each an adapter, a frozen weight (out, in) and a bias
    (out,) or None, make of it."""
    dtype = product_dtype(x)
    of_maps = [
        tensor if tensor is None else tensor.to(dtype)
        for adapter, weight, bias in maps
        for tensor in (weight, bias, adapter.lora_A.weight, adapter.lora_B.weight)
    ]
    outs = _AdaptedProducts.apply(x.flatten(0, -2).to(dtype), maps[0][0].scale, *of_maps)
    return [out.view(*x.shape[:-1], -1) for out in outs]


class _AdaptedProducts(torch.autograd.Function):
    """x (tokens, in), the adapters' scale, and of each map its weight, bias, A (r, in) and B
    (out, r) -> each map's (tokens, out). The adapter's product and the weight's are one sum; so
    are, of x's gradient, those of all maps."""

    @staticmethod
    def forward(ctx, x, scale, *of_maps):
        weights, biases, ups, downs = (of_maps[i::4] for i in range(4))
        ups = torch.cat(ups)
        inner = x @ ups.t() * scale
        ctx.save_for_backward(x, inner, ups, *weights, *downs)
        ctx.scale = scale
        return tuple(
            sum_of_products([own, x], [down.t(), weight.t()], bias)
            for own, down, weight, bias in zip(
                inner.chunk(len(weights), 1), downs, weights, biases, strict=True
            )
        )

    @staticmethod
    def backward(ctx, *grads):
        x, inner, ups, *rest = ctx.saved_tensors
        weights, downs = rest[: len(grads)], rest[len(grads) :]
        low = torch.cat([g @ down for g, down in zip(grads, downs, strict=True)], 1) * ctx.scale
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = sum_of_products([low, *grads], [ups, *weights], None)
        of_maps = []
        for up_grad, grad, own in zip(
            (low.t() @ x).chunk(len(grads)), grads, inner.chunk(len(grads), 1), strict=True
        ):
            of_maps += [None, None, up_grad, grad.t() @ own]
        return x_grad, None, *of_maps


def sum_of_products(lefts, rights, bias) -> torch.Tensor:
    """The sum of lefts[i] (m, k_i) @ rights[i] (k_i, n), and of a bias (n,) or None: (m, n).

    [C32] Each is added where the sum is, by the product's own kernel. Of `addmm` the compiler makes
    one that first copies what it adds to.
    """
    return torch.ops.opt.sum_of_products(lefts, rights, bias)


def _sum_of_products(lefts, rights, bias):
    first = lefts[0], rights[0]
    out = torch.mm(*first) if bias is None else torch.addmm(bias, *first)
    for left, right in zip(lefts[1:], rights[1:], strict=True):
        out.addmm_(left, right)
    return out


operations.define(
    "sum_of_products(Tensor[] lefts, Tensor[] rights, Tensor? bias) -> Tensor",
    _sum_of_products,
    lambda lefts, rights, bias: lefts[0].new_empty(lefts[0].shape[0], rights[0].shape[1]),
    cost=lambda lefts, rights, bias: sum(
        2 * m * k * n for (m, k), (_, n) in zip(lefts, rights, strict=True)
    ),
)
