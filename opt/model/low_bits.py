"""AdamW on bf16 weights that have no fp32 copy, with moments in 16 or 8 bits: formats, rounding,
and the update in PyTorch's own operations, for a CPU; on a GPU it is one kernel for all tensors
(kernels.adamw_low).

bf16 has 8 bits of precision: rounded to the nearest, most updates at common learning rates would
leave a weight where it is, and most changes of the second moment, a thousandth each, too. So all
that is kept is rounded stochastically, up or down with the probability that makes the mean exact
(Gupta et al., arXiv:1502.02551; for bf16 weights Zamirai et al., arXiv:2010.06192).

In 8 bits moments are floating-point numbers under a scale for each BLOCK elements, their greatest
magnitude (block-wise: Dettmers et al., arXiv:2110.02861): the first one float8_e4m3fn, as
torchao's AdamWFp8 has it; of the second one its root, which has half the range, without a sign and
with four bits of mantissa. Such codes take shifts and sums and no table.

What a number is rounded by depends on the run's seed, the parameter, the number of the update and
the place in the parameter, and on nothing else: resumed runs and all processes round alike,
however a parameter is cut into pieces.
"""

import math
import zlib
from collections.abc import Sequence

import torch

from opt.model.formats import BLOCK, FIRST_MAX, SECOND_MAX, SMALLEST, Held
from opt.model.kernel_probe import has_kernel

_MASK = 0xFFFFFFFF


def has_blocks(shape: tuple[int, ...]) -> bool:
    """Whether a parameter's moments are kept in 8 bits, where that is asked for: those of matrices
    that 64 processes, or a smaller power of two, can cut between blocks. The few others, biases,
    norms and positions, have them in bf16."""
    return len(shape) > 1 and math.prod(shape) % (64 * BLOCK) == 0


def parameter_seed(seed: int, name: str) -> int:
    """Of a run with this --seed, 32 bits."""
    return zlib.crc32(f"{seed}/{name}".encode())


def rounding_key(seed: int, step: int) -> int:
    """Of a parameter's update number `step`, 32 bits: added to a place in it and mixed, what the
    number there is rounded by."""
    return _mixed((seed + step * 0x9E3779B9) & _MASK)


