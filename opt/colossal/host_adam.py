"""Adam in host memory, of some chunks or of all: fp32 weights and moments, 12 bytes a parameter and
no more; with --optim adamw_anyprecision both in bf16, 6 bytes.

What is on the device stays there: 16-bit weights, and the gradients, which take their place until
the update or have chunks of their own. On the way to Adam and back they pass through a few pinned
buffers; nothing else is pinned, and nothing is there twice. [C30] ColossalAI's own offload has
pinned copies of the 16-bit chunks as well, each pinned tensor takes up the next power of two, and a
step goes through them in turn: the host waits for each gradient, and the device for fp32 weights.

An update is made when forward asks for the chunk's weights. So the host updates a layer while the
device computes the layers before it, and copies go on beside both.
"""

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from colossalai.accelerator import get_accelerator
from colossalai.zero import GeminiDDP
from colossalai.zero.gemini.chunk import Chunk, ChunkManager
from colossalai.zero.gemini.gemini_optimizer import GeminiOptimizer

from opt.colossal import host_kernel
from opt.model.formats import Held

BUFFERS = 4
SLICE = 8 * 2**20  # elements of a chunk that pass through a buffer at once: 16 MiB

_close_chunk, _register_tensor = Chunk.close_chunk, ChunkManager.register_tensor


def register_tensor(dtype: torch.dtype) -> Callable[..., None]:
    """A ChunkManager.register_tensor that keeps what Adam updates in `dtype`, where Gemini has
    fp32, and notes which chunks are of these."""

    def register(self: ChunkManager, tensor: torch.Tensor, group_type: str, **options) -> None:
        is_updated = group_type == "fp32_param"
        if is_updated:
            tensor.data = tensor.data.to(dtype)
        _register_tensor(self, tensor, group_type, **options)
        self.get_chunk(tensor).is_updated = is_updated

    return register


def close_chunk(fraction: float) -> Callable[[Chunk], None]:
    """A Chunk.close_chunk that lets about `fraction` of the elements that Adam updates have their
    chunk in host memory: the first chunks, the last ones, and evenly between them. They have no
    content yet."""
    closed = on_host = 0

    def close(self: Chunk) -> None:
        nonlocal closed, on_host
        _close_chunk(self)
        if not self.is_updated or self.keep_gathered:
            return
        closed += self.utilized_size
        if on_host + self.utilized_size / 2 <= fraction * closed:
            on_host += self.utilized_size
            # Not pinned. All cores make its pages, but for those behind the last parameter, which
            # are never made.
            self.cpu_shard = torch.empty(self.shard_size, dtype=self.dtype, device="cpu")
            self.cpu_shard[: self.valid_end].zero_()
            self.cuda_shard = None
            self.shard_move = lambda *_, **__: None  # it stays

    return close


def is_on_host(chunk: Chunk) -> bool:
    """Whether a chunk that Adam updates is one of these."""
    return chunk.cpu_shard is not None


@dataclass
class _Buffer:
    values: torch.Tensor
    filled: object  # an event, as the accelerator has them
    chunk: Chunk | None = None
    first: int = 0
    end: int = 0


@dataclass
class _Part:
    """An update of one parameter of a chunk."""

    begin: int  # in the chunk's slice of this process
    end: int
    held: Held  # the whole of it
    # divisor, lr, beta1, beta2, eps, weight_decay, step
    numbers: tuple[float, ...]


