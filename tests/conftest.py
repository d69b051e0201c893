"""What the tests share: starting the scripts as a user does, and small models with known weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parent.parent
SAMPLE_MODEL = REPO / "sample" / "opt-tiny"
SAMPLE_DATA = REPO / "sample" / "netflix_sample.csv"


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and this machine has none"))


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Tokens that an earlier run cached must not hide an error."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


def run(script, *arguments, nproc=None, env=None, timeout=180):
    """Run a script of the project: by python, or by torchrun with `nproc` processes. Returns the CompletedProcess, with
    stdout and stderr as text."""
    launcher = [sys.executable]
    if nproc:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc)]
    command = [*launcher, str(script), *map(str, arguments)]
    return subprocess.run(command, cwd=REPO, env=os.environ | (env or {}), capture_output=True, text=True, timeout=timeout)


def train(output, *arguments, nproc=None, env=None, timeout=180):
    """Run opt_train_demo.py on the sample, writing to `output`; fail with its own words if it fails."""
    given = {"--model_name_or_path": SAMPLE_MODEL, "--dataset": SAMPLE_DATA, "--output_path": output}
    flags = [part for flag, value in given.items() if flag not in arguments for part in (flag, value)]
    done = run(REPO / "opt_train_demo.py", *flags, *arguments, nproc=nproc, env=env, timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def metrics(output) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]


def losses(output) -> list[float]:
    """The training loss of each step."""
    return [line["loss"] for line in metrics(output) if "loss" in line]
