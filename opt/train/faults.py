"""What goes wrong while it runs, told in a line: out of memory, a process that is lost or silent, a
bug on one of many ranks."""

import errno
import os
import re
import shutil
import signal
import sys
import traceback
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from tqdm import tqdm

from opt.colossal import processes
from opt.errors import UserError, say_once

OUT_OF_MEMORY = 3  # exit code: a size that does not fit, not a failure


@contextmanager
def reported(flags: Namespace) -> Iterator[None]:
    """End the process, and by that the run, if the body raises: exit code 2 for a UserError, 3 for
    memory, 130 for Ctrl-C where there is nothing to save, 1 for the rest.

    The others learn of it by their connections to this process, which close: they end with a line
    that says so.
    """
    try:
        yield
    except UserError as error:
        _end(f"error: {error}", error.code)
    except KeyboardInterrupt:
        _end("SIGINT: stopped at once", 128 + signal.SIGINT)
    except Exception as error:
        if is_out_of_memory(error):
            _end(f"out of memory ({_first_line(error)}); {memory_advice(flags)}", OUT_OF_MEMORY)
        if own := nccl_error(error):
            _end(f"error: {own}", 1)
        if any(why in str(error) for why in _FULL):
            # [F44] Safetensors has an exception of its own for it
            _end(
                f"error: the disk is full ({_first_line(error)}): make room, or choose another "
                "place; what is complete there stays so",
                1,
            )
        if lost := lost_process(error, flags.timeout_minutes):
            _end(f"error: {lost}", 1)
        traceback.print_exc()
        where = f" on rank {dist.get_rank()} of {dist.get_world_size()}" if _several() else ""
        _end(f"failed{where}: {type(error).__name__}: {_first_line(error)} (traceback above)", 1)


_FULL = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)))


def _end(line: str, code: int) -> None:
    for bar in list(tqdm._instances):
        bar.close()  # it would hold the cursor in its own line
    say_once(line)
    if not _several():
        raise SystemExit(code)
    processes.leave_word()
    # [F38] At once: the interpreter's own end waits for the process group's threads, which wait for
    # processes that may be gone.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _first_line(error: Exception) -> str:
    """Of NCCL's that of what it says itself."""
    text = str(error).strip()
    own = re.search(_NCCLS, text)
    return own[1] if own else text.split("\n")[0]


_NCCLS = r"Last error: *\n([^\n]+)"


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that the device or the host has no memory left."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    # [F33] PyTorch's allocator for host memory raises a bare RuntimeError; NCCL's own buffers.
    marks = "DefaultCPUAllocator: can't allocate memory|Cuda failure (\\d+ )?'out of memory'"
    return re.search(marks, str(error)) is not None


def memory_advice(flags: Namespace) -> str:
    """Which flags would lower the memory that a run takes, of those that it does not have
    already."""
    advice = []
    if not flags.grad_checkpoint:
        advice.append("--grad_checkpoint")
    if flags.batch_size > 1:
        advice.append(
            f"--batch_size under {flags.batch_size} with more --gradient_accumulation_steps"
        )
    if not flags.fused_loss:
        advice.append("--fused_loss")
    if torch.cuda.is_available() and flags.offload_optim_frac != 1:
        advice.append("--plugin gemini --offload_optim_frac 1")
    return (
        f"try {', or '.join(advice)}"
        if advice
        else "use more processes, shorter rows or a smaller model"
    )


def nccl_error(error: Exception) -> str | None:
    """What NCCL says that this process cannot do, whatever the others do; None if the error is
    another one, or one of connections, at whose other end a process may be lost."""
    own = re.search(_NCCLS, str(error))
    if not isinstance(error, dist.DistError) or not own:
        return None
    said = own[1]
    if "/dev/shm" in said:
        free = shutil.disk_usage("/dev/shm").free / 1e6
        return (
            f"NCCL has no room between the GPUs of a node: {free:.0f} MB are free in /dev/shm. "
            "Start the container with --shm-size=1g or --ipc=host (Kubernetes: an emptyDir of "
            "medium Memory there), or set NCCL_SHM_DISABLE=1, which is slower"
        )
    connection = "connect|remote|(?<!no )socket|broken pipe"
    if "ncclRemoteError" in str(error) or re.search(connection, said, re.IGNORECASE):
        return None
    return f"NCCL: {said}; NCCL_DEBUG=INFO tells more"


def lost_process(error: Exception, timeout_minutes: float) -> str | None:
    """What a failed collective says about the other processes, in words; None if the error is
    another one.

    [F34] gloo, and the store at times, raise bare RuntimeErrors, NCCL subclasses of dist.DistError.
    """
    text = str(error)
    # The second is gloo's too, without its name: the same pair is asked again after it timed out.
    marks = ("gloo", "Application timeout caused pair closure", "Connection closed by peer")
    marks += ("EADDRINUSE",)
    if not isinstance(error, dist.DistError) and not (
        isinstance(error, RuntimeError) and any(mark in text for mark in marks)
    ):
        return None
    if "EADDRINUSE" in text:
        return (
            f"the port {os.environ['MASTER_PORT']} is in use: another run has it; choose "
            "another (--master_port)"
        )
    if silent := processes.silent_nodes():
        return f"another process was lost: {silent}"
    if "imed out" in text or "timeout" in text.lower():
        return (
            f"another process did not answer for {timeout_minutes:g} minutes (--timeout_minutes): "
            "it hangs, or was not started, or is "
            "busy with work that takes longer (then raise --timeout_minutes)"
        )
    if killed := processes.killed_processes():
        return f"another process was lost: {killed}"
    return (
        f"another process was lost ({_first_line(error)[-80:]}): the reason stands above, or on "
        "its node"
    )