class HostAdam:
    """Updates the chunks whose part of Adam is in host memory."""

    def __init__(self, model: GeminiDDP, optimizer: GeminiOptimizer):
        manager = model.chunk_manager
        self._adam, self._ranges = optimizer.optim, optimizer.param_to_range
        self._grads_apart = not manager.reuse_fp16_chunk
        chunks = [c for c in optimizer.chunk16_set if is_on_host(c.paired_chunk)]
        self._chunks = {
            key: chunk for key, chunk in optimizer.param_to_chunk16.items() if chunk in chunks
        }
        for key in self._chunks:  # Adam's moments are made where it is
            key.data = torch.empty(0)
        # What 16-bit weights wait for: updates, or, where a step was skipped, to be copied again
        self._due: dict[Chunk, list[_Part]] = {}
        self._slices: deque[tuple[Chunk, int, int]] = deque()
        self._arrivals = {}  # by chunk: when its weights are there
        device = get_accelerator()
        self._stream = device.Stream()
        size, dtype = min(SLICE, max(chunk.shard_size for chunk in chunks)), chunks[0].dtype
        on_gpu = torch.device(device.get_current_device()).type == "cuda"
        # On a CPU all plugins compute alike, to the last bit
        has_kernel = on_gpu and dtype == torch.bfloat16
        self.kernel = host_kernel.load(self._adam.dtype) if has_kernel else None
        self._free = deque(
            _Buffer(torch.empty(size, dtype=dtype, pin_memory=on_gpu), device.Event())
            for _ in range(BUFFERS)
        )
        self._on_the_way: deque[_Buffer] = deque()

        for chunk in chunks:
            chunk.optim_update = lambda chunk=chunk: self._wait(chunk)
        access_chunk = manager.access_chunk

        def access_updated(chunk, async_access=False):
            self.finish(chunk)
            return access_chunk(chunk, async_access)

        manager.access_chunk = access_updated

    def __contains__(self, parameter: torch.Tensor) -> bool:
        """Whether a parameter of HybridAdam's is one of these."""
        return parameter in self._chunks

    def update_later(self, group: dict, parameters: list, divisor: float) -> None:
        """HybridAdam.update_group, of parameters that have been counted: as soon as forward needs
        them."""
        for parameter in parameters:
            numbers = (divisor, group["lr"], *group["betas"], group["eps"], group["weight_decay"])
            numbers += (self._adam.state[parameter]["step"],)
            self._wait(self._chunks[parameter]).append(
                _Part(*self._ranges[parameter], self._adam.held(parameter), numbers)
            )

    def _wait(self, chunk: Chunk) -> list[_Part]:
        """Note that the weights of `chunk` on the device have to follow those on the host."""
        if chunk not in self._due:
            assert not self._slices and not self._on_the_way  # forward goes through all chunks
            self._due[chunk] = []
            # What is to be copied is there, and no longer used, when this stream comes here
            self._stream.wait_stream(get_accelerator().current_stream())
        return self._due[chunk]

    @torch.no_grad()
    def finish(self, chunk: Chunk | None = None) -> None:
        """Update `chunk`, by default all; the current stream goes on with its new weights."""
        if self._due and not self._slices and not self._on_the_way:
            for one in sorted(self._due, key=lambda one: one.count_id):  # as forward needs them
                for first in range(0, max(1, one.valid_end), SLICE):
                    self._slices.append((one, first, min(first + SLICE, one.valid_end)))
        while chunk in self._due if chunk else self._due:
            self._next()
        for arrived in [chunk] if chunk else list(self._arrivals):
            if arrived in self._arrivals:
                self._arrivals.pop(arrived).wait()

    def _next(self) -> None:
        self._fetch()
        buffer = self._on_the_way.popleft()
        chunk, first, end = buffer.chunk, buffer.first, buffer.end
        values = buffer.values[: end - first]
        buffer.filled.synchronize()
        if self._due[chunk]:
            self._update(values, chunk, first)
        else:
            values.copy_(chunk.paired_chunk.cpu_shard[first:end])
        with get_accelerator().stream(self._stream):
            chunk.payload[first:end].copy_(values, non_blocking=True)
            if end == chunk.valid_end:
                del self._due[chunk]
                self._arrivals[chunk] = get_accelerator().Event()
                self._arrivals[chunk].record()
        self._free.append(buffer)

    def _fetch(self) -> None:
        """Send for the gradients of the next slices, as many as there are buffers."""
        while self._slices and self._free:
            buffer = self._free.popleft()
            chunk, first, end = self._slices.popleft()
            buffer.chunk, buffer.first, buffer.end = chunk, first, end
            with get_accelerator().stream(self._stream):
                if self._due[chunk]:
                    grads = chunk.grad_chunk if self._grads_apart else chunk
                    buffer.values[: end - first].copy_(grads.payload[first:end], non_blocking=True)
                buffer.filled.record()
            self._on_the_way.append(buffer)

    def _update(self, values: torch.Tensor, chunk: Chunk, first: int) -> None:
        """Update what of `chunk` is from `first` on, and let the weights take the place of its
        gradients in `values`."""
        by_numbers = defaultdict(list)
        for part in self._due[chunk]:
            begin, end = max(part.begin, first), min(part.end, first + len(values))
            if begin < end:
                held = part.held.part(begin - part.begin, end - part.begin)
                held.grad = values[begin - first : end - first]
                by_numbers[part.numbers].append(held)
        for (divisor, *numbers), parts in by_numbers.items():
            if self.kernel:
                for held in parts:
                    self.kernel(held, divisor, *numbers)
            else:
                self._adam.update_held(parts, divisor, tuple(numbers))
