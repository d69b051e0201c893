"""Which kernels of kernels.py can be built here. One that cannot falls away alone: PyTorch's own
operations do its work, slower, and a line says so.

Triton builds kernels with the host's C compiler and Python's headers, and a kernel may ask for more
than an older Triton or a smaller GPU has. So each is tried, once a process, as the run needs it:
with its dtypes and sizes, on next to no data. What that builds is not built again.
"""

import functools
from collections.abc import Iterable

import torch

from opt.model import formats

WORK = {
    "update": "the update",
    "update_low": "AdamW on bf16 weights",
    "loss": "the fused loss",
    "attention": "the attention of short rows",
    "fp8": "quantization to 8-bit floats",
    "residual": "dropout, residual and norm",
}
# One H100, torch 2.11, commit 95f466b, with all kernels and with none: 63.6 and 58.6 thousand
# tokens/s, 184.0 and 157.9, in the demo 89.3 and 56.6.
COST = (
    "8 % (OPT-1.3b) to 14 % (350m) slower with rows of 1,024 tokens, 37 % with short ones "
    "(350m; one H100)"
)

_told: set[str] = set()  # kernels of whose absence the plan or an earlier line has told


def has_kernel(kernel: str, device: torch.device, *variant) -> bool:
    """Whether kernels.py has `kernel` here. `variant`: what _TRIALS[kernel] takes behind the
    device."""
    if device.type != "cuda":
        return False
    reason = _obstacle(kernel, device, *variant)
    if reason and kernel not in _told:
        _told.add(kernel)
        print(f"  kernels   {_describe({kernel: reason}, is_all=False)}", flush=True)
    return reason is None


def has_short_attention(
    device: torch.device, dtype: torch.dtype, head_dim: int, longest: int
) -> bool:
    """Whether the kernel for short rows attends here, in rows of at most `longest` tokens."""
    return takes_short_attention(device, dtype, head_dim, longest) and has_kernel(
        "attention", device, dtype, head_dim, padded(longest)
    )


def takes_short_attention(
    device: torch.device, dtype: torch.dtype, head_dim: int, longest: int
) -> bool:
    """Whether the kernel for short rows is meant for these, and for this device, if it can be
    built."""
    return (
        dtype in (torch.float16, torch.bfloat16)
        and fits_short_attention(longest, head_dim)
        and has_bf16(device)
    )


def fits_short_attention(longest: int, head_dim: int) -> bool:
    """Whether a multiprocessor can hold a row and head: 98 KiB of shared memory at most, of 99
    (Ada), 163 (A100) or 227 (Hopper)."""
    return (
        padded(longest) <= 128
        and 16 <= head_dim == _power_of_2(head_dim)
        and padded(longest) * head_dim <= 8192
    )


def padded(longest: int) -> int:
    """The tokens that a program of short attention computes: a power of 2, 16 at least, of which
    Triton can multiply matrices."""
    return max(16, _power_of_2(longest))


def _power_of_2(number: int) -> int:
    """The smallest that is not under `number`."""
    return 1 << (number - 1).bit_length()


def missing_kernels(device: torch.device, needed: Iterable[tuple]) -> str | None:
    """What the plan is to say of those of the `needed`, each (kernel, *variant), that cannot be
    built; None if all can."""
    needed = list(needed)
    missing = {
        kernel: reason
        for kernel, *variant in needed
        if (reason := _obstacle(kernel, device, *variant))
    }
    _told.update(missing)
    return _describe(missing, is_all=len(missing) == len(needed)) if missing else None


def _describe(missing: dict[str, str], is_all: bool) -> str:
    what, why = (
        ", ".join(WORK[kernel] for kernel in missing),
        "; ".join(dict.fromkeys(missing.values())),
    )
    cost = (
        f"about {COST}"
        if is_all
        else f"slower, by how much alone was not measured; without any kernel {COST}"
    )
    return (
        f"PyTorch's own operations for {what}, where Triton builds no kernel here ({why}): {cost}"
    )


