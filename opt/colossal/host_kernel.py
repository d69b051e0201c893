"""AdamW on the host's cores in one pass over memory, in C, in fp32 or, with --optim, in bf16 that
is rounded stochastically; built when it is first asked for (half a second; Triton needs the same
compiler).

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

from opt.model import low_bits
from opt.model.formats import Held

_SOURCE = r"""
#include <math.h>
#include <stdint.h>

#define BLOCK 16384 /* elements */

typedef union { float value; uint32_t bits; } word;

static inline float widened(uint16_t number)
{
    word wide = {.bits = (uint32_t)number << 16};
    return wide.value;
}

/* To bf16: of `more`, 16 bits, half and a little makes it the nearest, random ones stochastic. */
static inline uint16_t narrowed(float number, uint32_t more)
{
    word wide = {.value = number};
    return number == number ? (wide.bits + more) >> 16 : 0x7fc0;
}

static inline uint16_t nearest_even(float number)
{
    word wide = {.value = number};
    return narrowed(number, 0x7fff + ((wide.bits >> 16) & 1));
}

/* As low_bits._mixed */
static inline uint32_t mixed(uint32_t number)
{
    number = (number ^ number >> 16) * 0x85EBCA6B;
    number = (number ^ number >> 13) * 0xC2B2AE35;
    return number ^ number >> 16;
}

#if BITS == 16
typedef uint16_t kept;
#define TAKE(number) widened(number)
#define KEEP(number, random) narrowed(number, random)
#else
typedef float kept;
#define TAKE(number) (number)
#define KEEP(number, random) (number)
#endif

/* `values`: bf16 gradients, in whose place come the updated weights. In bf16 all that is kept is
   rounded by `key` and its place, as by low_bits._update; fp32 weights to the nearest, for
   `values`. */
void adamw(uint16_t *restrict values, kept *restrict weights, kept *restrict exp_avgs,
           kept *restrict exp_avg_sqs, int64_t size, double divisor, double rate, double beta1,
           double beta2, double eps, double decay, double correction1, double correction2,
           uint32_t key, int threads)
{
    float divide_by = divisor, left = 1 - rate * decay, step = rate / correction1;
    float root = sqrt(correction2), least = eps, new1 = 1 - beta1, old2 = beta2, new2 = 1 - beta2;
    /* Not in equal shares: a core that has other work would hold up the rest */
    #pragma omp parallel for schedule(dynamic) num_threads(threads) if (size > 65536)
    for (int64_t first = 0; first < size; first += BLOCK) {
        int64_t end = first + BLOCK < size ? first + BLOCK : size;
        #pragma omp simd
        for (int64_t i = first; i < end; i++) {
            float g = widened(values[i]) / divide_by;
            float m = TAKE(exp_avgs[i]), v = old2 * TAKE(exp_avg_sqs[i]) + new2 * g * g;
            m += new1 * (g - m);
            float weight = left * TAKE(weights[i]) - step * m / (sqrtf(v) / root + least);
            uint32_t random = mixed((uint32_t)i + key), other = random * 0x9E3779B1;
            kept rounded = KEEP(weight, random & 0xffff);
            exp_avgs[i] = KEEP(m, other >> 16);
            exp_avg_sqs[i] = KEEP(v, random >> 16);
            weights[i] = rounded;
            values[i] = nearest_even(TAKE(rounded));
        }
    }
}
"""
# From here on the memory's rate decides: 0.20 ns a parameter on 16 cores, 0.17 on 24 and on 48
_MOST_THREADS = 24
_FLAGS = "-O3 -march=native -fno-math-errno -fno-trapping-math -fopenmp -shared -fPIC".split()


@functools.cache
def load(dtype: torch.dtype) -> Callable[..., None] | None:
    """adamw(held, divisor, lr, beta1, beta2, eps, weight_decay, step), of a Held with a gradient in
    bf16, and weights and moments in `dtype`, fp32 or bf16: in the gradient's place come the updated
    weights in bf16. None where it cannot be built, of which a line tells."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "adamw.c"), Path(folder, "adamw.so")
        source.write_text(_SOURCE)
        try:
            if compiler is None:
                raise OSError("no C compiler")
            flags = [*_FLAGS, f"-DBITS={dtype.itemsize * 8}"]
            command = [compiler, *flags, str(source), "-o", str(library), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            function = ctypes.CDLL(str(library)).adamw
        except (OSError, subprocess.CalledProcessError) as error:
            reason = (str(getattr(error, "stderr", "")) or str(error)).strip().splitlines()[-1]
            print(
                f"  kernels   PyTorch's own operations for Adam on the host, slower: {reason:.200}",
                flush=True,
            )
            return None
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] + [ctypes.c_double] * 8
    function.argtypes += [ctypes.c_uint32, ctypes.c_int]
    function.restype = None

    def adamw(held: Held, divisor, lr, beta1, beta2, eps, weight_decay, step):
        tensors = held.grad, held.weight, held.exp_avg, held.exp_avg_sq
        key = low_bits.rounding_key(held.seed, step) + held.start
        threads = min(_MOST_THREADS, torch.get_num_threads())
        function(
            *(tensor.data_ptr() for tensor in tensors),
            *(held.grad.numel(), divisor, lr, beta1, beta2, eps, weight_decay),
            *(1 - beta1**step, 1 - beta2**step, key & 0xFFFFFFFF, threads),
        )

    return adamw
