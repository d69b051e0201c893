"""Operations that the compiler does not look into: it calls them as they are."""

from collections.abc import Callable

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

# Kept: what it defines goes with it. [C33] torch.library.custom_op wraps each call in Python for
# autograd, which these do without: 56 us of the host's time instead of 8, some 400 times a step.
_library = torch.library.Library("opt", "FRAGMENT")


def define(schema: str, function: Callable, shapes: Callable, cost: Callable) -> None:
    """torch.ops.opt.NAME, by its schema, "NAME(Tensor x, ...) -> Tensor".

    Args:
        function: what it does, on any device; it gives back none of its arguments, and changes
            those that the schema marks.
        shapes: the same arguments -> empty tensors like those that come out.
        cost: of tensors' shapes in the place of tensors, about how many floating-point operations:
            what the compiler's memory budget goes by when it chooses what to compute again.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"opt::{name}", shapes, lib=_library)
    register_flop_formula(getattr(torch.ops.opt, name))(lambda *given, **_: cost(*given))


def _scaled_mm_flops(a, b, *_, **__) -> int:
    return 2 * a[0] * a[1] * b[1]


# [F55] PyTorch 2.5 does not count it, and takes a product in fp8 for what costs nothing to repeat
if torch.ops.aten._scaled_mm not in flop_registry:
    register_flop_formula(torch.ops.aten._scaled_mm)(_scaled_mm_flops)
