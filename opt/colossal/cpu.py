"""Lets every plugin run on a host without a GPU (ColossalAI 0.5.0 supports CUDA and Ascend only).

ColossalAI stops on a CPU for small reasons, each named below; nothing here is touched on a CUDA
host. What says that a patch can go: docs/workarounds.md.
"""

from contextlib import nullcontext

import torch
from colossalai.accelerator import CpuAccelerator, set_accelerator


class _NoStream:
    """A CPU computes in order: there is nothing to wait for."""

    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass


class _NoEvent(_NoStream):
    def record(self, stream=None):
        pass

    def wait(self, stream=None):
        pass


class CpuDevice(CpuAccelerator):
    """[F5] CpuAccelerator raises "not supported" for streams, events, seeds and synchronisation,
    which all plugins ask for."""

    support_set_device = False

    def synchronize(self, device=None):
        pass

    def current_stream(self, device=None):
        return _NoStream()

    default_stream = current_stream

    def Stream(self, device=None, priority=0, **kwargs):
        return _NoStream()

    def Event(self, enable_timing=False, blocking=False, interprocess=False):
        return _NoEvent()

    def stream(self, stream_):
        return nullcontext()

    def set_to_device(self, models):
        return models

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_rng_state(self, device=None):
        # [F6] CpuAccelerator passes the device on, which torch.get_rng_state does not take
        return torch.get_rng_state()

    def device_count(self):
        return 1  # more than none: the loss scaler of fp16 asks

    def empty_cache(self):
        pass

    def memory_allocated(self, device=None):
        return 0


def use_cpu() -> None:
    """Make ColossalAI compute on this host's CPU."""
    set_accelerator(CpuDevice())
    _zero_on_cpu()
    _pipeline_over_gloo()
    _gemini_without_offload()


def _zero_on_cpu() -> None:
    """[F7] LowLevelZeroOptimizer._sanity_checks asserts that the accelerator is named cuda or
    npu."""
    from colossalai.zero.low_level import LowLevelZeroOptimizer

    def same_dtype(self):
        for group in self.optim.param_groups:
            for p in group["params"]:
                assert p.dtype == self._dtype, (
                    f"parameters of one dtype are expected: {self._dtype}, got {p.dtype}"
                )

    LowLevelZeroOptimizer._sanity_checks = same_dtype


def _pipeline_over_gloo() -> None:
    """[F8] p2p compares a gloo group's name with Backend.HCCL, which only Ascend builds of PyTorch
    have."""
    from colossalai.pipeline import p2p

    p2p._check_for_nccl_hccl_backend = lambda group: False


def _gemini_without_offload() -> None:
    """[F9] Gemini moves chunks between "cuda" and "cpu" and tells the two by the accelerator's
    name, here the same for both.

    A host without a GPU has one kind of memory: every chunk stays where it is, on what Gemini takes
    for the device.
    """
    from colossalai.zero.gemini.chunk import Chunk, ChunkManager

    class DeviceMemory:
        type = "cuda"

    create = Chunk.__init__

    def on_device(self, *args, **kwargs):
        create(self, *args, **kwargs)
        self.shard_device = DeviceMemory()

    Chunk.__init__ = on_device
    Chunk.device_type = property(lambda self: DeviceMemory.type)
    ChunkManager.move_chunk = lambda self, chunk, device, force_copy=False, async_move=False: None
