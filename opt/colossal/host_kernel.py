"""AdamW on the host's cores in one pass over memory, in C, built when it is first asked for (half a
second; Triton needs the same compiler).

[C35] PyTorch's own on a CPU wants gradients in fp32, and is three operations a piece that each wait
for all cores.
"""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

_SOURCE = r"""
#include <math.h>
#include <stdint.h>

typedef union { float value; uint32_t bits; } word;

/* `values`: bf16 gradients, in whose place come the updated weights, rounded to nearest even. */
void adamw(uint16_t *restrict values, float *restrict weights, float *restrict exp_avgs,
           float *restrict exp_avg_sqs, int64_t size, float divisor, float rate, float beta1,
           float beta2, float eps, float decay, float correction1, float correction2, int threads)
{
    float kept = 1.0f - rate * decay, step = rate / correction1, root = sqrtf(correction2);
    #pragma omp parallel for simd schedule(static) num_threads(threads) if (size > 65536)
    for (int64_t i = 0; i < size; i++) {
        word grad = {.bits = (uint32_t)values[i] << 16};
        float g = grad.value / divisor;
        float m = exp_avgs[i] + (1.0f - beta1) * (g - exp_avgs[i]);
        float v = beta2 * exp_avg_sqs[i] + (1.0f - beta2) * g * g;
        word weight = {.value = kept * weights[i] - step * m / (sqrtf(v) / root + eps)};
        exp_avgs[i] = m;
        exp_avg_sqs[i] = v;
        weights[i] = weight.value;
        uint32_t rounded = (weight.bits + 0x7fff + ((weight.bits >> 16) & 1)) >> 16;
        values[i] = weight.value == weight.value ? rounded : 0x7fc0;
    }
}
"""
_FLAGS = "-O3 -march=native -fno-math-errno -fno-trapping-math -fopenmp -shared -fPIC".split()


@functools.cache
def load() -> Callable[..., None] | None:
    """adamw(values, weights, exp_avg, exp_avg_sq, divisor, lr, beta1, beta2, eps, weight_decay,
    step), of contiguous tensors of as many elements, the first in bf16, the others in fp32; None
    where it cannot be built, of which a line tells."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "adamw.c"), Path(folder, "adamw.so")
        source.write_text(_SOURCE)
        try:
            if compiler is None:
                raise OSError("no C compiler")
            command = [compiler, *_FLAGS, str(source), "-o", str(library), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            function = ctypes.CDLL(str(library)).adamw
        except (OSError, subprocess.CalledProcessError) as error:
            reason = (str(getattr(error, "stderr", "")) or str(error)).strip().splitlines()[-1]
            print(
                f"  kernels   PyTorch's own operations for Adam on the host, slower: {reason:.200}",
                flush=True,
            )
            return None
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] + [ctypes.c_float] * 8
    function.argtypes += [ctypes.c_int]
    function.restype = None

    def adamw(
        values, weights, exp_avg, exp_avg_sq, divisor, lr, beta1, beta2, eps, weight_decay, step
    ):
        function(
            *(tensor.data_ptr() for tensor in (values, weights, exp_avg, exp_avg_sq)),
            *(values.numel(), divisor, lr, beta1, beta2, eps, weight_decay),
            *(1 - beta1**step, 1 - beta2**step, torch.get_num_threads()),
        )

    return adamw