@functools.cache
def _obstacle(kernel: str, device: torch.device, *variant) -> str | None:
    """Why a kernel cannot be built, or None if it can."""
    try:
        from opt.model import kernels

        with torch.cuda.device(device):
            _TRIALS[kernel](kernels, device, *variant)
        return None
    except torch.cuda.OutOfMemoryError:
        raise  # nothing wrong with the kernel
    except Exception as error:  # from a missing package to the C compiler's own
        # A compilation error begins with the code that it is about; what is wrong with it stands at
        # the end.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[-1]:.200}" if lines else type(error).__name__


def _try_update(kernels, device, gradient: torch.dtype, output: torch.dtype | None) -> None:
    grads, params, exp_avgs, exp_avg_sqs = (
        [torch.zeros(16, dtype=t, device=device)] for t in (gradient, *[torch.float32] * 3)
    )
    outputs = output and [torch.zeros(16, dtype=output, device=device)]
    kernels.adamw(
        grads,
        params,
        exp_avgs,
        exp_avg_sqs,
        outputs,
        torch.ones((), device=device),
        torch.ones(3, device=device),
        0.9,
        0.999,
        1e-8,
        0.0,
    )


def _try_update_low(kernels, device, bits: int) -> None:
    bf16 = [torch.zeros(formats.BLOCK, dtype=torch.bfloat16, device=device) for _ in range(4)]
    scales = [None, None]
    if bits == 8:
        bf16[2:] = [t.to(torch.uint8) for t in bf16[2:]]
        scales = [torch.zeros(1, device=device) for _ in range(2)]
    held = formats.Held(*bf16, *scales, seed=0, start=0)
    ones = torch.ones((), device=device), torch.ones(4, device=device)
    kernels.adamw_low([held], *ones, 0.9, 0.999, 1e-8, 0.0)


def _try_loss(kernels, device, dtype: torch.dtype, columns: int, processes: int = 1) -> None:
    """`columns` of the vocabulary on each of `processes`."""
    logits, targets, losses = (
        torch.zeros(1, columns, dtype=dtype, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
        torch.zeros(1, device=device),
    )
    if processes == 1:
        kernels.cross_entropy(logits, targets, losses, ignore=-100)
    else:
        parts = torch.zeros(processes, 3, 1, device=device)
        kernels.part_of_rows(logits, targets, parts[0], 0)
        kernels.cross_entropy_of_parts(logits, targets, parts, losses, 0, ignore=-100)


def _try_attention(kernels, device, dtype: torch.dtype, head_dim: int, length: int) -> None:
    with torch.enable_grad():
        qkv = torch.zeros(1, 3, 1, head_dim, dtype=dtype, device=device, requires_grad=True)
        cu_seqlens = torch.tensor([0, 1], dtype=torch.int32, device=device)
        torch.autograd.grad(kernels.ShortAttention.apply(qkv, cu_seqlens, length).sum(), qkv)


def _try_fp8(kernels, device, dtype: torch.dtype, eight: torch.dtype) -> None:
    matrix = torch.zeros(16, 16, dtype=dtype, device=device)
    for transposed, summed in ((True, True), (True, False), (False, False)):
        kernels.quantize(matrix, eight, transposed, summed)


def _try_residual(
    kernels, device, dtype: torch.dtype, columns: int, p: float, is_before: bool, trained: bool
) -> None:
    """`is_before`: whether norms are ahead of the maps; `trained`: whether they are."""
    from opt.model import residual_kernels

    x = torch.zeros(1, columns, dtype=dtype, device=device)
    weight, seeds = x[0], torch.zeros(2, dtype=torch.int64, device=device)
    given = seeds, 0, formats.threshold(p)
    total, _, *rest = residual_kernels.add_norm(x, x, weight, weight, 1e-5, *given)
    for grad in (x,) if is_before else (x, None):
        of_it = grad, x, total, *rest, weight
        residual_kernels.add_norm_backward(*of_it, *given, is_before, trained)
    if is_before and p:
        residual_kernels.add(x, x, *given)
        residual_kernels.add(x, None, *given)


_TRIALS = {
    "update": _try_update,
    "update_low": _try_update_low,
    "loss": _try_loss,
    "attention": _try_attention,
    "fp8": _try_fp8,
    "residual": _try_residual,
}


def has_bf16(device: torch.device) -> bool:
    """Whether the GPU has bf16 matrix units (compute capability 8.0, Ampere, and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def has_fp8(device: torch.device) -> bool:
    """Whether the GPU has fp8 matrix units (compute capability 8.9, Ada, and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
