"""--optim of fewer bits: Adam on bf16 weights that have no fp32 copy, with moments in 16 or 8 bits.
What is rounded and how is in opt/model/low_bits.py.

| --optim              | bytes a parameter: weight, gradient, moments |
|----------------------|-----------------------------------------------|
| `adamw_torch`        | 2 + 2 + 12 (torch_ddp: 4 + 4 + 8)             |
| `adamw_anyprecision` | 2 + 2 + 4                                     |
| `adamw_8bit`         | 2 + 2 + 2.03                                  |

Under low_level_zero, which spreads the last number over the processes, and torch_ddp; with moments
in 16 bits under gemini too, which spreads all three, and has the weights a second time beside the
moments, in host memory with --offload_optim_frac: gradients take the place of the first ones. The
others' optimizers update an fp32 copy.
"""

import math
from argparse import Namespace
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from colossalai.zero.gemini import gemini_optimizer

from opt.colossal.adam import MOMENTS, HybridAdam, adam_state, divisor_on, rates_of
from opt.errors import UserError
from opt.model import low_bits
from opt.model.low_bits import BLOCK, Held
from opt.model.weights import Weights

BITS = {"adamw_anyprecision": 16, "adamw_8bit": 8}


def is_low(plan: Namespace) -> bool:
    """Whether weights are bf16 alone."""
    return plan.optim in BITS


def moment_bytes(plan: Namespace) -> float:
    """Of both moments of a parameter, with their scales."""
    bits = BITS[plan.optim]
    return 2 * (bits / 8 + (4 / BLOCK if bits == 8 else 0))


def state_bytes(plan: Namespace) -> float:
    """Of a parameter: the weight that Adam updates, and its moments; what a checkpoint has."""
    return 2 + moment_bytes(plan) if is_low(plan) else 12


def update_kernels(plan: Namespace) -> Iterator[tuple]:
    """Those that an update comes to, see plugin.Plugin.update_kernels."""
    # A few parameters have moments of 16 bits in any case
    for bits in sorted({16, BITS[plan.optim]}):
        yield "update_low", bits


def check_cuts(plan: Namespace, model: Weights) -> None:
    """Raise UserError where processes would cut moments in 8 bits within a block."""
    if plan.optim != "adamw_8bit" or plan.plugin != "low_level_zero":
        return
    for name in model:
        shape = model.shape(name)
        if low_bits.has_blocks(shape) and math.prod(shape) % (BLOCK * plan.dp_size):
            raise UserError(
                f"--optim adamw_8bit has a scale for each {BLOCK} moments, within which "
                f"{plan.dp_size} processes of low_level_zero would cut {name}: use a power of two "
                "of them, up to 64, or --plugin torch_ddp"
            )


class LowMemoryAdam(HybridAdam):
    """HybridAdam with moments of `bits` bits, on bf16 weights."""

    moments = HybridAdam.moments | {f"{name}_scale": BLOCK for name in MOMENTS}
    dtype = torch.bfloat16

    def __init__(self, *args, bits: int, **kwargs):
        super().__init__(*args, **kwargs)
        if bits == 16:  # without scales
            self.moments = HybridAdam.moments
        self._bits, self._held, self._pieces, self._seed = bits, {}, {}, 0

    @classmethod
    def of(cls, optim: str) -> partial:
        """What makes the one that --optim names."""
        return partial(cls, bits=BITS[optim])

    def know(self, pieces: Iterable, seed: int) -> None:
        """Where they lie (pieces.Piece) of all parameters, and the run's --seed: rounding goes by
        both. To be called before the first update."""
        self._pieces, self._seed = {piece.key: piece for piece in pieces}, seed

    def new_moments(self, key, shape):
        """See HybridAdam; with scales, of those in 8 bits."""
        if self._bits == 16 or not low_bits.has_blocks(self._pieces[key].shape):
            return {
                name: torch.zeros(shape, dtype=torch.bfloat16, device=key.device)
                for name in MOMENTS
            }
        return {
            name: torch.zeros(key.numel() // BLOCK, device=key.device)
            if span > 1
            else torch.zeros(shape, dtype=torch.uint8, device=key.device)
            for name, span in self.moments.items()
        }

    def update_group(self, group, params, grads, outputs, divisor):
        """See HybridAdam; `outputs`, where there are any, are the `params` themselves."""
        divisor = divisor_on(params[0].device, divisor)
        by_bits: dict[torch.dtype, list[Held]] = {}
        for param, grad in zip(params, grads, strict=True):
            held = self.held(param)
            held.grad = grad.view(-1)
            by_bits.setdefault(held.exp_avg.dtype, []).append(held)
        rates = self._rates.get((id(group), params[0].device))
        if rates is None:
            step = adam_state(self, params[0], params[0].shape)["step"]
            rates = rates_of(group["lr"], *group["betas"], step)
        for same in by_bits.values():
            low_bits.adamw(
                same, divisor, rates, *group["betas"], group["eps"], group["weight_decay"]
            )
            for held in same:
                held.grad = None  # its memory is the next forward's

    def update_held(self, held, divisor, numbers):
        """See HybridAdam."""
        lr, beta1, beta2, eps, weight_decay, step = numbers
        rates = rates_of(lr, beta1, beta2, step)
        divisor = divisor_on(held[0].grad.device, divisor)
        low_bits.adamw(held, divisor, rates, beta1, beta2, eps, weight_decay)
        for one in held:
            one.grad.copy_(one.weight)

    def held(self, param: torch.Tensor) -> Held:
        """See HybridAdam. Made once: weights and moments stay where they are."""
        if param not in self._held:
            state, piece = adam_state(self, param, param.shape), self._pieces[param]
            moments = {
                name: None if (moment := state.get(name)) is None else moment.view(-1)
                for name in LowMemoryAdam.moments
            }
            seed = low_bits.parameter_seed(self._seed, piece.name)
            self._held[param] = Held(
                grad=None, weight=param.data.view(-1), **moments, seed=seed, start=piece.start
            )
        return self._held[param]


# [F15] As for HybridAdam
gemini_optimizer._AVAIL_OPTIM_LIST |= {LowMemoryAdam}
