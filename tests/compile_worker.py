"""Compile every kernel of opt/model/kernels.py that the code can ask for, to machine code.

    python compile_worker.py 80 86 89 90

for GPUs of these compute capabilities, which need not be there; PYTHONPATH chooses the Triton.

Prints a JSON object a line for each kernel compiled: what it was called with, its shared memory in
bytes, the accesses of 16 bytes in its PTX, and the error if there was one. The kernels are launched
by the functions that the training calls, on small tensors of the host: only the launch itself is
left out, so that no list of arguments can differ from the real one.
"""

import itertools
import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from opt.model import float8, kernel_probe, kernels, low_bits, residual_kernels

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)


class AbsentGPU:
    """What Triton asks of its driver to compile for a GPU."""

    capability = 0
    device = 0  # Triton keeps what it has built by device

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0


def compile_only(jit_run, gpu, call):
    """In place of JITFunction.run: what it does but for the launch. `call`: one item, what is being
    called."""
    built = []

    def run(self, *args, grid, warmup, **options):
        found = {"kernel": self.__name__, "capability": gpu.capability, "call": call[0]}
        try:
            compiled = jit_run(self, *args, grid=grid, warmup=True, **options)
            vectors = compiled.asm["ptx"].count("global.v4.b32")
            found |= {
                "bytes": len(compiled.asm["cubin"]),
                "shared": compiled.metadata.shared,
                "vectors": vectors,
            }
            found["new"] = not any(compiled is other for other in built)
            built.append(compiled)
        except Exception as error:  # the others are still to be compiled
            found["error"] = f"{type(error).__name__}: {str(error).strip()[-300:]}"
        print(json.dumps(found), flush=True)

    return run


def flat(dtype, is_aligned):
    """Two tensors that a kernel over many tensors is to work on, with a number of elements that is
    a multiple of 16, or not."""
    return [torch.zeros(160 if is_aligned else 163, dtype=dtype) for _ in range(2)]


NUMBERS = torch.ones(()), torch.ones(4), 0.9, 0.999, 1e-8, 0.01


