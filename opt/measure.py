"""FLOPs, times, memory, and what they were measured on."""

import os
import platform
import re
import resource
import statistics
import time
from importlib import metadata
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from transformers import OPTConfig

from opt import limits
from opt.model.lora import Lora, matrix_size
from opt.model.sizes import layer_matrices


def flops_per_token(config: OPTConfig, length: int, lora: Lora | None = None) -> float:
    """Floating-point operations of forward and backward for a token in a row of `length`;
    recomputation not counted.

    2 for each multiply-add, and backward twice the forward's: 6 for every weight of a matrix
    product (embedding look-ups are none, the output projection is one); and for the attention
    scores and their product with the values 2 products of `hidden` multiply-adds for each position
    seen, of which a causal row has (length + 1) / 2 on average. As in PaLM (arXiv:2204.02311,
    appendix B), which counts the whole square of attention.

    With `lora` frozen weights have no gradients, which leaves 4 for each, and what comes before the
    first adapter has no backward at all.
    """
    if lora:
        return _flops_with_adapters(config, length, lora)
    hidden, layers = config.hidden_size, config.num_hidden_layers
    weights = layer_matrices(config) + config.vocab_size * config.word_embed_proj_dim
    if config.word_embed_proj_dim != hidden:
        weights += 2 * hidden * config.word_embed_proj_dim
    return 6 * weights + 3 * layers * 2 * 2 * hidden * (length + 1) / 2


def _flops_with_adapters(config: OPTConfig, length: int, lora: Lora) -> float:
    hidden, layers = config.hidden_size, config.num_hidden_layers
    total = 4 * config.vocab_size * config.word_embed_proj_dim
    if config.word_embed_proj_dim != hidden:
        total += (2 + 4) * hidden * config.word_embed_proj_dim  # in, and out
    for is_first in (True, False):
        flops, is_reached = 0.0, not is_first  # whether backward goes on through what comes next
        for block in (("q_proj", "k_proj", "v_proj"), ("out_proj",), ("fc1",), ("fc2",)):
            for target in block:
                inputs, outputs = matrix_size(target, config)
                flops += (2 + 2 * is_reached) * inputs * outputs
                if target in lora.targets:
                    flops += 6 * lora.r * outputs + (4 + 2 * is_reached) * lora.r * inputs
            is_reached = is_reached or any(target in lora.targets for target in block)
            if "q_proj" in block:
                flops += (1 + 2 * is_reached) * 2 * 2 * hidden * (length + 1) / 2
        total += flops if is_first else (layers - 1) * flops
    return total


def matmul_flops(device: torch.device) -> float:
    """The device's measured rate at matrix products, FLOP/s: 8192 x 8192 in bf16 on a GPU, 1024 x
    1024 in fp32 on a CPU.

    The median of ten; random data, since products of zeros run faster.
    """
    on_gpu = device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if on_gpu else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    timer = StepTimer()
    for _ in range(13):
        timer.start()
        a @ b
        timer.stop()
    return 2 * n**3 / statistics.median(timer.seconds()[3:])


def mark() -> torch.cuda.Event | float:
    """Now, on the device: a CUDA event, or the clock on a CPU, which computes in order. The host
    may be many steps ahead."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start, stop) -> float:
    """From one mark to a later one; waits for the device to come by."""
    if isinstance(start, float):
        return stop - start
    stop.synchronize()
    return start.elapsed_time(stop) / 1000


class StepTimer:
    """Times stretches of work on the device."""

    def __init__(self):
        self._marks = []

    def start(self) -> None:
        self._marks.append([mark()])

    def stop(self) -> None:
        self._marks[-1].append(mark())

    def seconds(self) -> list[float]:
        """The length of each stretch; waits for the device."""
        return [seconds_between(*marks) for marks in self._marks]


def peak_memory(device: torch.device) -> dict[str, int]:
    """Highest use so far, bytes, the largest of all processes: on the device (0 on a CPU host) and
    in host memory, that of the process itself. Its compile workers are not in it: forked, they
    share nearly all that they show (4 MB of 282 are a worker's own, torch 2.5 on a CPU)."""
    on_gpu = device.type == "cuda"
    peaks = torch.tensor(
        [
            torch.cuda.max_memory_allocated(device) if on_gpu else 0,
            torch.cuda.max_memory_reserved(device) if on_gpu else 0,
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux counts in KiB
        ],
        device=device,
    )
    dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
    allocated, reserved, host = peaks.tolist()
    return {
        "peak_memory_allocated_bytes": allocated,
        "peak_memory_reserved_bytes": reserved,
        "peak_host_memory_bytes": host,
    }


def seconds_since_launch() -> float:
    """Seconds since this run was started: since torchrun's start if that started this process, else
    since its own."""
    process = psutil.Process()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        process = process.parent()
    return time.time() - process.create_time()


def device_name(device: torch.device) -> str:
    """What the device is called by its maker."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    models = (
        re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        if os.path.exists("/proc/cpuinfo")
        else []
    )
    cores = limits.cores()
    return f"CPU {models[0] if models else platform.machine()}, {cores} core{'s' * (cores > 1)}"


def memory_limit(device: torch.device) -> int:
    """Bytes that the device has; on a CPU host, its memory."""
    return (
        torch.cuda.get_device_properties(device).total_memory
        if device.type == "cuda"
        else psutil.virtual_memory().total
    )


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {name: metadata.version(name) for name in ("torch", "colossalai", "transformers")}
    return found | {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}
