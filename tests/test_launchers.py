"""The README's ways to start two processes: each trains the same. On two GPUs if they are there,
otherwise on the CPU."""

import math
import os
import subprocess
import sys

import pytest
import torch

from .conftest import (
    REPO,
    colossalai_run,
    finish,
    free_port,
    losses,
    metrics,
    on_the_sample,
    start,
    train,
)

FLAGS = [
    "--plugin",
    "low_level_zero",
    "--precision",
    "fp32",
    "--batch_size",
    "4",
    "--dropout",
    "0",
    "--max_train_steps",
    "6",
]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
GPUS = torch.cuda.device_count() > 1


def devices(*numbers) -> dict[str, str]:
    """The environment of processes that are to use these GPUs; and as many threads as torchrun
    gives to each of several."""
    return {
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, numbers)) if GPUS else "",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> list[dict]:
    """What torchrun's two processes on one node record."""
    output = tmp_path_factory.mktemp("torchrun")
    train(output, *FLAGS, nproc=2, env=devices(0, 1))
    assert losses(output)[-1] < losses(output)[0] - 0.01
    return metrics(output)


def runs_of_two_nodes(port):
    """A launcher on each of two nodes, here on one host, which find one another by torchrun's
    rendezvous."""
    launcher = [
        *TORCHRUN,
        "--nnodes",
        "2",
        "--nproc_per_node",
        "1",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        f"127.0.0.1:{port}",
    ]
    return [(launcher, devices(node)) for node in (0, 1)]


def runs_of_colossalai(port):
    way = colossalai_run(2, port)
    return [(way["launcher"], devices(0, 1) | way["env"])]


def without_timing(lines: list[dict]) -> list[dict]:
    """What two runs have in common; the perplexity by its logarithm, or a last digit of the loss
    would be a thousand times as much."""
    kept = [
        {k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")}
        for line in lines
    ]
    return [
        line | {k: math.log(v) for k, v in line.items() if k == "eval_perplexity"} for line in kept
    ]


@pytest.mark.parametrize(
    "way", [runs_of_two_nodes, runs_of_colossalai], ids=["two nodes", "colossalai run"]
)
def test_two_processes_train_the_same(tmp_path, reference, way):
    """Losses, norms and evaluations, but for the last digits: sums over memory that lies elsewhere
    are rounded otherwise."""
    flags = [
        *on_the_sample(tmp_path),
        *FLAGS,
    ]
    started = [
        start(REPO / "opt_train_demo.py", *flags, launcher=launcher, env=env)
        for launcher, env in way(free_port())
    ]
    for done in [finish(process, 180) for process in started]:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found, expected = without_timing(metrics(tmp_path)), without_timing(reference)
    assert found == [pytest.approx(line, abs=1e-4 if GPUS else 1e-5) for line in expected]
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize("connections", [None, "3"])
def test_colossalai_is_imported_without_its_side_effects(connections):
    """Neither bitsandbytes and the compiler, nor one queue on the GPU for all streams."""
    code = (
        "import opt_train_demo, os, sys; print('bitsandbytes' in sys.modules, "
        "os.environ.get('CUDA_DEVICE_MAX_CONNECTIONS'))"
    )
    env = {
        name: value for name, value in os.environ.items() if name != "CUDA_DEVICE_MAX_CONNECTIONS"
    }
    env |= {"CUDA_DEVICE_MAX_CONNECTIONS": connections} if connections else {}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", str(connections)]


SRUN = """#!/bin/sh
export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1 SLURM_NNODES=1
shift
exec "$@"
"""
SCONTROL = """#!/bin/sh
case $1 in show) echo localhost ;; *) echo "$@" >>"$REQUESTS" ;; esac
"""
# Python that has SLURM send its signal where `of` is called first.
SIGNALLED = """#!{python}
import os, runpy, signal, sys, time
sys.path.insert(0, "")
import opt_train_demo
from opt.train import {module}
before = {of}
def signalled(*args, **kwargs):
    {of} = before
    os.kill(os.getppid(), signal.SIGUSR1)
    time.sleep(1)
    return before(*args, **kwargs)
{of} = signalled
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("module", "of", "is_queued"),
    [("checkpoints", "checkpoints.Saver.after", True), ("export", "export.export_model", False)],
    ids=["before the last step", "behind it"],
)
def test_slurm_queues_again_what_is_not_done(tmp_path, module, of, is_queued):
    """Under stand-ins of srun and scontrol; tests/test_slurm.py has the real ones."""
    scripts = {"srun": SRUN, "scontrol": SCONTROL}
    scripts["signalled"] = SIGNALLED.format(python=sys.executable, module=module, of=of)
    for name, text in scripts.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = devices() | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "signalled"}
    env |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n0", "REQUESTS": str(tmp_path / "asked")}
    output = tmp_path / "out"
    flags = (*on_the_sample(output), "--max_train_steps", 3)
    done = finish(start("cluster/slurm.sbatch", *flags, launcher=["bash"], env=env), 90)
    assert done.returncode == 0 and "SIGUSR1" in done.stdout, done.stderr[-4000:]
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == "requeue 7\n" * is_queued
    assert (output / "model.safetensors").is_file() is not is_queued
    assert len(list((output / "checkpoints").glob("step-*"))) == is_queued
