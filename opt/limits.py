"""What this process may have of the machine: by control groups, versions 1 and 2, a container's, a
Kubernetes pod's or a SLURM job's share of memory and cores; and GPUs.

python -m opt.limits        how many GPUs PyTorch finds, and why none where there should be some
"""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def memory_left(root: Path = _ROOT, own: Path = _OWN) -> list[float]:
    """Bytes that each control group of this process lets it have more."""
    found = []
    for folder, is_first in _groups("memory", root, own):
        limit, usage, cache = "memory.max", "memory.current", "inactive_file"
        if is_first:
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        most = _read(folder / limit)
        if most in ("", "max"):
            continue
        lines_of = (folder / "memory.stat").read_text().splitlines()
        # Pages of files that the kernel lets go of first
        kept_files = int(dict(line.split() for line in lines_of).get(cache, 0))
        found.append(int(most) - int(_read(folder / usage)) + kept_files)
    return found


def cores(root: Path = _ROOT, own: Path = _OWN) -> int:
    """How many this process can keep busy: those that it may run on, and no more than it is given
    the time of (`docker run --cpus`), a part of one counted as one.

    More threads than that are stopped together, in the middle of what they do, until the next
    tenth of a second."""
    most = len(os.sched_getaffinity(0))
    for folder, is_first in _groups("cpu", root, own):
        if is_first:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        else:
            quota, _, period = _read(folder / "cpu.max").partition(" ")
        if quota not in ("", "max", "-1"):
            most = min(most, math.ceil(int(quota) / int(period)))
    return max(1, most)


def _groups(controller: str, root: Path, own: Path) -> Iterator[tuple[Path, bool]]:
    """The folders of the groups that this process is in, its own and those above it, and whether
    they are of version 1."""
    lines = own.read_text().splitlines() if own.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        is_first = controller in controllers.split(",")
        if not is_first and controllers:
            continue
        top = root / controller if is_first else root
        place = top / path.strip("/")
        # A container sees its own group as the root, under another name than the host's
        for folder in (place, *place.parents) if place.is_dir() else (top,):
            if folder.is_relative_to(top):
                yield folder, is_first


def _read(file: Path) -> str:
    """Empty where there is no such limit."""
    return file.read_text().strip() if file.is_file() else ""


def unused_gpus(driver: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Why PyTorch finds no GPU on a machine with NVIDIA's driver; None where it finds one, where
    there is none, and where CUDA_VISIBLE_DEVICES hides all."""
    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    try:
        torch.cuda.init()
        return None
    except (RuntimeError, AssertionError) as error:  # the second from a PyTorch without CUDA
        said = str(error)
    built = f"torch {torch.__version__} is built "
    if found := re.search(r"too old \(found version (\d+)\)", said):
        major, minor = divmod(int(found[1]) // 10, 100)
        return f"the driver is for CUDA {major}.{minor}, {built}for {torch.version.cuda}"
    if found := re.search(r"Error (\d+: [^\n(]+)", said):
        return f"CUDA's error {found[1].strip()}"
    if not driver.is_file():
        return None
    if torch.version.cuda is None:
        return f"{built}without CUDA"
    if "Found no NVIDIA driver" in said:
        return "libcuda.so.1 is not there (a container: docker run --gpus all)"
    return "none is given to this process"


if __name__ == "__main__":
    reason = unused_gpus()
    print(0 if reason else torch.cuda.device_count(), reason or "")
