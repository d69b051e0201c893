"""What control groups leave of the machine."""

import os
import re
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

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
