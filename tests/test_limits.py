"""What control groups leave of the machine, and why there is no GPU."""

import os
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

from opt import limits
from opt.colossal.processes import threads

from .conftest import REPO, SAMPLE_DATA, SAMPLE_MODEL


def test_memory_left(tmp_path):
    """Both versions; the group itself and those above it; what the kernel lets go of first is
    free."""
    second = tmp_path / "v2" / "slice" / "job"
    second.mkdir(parents=True)
    for folder, limit, used in ((second, "max", 5000), (second.parent, "9000", 6000)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text("anon 100\ninactive_file 1500\n")
    own = tmp_path / "cgroup"
    own.write_text("0::/slice/job\n")
    assert limits.memory_left(tmp_path / "v2", own) == [9000 - 6000 + 1500]

    first = tmp_path / "v1" / "memory"
    first.mkdir(parents=True)
    (first / "memory.limit_in_bytes").write_text("8000\n")
    (first / "memory.usage_in_bytes").write_text("7000\n")
    (first / "memory.stat").write_text("total_inactive_file 10\ninactive_file 1\n")
    own.write_text("9:cpu:/\n4:memory:/docker/of-the-host\n0::/\n")
    assert limits.memory_left(tmp_path / "v1", own) == [8000 - 7000 + 10]


@pytest.mark.parametrize(
    ("quotas", "cores"),
    [
        (["max 100000"], 64),
        (["800000 100000"], 8),
        (["150000 100000"], 2),
        (["25000 50000"], 1),
        (["max 100000", "400000 100000"], 4),
        (["400000 100000", "300000 100000"], 3),
        ([], 64),
    ],
)
def test_cores_by_quota(tmp_path, monkeypatch, quotas, cores):
    """A list: a group and those above it."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    own, second, first = tmp_path / "own", tmp_path / "v2", tmp_path / "v1" / "cpu"
    folders = {root: root.joinpath(*"cba"[3 - len(quotas) :]) for root in (second, first)}
    for root, folder in folders.items():
        folder.mkdir(parents=True)
        for quota in quotas:
            (folder / "cpu.max").write_text(quota + "\n")
            limit, period = quota.replace("max", "-1").split()
            (folder / "cpu.cfs_quota_us").write_text(limit + "\n")
            (folder / "cpu.cfs_period_us").write_text(period + "\n")
            folder = folder.parent
        path = folders[root].relative_to(root)
        own.write_text(f"0::/{path}\n" if root == second else f"5:cpuset:/\n1:cpu:/{path}\n")
        assert limits.cores(tmp_path / root.relative_to(tmp_path).parts[0], own) == cores


@pytest.mark.parametrize(
    ("cores", "processes", "device", "each"),
    [
        (2, 1, "cpu", 2),
        (2, 4, "cpu", 1),
        (64, 1, "cpu", 64),
        (64, 1, "cuda", 56),
        (64, 4, "cuda", 14),
        (4, 1, "cuda", 4),
        (1, 2, "cuda", 1),
    ],
)
def test_cores_are_shared_and_beside_a_gpu_some_are_left(cores, processes, device, each):
    assert threads(cores, processes, device) == each


@contextmanager
def one_core():
    """A control group that is given the time of one core; a command that begins in it."""
    top = Path("/sys/fs/cgroup/cpu")
    folder = (top if top.is_dir() else top.parent) / f"opt-{os.getpid()}"
    with ExitStack() as stack:
        try:
            folder.mkdir()
            stack.callback(folder.rmdir)
            if top.is_dir():
                (folder / "cpu.cfs_quota_us").write_text("100000")
            else:
                (folder / "cpu.max").write_text("100000 100000")
        except OSError as error:
            pytest.skip(f"no control group can be made here: {error}")
        yield ["bash", "-c", f'echo $$ > {folder}/cgroup.procs && exec "$@"', "-"]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores, to be given one")
def test_a_container_that_is_given_one_core_computes_with_one(tmp_path):
    flags = ["--model_name_or_path", SAMPLE_MODEL, "--dataset", SAMPLE_DATA, "--dry_run"]
    flags += ["--output_path", tmp_path / "out"]
    command = [sys.executable, "opt_train_demo.py", *map(str, flags)]
    with one_core() as start:
        done = subprocess.run([*start, *command], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"CPU, 1 process on 1 core\b", done.stdout), done.stdout


# ---- no GPU where there should be one

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU, and its driver")
DRIVER = """
int cuInit(unsigned flags) { return INIT; }
int cuDriverGetVersion(int *version) { *version = VERSION; return 0; }
"""


@pytest.fixture
def driver(tmp_path):
    """Builds a libcuda.so.1 that answers so; the environment that has it."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler")

    def build(version: int, init: int) -> dict:
        source = tmp_path / "cuda.c"
        source.write_text(DRIVER)
        command = ["cc", f"-DVERSION={version}", f"-DINIT={init}", "-shared", "-fPIC", source]
        subprocess.run([*command, "-o", tmp_path / "libcuda.so.1"], check=True)
        env = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
        return env | {"LD_LIBRARY_PATH": str(tmp_path)}

    return build


@NO_GPU
@pytest.mark.parametrize(
    ("version", "init", "reason"),
    [
        (11040, 0, f"the driver is for CUDA 11.4, torch {torch.__version__} is built for "),
        (99000, 802, "CUDA's error 802: system not yet initialized"),
        (99000, 100, ""),  # no device, and no driver of the kernel's: a machine without GPUs
    ],
)
def test_a_driver_that_cannot_serve_pytorch_is_told(driver, version, init, reason):
    flags = ["--model_name_or_path", SAMPLE_MODEL, "--dataset", SAMPLE_DATA, "--dry_run"]
    for command in (["-m", "opt.limits"], ["opt_train_demo.py", *map(str, flags)]):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=REPO,
            env=driver(version, init),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        first = done.stdout.splitlines()[0]
        assert reason in first and ("CPU" in first or first.startswith("0 ")), first
        assert "for PyTorch" in first or not reason or "opt.limits" in command
        assert "CUDA initialization" not in done.stderr


@NO_GPU
def test_a_container_without_the_drivers_library(tmp_path, monkeypatch):
    kernels = tmp_path / "version"
    kernels.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.10\n")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "docker run --gpus all" in limits.unused_gpus(kernels)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert limits.unused_gpus(kernels) == f"torch {torch.__version__} is built without CUDA"
    assert limits.unused_gpus(tmp_path / "none") is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert limits.unused_gpus(kernels) is None