def adamw(
    held: Sequence[Held],
    divisor: torch.Tensor | None,
    rates: torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One step of AdamW in place, see the module.

    Args:
        held: all with moments of the same bits.
        divisor: fp32 scalar tensor that the gradients are divided by, or None. If it is not
            finite, nothing changes.
        rates: fp32 (4,), see adam.rates_of; where a kernel updates, on its device.
    """
    device, bits = held[0].weight.device, held[0].exp_avg.element_size() * 8
    if has_kernel("update_low", device, bits):
        from opt.model.kernels import adamw_low

        divisor = torch.ones((), device=device) if divisor is None else divisor
        adamw_low(held, divisor, rates, beta1, beta2, eps, weight_decay)
        return
    if divisor is not None and not divisor.isfinite():
        return
    lr, correction1, correction2_root, step = rates.tolist()
    for one in held:
        key = rounding_key(one.seed, int(step))
        for first in range(0, one.weight.numel(), _PIECE):
            _update(
                one.part(first, first + _PIECE),
                key,
                1.0 if divisor is None else 1.0 / divisor,
                *(lr, correction1, correction2_root),
                *(beta1, beta2, eps, weight_decay),
            )


_PIECE = 2**18  # elements: the fp32 and int64 tensors of one in between are a few MiB each


def _update(
    held: Held, key, factor, lr, correction1, correction2_root, beta1, beta2, eps, weight_decay
) -> None:
    """What kernels._adamw_low does with each element, operation by operation."""
    grad, weight = held.grad.float() * factor, held.weight.float()
    if held.exp_avg_scale is None:
        first, second = held.exp_avg.float(), held.exp_avg_sq.float()
    else:
        first = decoded_first(held.exp_avg, held.exp_avg_scale)
        second = decoded_second_root(held.exp_avg_sq, held.exp_avg_sq_scale).square()
    weight -= lr * weight_decay * weight
    first = beta1 * first + (1 - beta1) * grad
    second = beta2 * second + (1 - beta2) * grad * grad
    root = second.sqrt()
    weight -= lr / correction1 * first / (root / correction2_root + eps)

    positions = torch.arange(held.start, held.start + weight.numel(), device=weight.device)
    random = _mixed((positions + key) & _MASK)
    other = random * 0x9E3779B1 & _MASK
    held.weight.copy_(rounded_to_bf16(weight, random & 0xFFFF))
    if held.exp_avg_scale is None:
        held.exp_avg.copy_(rounded_to_bf16(first, other >> 16))
        held.exp_avg_sq.copy_(rounded_to_bf16(second, random >> 16))
    else:
        encode_first(first, other >> 12, held.exp_avg, held.exp_avg_scale)
        encode_second_root(root, random >> 13, held.exp_avg_sq, held.exp_avg_sq_scale)


def _mixed(number):
    """32 bits (an int, or an int64 tensor) that look random: MurmurHash3's finalizer, in which each
    bit of the number changes each of the result with a probability of one half."""
    number = (number ^ number >> 16) * 0x85EBCA6B & _MASK
    number = (number ^ number >> 13) * 0xC2B2AE35 & _MASK
    return number ^ number >> 16


def rounded_to_bf16(values: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """fp32 values to bf16, stochastically. `random`: 16 bits each, int64."""
    bits = (values.view(torch.int32) + random.to(torch.int32)) & -0x10000
    return torch.where(values == values, bits.view(torch.float32), values).bfloat16()


def decoded_first(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """First moments, fp32."""
    magnitude = _decoded((codes & 0x7F).int(), 20, 120)
    signed = torch.where(codes >= 128, -magnitude, magnitude)
    return (signed.view(-1, BLOCK) * scales[:, None]).view(-1)


def encode_first(values, random, codes, scales) -> None:
    """fp32 first moments into `codes` and `scales`. `random`: 20 bits each, int64."""
    scales.copy_(values.view(-1, BLOCK).abs().amax(1) * (1 / FIRST_MAX))
    magnitude = (values.view(-1, BLOCK).abs() * _inverse(scales)).view(-1)
    code = (_bits(magnitude, 20, 120) + random >> 20).clamp(max=126)
    codes.copy_(code | torch.where(values < 0, 128, 0))


def decoded_second_root(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Roots of second moments, fp32."""
    return (_decoded(codes.int(), 19, 112).view(-1, BLOCK) * scales[:, None]).view(-1)


def encode_second_root(values, random, codes, scales) -> None:
    """fp32 roots of second moments into `codes` and `scales`. `random`: 19 bits each, int64."""
    scales.copy_(values.view(-1, BLOCK).amax(1) * (1 / SECOND_MAX))
    scaled = (values.view(-1, BLOCK) * _inverse(scales)).view(-1)
    codes.copy_((_bits(scaled, 19, 112) + random >> 19).clamp(max=255))


# A code with sign, exponent and mantissa in fp32's order has `dropped` bits of mantissa less, and
# exponents that are `bias` lower. The kernel multiplies by 2^-bias, and fp32's subnormal numbers
# are the code's; on a CPU those would be slow, so here subnormal codes are computed apart.


def _decoded(codes: torch.Tensor, dropped: int, bias: int) -> torch.Tensor:
    """int32 codes without a sign, to fp32."""
    values = ((codes << dropped) + (bias << 23)).view(torch.float32)
    return torch.where(codes >> 23 - dropped == 0, codes * _step(dropped, bias), values)


def _bits(values: torch.Tensor, dropped: int, bias: int) -> torch.Tensor:
    """fp32 values, not negative, to codes with the `dropped` bits behind them, int64."""
    bits, step = values.view(torch.int32).long() - (bias << 23), _step(dropped, bias)
    subnormal = (values * (2.0**dropped / step)).round().long()
    return torch.where(values < step * 2 ** (23 - dropped), subnormal, bits)


def _step(dropped: int, bias: int) -> float:
    """Between subnormal codes."""
    return 2.0 ** (bias - 126 - (23 - dropped))


def _inverse(scales: torch.Tensor) -> torch.Tensor:
    return torch.where(scales > SMALLEST, 1.0 / scales, 0.0)[:, None]