def held(bits, size):
    """Two parameters with bf16 weights, and moments of so many bits."""
    dtypes = [torch.bfloat16] * 2 + [torch.uint8 if bits == 8 else torch.bfloat16] * 2
    return [
        low_bits.Held(
            *(torch.zeros(size, dtype=dtype) for dtype in dtypes),
            *(torch.zeros(size // 256) if bits == 8 else None for _ in range(2)),
            seed=0,
            start=0,
        )
        for _ in range(2)
    ]


def short_attention_sizes() -> list[tuple[int, int]]:
    """All (longest row, head_dim) for which another kernel of short attention is built."""
    sizes = itertools.product((2**i for i in range(12)), range(1, 2049))
    fitting = (size for size in sizes if kernel_probe.fits_short_attention(*size))
    return sorted({(kernel_probe.padded(longest), head_dim) for longest, head_dim in fitting})


def call_all(call) -> None:
    """Call each kernel with all dtypes, alignments and sizes that its function takes."""
    for gradient, is_aligned in itertools.product(FLOATS, (True, False)):
        grads, *fp32 = (
            flat(gradient, is_aligned),
            *(flat(torch.float32, is_aligned) for _ in range(3)),
        )
        for output in (None, *HALVES):
            outputs = output and flat(output, is_aligned)
            call[0] = {"gradient": str(gradient), "output": str(output), "aligned": is_aligned}
            # Three fp32 in, three out
            call[0]["bytes_an_element"] = (
                gradient.itemsize + 6 * 4 + (output.itemsize if output else 0)
            )
            kernels.adamw(
                grads, *fp32, outputs, torch.ones(()), torch.ones(3), 0.9, 0.999, 1e-8, 0.01
            )

    for bits, is_aligned in ((8, True), (16, True), (16, False)):
        call[0] = {"bits": bits, "aligned": is_aligned}
        # Gradient in; weight, and moments of 16 bits, in and out: codes move 8 bytes at a time
        call[0]["bytes_an_element"] = 3 * 2 + (4 * 2 if bits == 16 else 0)
        kernels.adamw_low(held(bits, 512 if bits == 8 else 160 if is_aligned else 163), *NUMBERS)

    # OPT's vocabulary, and one that no row of which begins where 16 bytes do; targets behind the
    # first of a packed batch, and others.
    for dtype, columns, first in itertools.product(FLOATS, (50272, 1003), (0, 1)):
        call[0] = {"logits": str(dtype), "columns": columns, "first target": first}
        kernels.cross_entropy(
            torch.zeros(4, columns, dtype=dtype),
            torch.zeros(5, dtype=torch.int64)[first:][:4],
            torch.zeros(4),
            -100,
        )
    # The same split over two processes, and over four
    for dtype, (columns, processes) in itertools.product(FLOATS, ((25136, 2), (251, 4))):
        call[0] = {"logits": str(dtype), "columns": columns, "processes": processes}
        logits, targets = torch.zeros(4, columns, dtype=dtype), torch.zeros(5, dtype=torch.int64)
        parts = torch.zeros(processes, 3, 4)
        kernels.part_of_rows(logits, targets[1:], parts[0], columns)
        kernels.cross_entropy_of_parts(logits, targets[1:], parts, torch.zeros(4), columns, -100)

    for dtype, (longest, head_dim) in itertools.product(HALVES, short_attention_sizes()):
        call[0] = {"qkv": str(dtype), "longest": longest, "head_dim": head_dim}
        qkv = torch.zeros(longest, 3, 2, head_dim, dtype=dtype, requires_grad=True)
        kernels.ShortAttention.apply(
            qkv, torch.tensor([0, longest], dtype=torch.int32), longest
        ).sum().backward()

    call_residual(call)
    if gpu.capability >= 89:
        call_quantize(call)


def call_residual(call) -> None:
    """Widths of a power of 2 and others, the narrowest and the widest; dropped or not, trained or
    frozen, both places of the norm."""
    seeds = torch.zeros(2, dtype=torch.int64)
    for dtype, columns in zip((*HALVES, HALVES[0]), (768, 64, 8192), strict=True):
        x, by, of_row = (
            torch.zeros(*size, dtype=dtype) for size in ((4, columns), (columns,), (4,))
        )
        of_row = of_row.float()
        for threshold, is_total, is_trained in ((6554, True, True), (0, False, False)):
            call[0] = {"hidden states": str(dtype), "columns": columns, "dropped": threshold}
            given = seeds, 1, threshold
            residual_kernels.add_norm(x, x, by, by, 1e-5, *given)
            rest = is_total, is_trained
            residual_kernels.add_norm_backward(x, x, x, of_row, of_row, by, *given, *rest)
        residual_kernels.add(x, x, seeds, 1, 6554)
        residual_kernels.add(x, None, seeds, 1, 6554)


def call_quantize(call) -> None:
    """As float8 does: factors of forward, weights in fp32 too, and gradients of outputs."""
    for dtype, transposed in itertools.product(FLOATS, (True, False)):
        call[0] = {"matrix": str(dtype), "transposed": transposed}
        kernels.quantize(torch.zeros(48, 32, dtype=dtype), float8.FORWARD, transposed, False)
    for dtype, transposed, summed in itertools.product(HALVES, (True, False), (True, False)):
        call[0] = {"gradient": str(dtype), "transposed": transposed, "summed": summed}
        matrix = torch.zeros(48, 32, dtype=dtype)
        kernels.quantize(matrix, float8.BACKWARD, transposed, summed)


def call_trials(call) -> None:
    """Try kernels as kernel_probe.py does for OPT-350m in bf16, and call them as that run would."""
    bf16, device = torch.bfloat16, torch.device("cpu")
    call[0] = "trial"
    for kernel, *variant in (
        ("update", bf16, bf16),
        ("update_low", 8),
        ("update_low", 16),
        ("loss", bf16, 50272),
        ("loss", bf16, 25136, 2),
        ("attention", bf16, 64, 64),
        ("fp8", bf16, float8.FORWARD),
        ("fp8", bf16, float8.BACKWARD),
        ("residual", bf16, 1024, 0.1, False, True),
    ):
        kernel_probe._TRIALS[kernel](kernels, device, *variant)
    call[0] = "run"
    sizes = (50272 * 16, 1024, 4096)
    grads, outputs = ([torch.zeros(size, dtype=bf16) for size in sizes] for _ in range(2))
    fp32 = [[torch.zeros(size) for size in sizes] for _ in range(3)]
    kernels.adamw(grads, *fp32, outputs, torch.ones(()), torch.ones(3), 0.9, 0.999, 1e-8, 0.01)
    for bits in (8, 16):
        kernels.adamw_low(held(bits, 50272 * 16), *NUMBERS)
    kernels.cross_entropy(
        torch.zeros(1024, 50272, dtype=bf16),
        torch.zeros(1025, dtype=torch.int64)[1:],
        torch.zeros(1024),
        -100,
    )
    logits, targets = torch.zeros(2048, 25136, dtype=bf16), torch.zeros(2049, dtype=torch.int64)
    parts, losses = torch.zeros(2, 3, 2048), torch.zeros(2049)
    kernels.part_of_rows(logits, targets[1:], parts[1], 25136)
    kernels.cross_entropy_of_parts(logits, targets[1:], parts, losses[1:], 25136, -100)
    qkv = torch.zeros(1000, 3, 16, 64, dtype=bf16, requires_grad=True)
    kernels.ShortAttention.apply(
        qkv, torch.arange(0, 1001, 50, dtype=torch.int32), 64
    ).sum().backward()
    matrix = torch.zeros(1024, 4096, dtype=bf16)
    kernels.quantize(matrix, float8.FORWARD, True, False)
    kernels.quantize(matrix, float8.BACKWARD, True, True)
    x, by, of_row = matrix[:, :1024].contiguous(), matrix[0, :1024], torch.zeros(1024)
    seeds = torch.zeros(2, 2, dtype=torch.int64)[1]
    residual_kernels.add_norm(x, x, by, by, 1e-5, seeds, 0, 6554)
    for grad in (x, None):
        given = x, of_row, of_row, by, seeds, 0, 6554, False, True
        residual_kernels.add_norm_backward(grad, x, *given)


if __name__ == "__main__":
    gpu, call = AbsentGPU(), [None]
    driver.set_active(gpu)
    JITFunction.run = compile_only(JITFunction.run, gpu, call)
    print(json.dumps({"triton": triton.__version__}))
    for gpu.device, gpu.capability in enumerate(map(int, sys.argv[1:])):
        call_all(call)
    gpu.device = -1  # where nothing has been built yet
    call_trials(call)
