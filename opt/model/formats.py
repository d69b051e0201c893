"""Numbers in 8 bits, and chances in 16: what PyTorch's own operations (low_bits, float8, residual)
and the kernels agree on."""

from dataclasses import dataclass

import torch

# ---- moments of low_bits, which says what they are

BLOCK = 256  # elements that share a scale
FIRST_MAX, SECOND_MAX = 448.0, 1.9375  # of the codes 126 and 255
# Powers of two by which the codes' exponents are under fp32's: then an fp32 number's leading bits
# are the code, down to its subnormal numbers
FIRST_SHIFT, SECOND_SHIFT = 2.0**-120, 2.0**-112
SMALLEST = 1e-30  # scales under it are none: their moments are 0


@dataclass
class Held:
    """What AdamW updates of one parameter, or of a piece of it: flat tensors with as many elements
    each."""

    grad: torch.Tensor | None  # bf16; None between updates
    weight: torch.Tensor  # bf16; of adamw_torch in host memory fp32, and so are the moments
    exp_avg: torch.Tensor  # bf16; or codes, uint8, then whole blocks
    exp_avg_sq: torch.Tensor  # the same; the codes are of its root
    exp_avg_scale: torch.Tensor | None  # fp32, of each block of codes
    exp_avg_sq_scale: torch.Tensor | None
    seed: int  # of the parameter in this run, see parameter_seed()
    start: int  # the piece's first element in the parameter

    def part(self, first: int, end: int) -> "Held":
        """Its elements from `first` to `end`, views; in codes between whole blocks."""
        grad = None if self.grad is None else self.grad.view(-1)[first:end]
        tensors = (self.weight, self.exp_avg, self.exp_avg_sq)
        scales = [
            None if t is None else t[first // BLOCK : end // BLOCK]
            for t in (self.exp_avg_scale, self.exp_avg_sq_scale)
        ]
        flat = [t.view(-1)[first:end] for t in tensors]
        return Held(grad, *flat, *scales, self.seed, self.start + first)


# ---- matrices of float8

SMALLEST_LARGEST = 1e-12  # of a matrix's elements: one of zeros has a scale as well


# ---- dropout of residual


def threshold(p: float) -> int:
    """Of 65536: how many are dropped."""
    return round(p * 65536)
