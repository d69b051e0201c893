"""What the tests share: starting the scripts as a user does, and small models with known
weights."""

import atexit
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from args import train_parser
from opt.data import tokens
from opt.data.rows import ROW, Dataset, Rows, open_dataset

REPO = Path(__file__).resolve().parent.parent
# Where a script starts pytest in the background SIGINT is ignored, by all that pytest starts too
signal.signal(signal.SIGINT, signal.default_int_handler)


def _from_scratch() -> Path:
    """The sample's model without its weights: what these tests compare starts anew."""
    # Not in /tmp: the hosts of tests/hosts.py have their own
    (REPO / ".pytest_cache").mkdir(exist_ok=True)
    folder = tempfile.mkdtemp(prefix="opt-tiny-", dir=REPO / ".pytest_cache")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    without = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(REPO / "sample" / "opt-tiny", f"{folder}/opt-tiny", ignore=without))


SAMPLE_MODEL = _from_scratch()
SAMPLE_DATA = REPO / "sample" / "netflix_sample.csv"


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(
                pytest.mark.skip(reason="needs a CUDA device, and this machine has none")
            )


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Tokens that an earlier run cached must not hide an error."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


def start(script, *arguments, nproc=None, env=None, launcher=None, **streams) -> subprocess.Popen:
    """Start a script of the project: by python, by torchrun with `nproc` processes, or by another
    `launcher`."""
    launcher = list(launcher or [sys.executable])
    if nproc:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc)]
    command = [*launcher, str(script), *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | streams
    return subprocess.Popen(command, cwd=REPO, env=os.environ | (env or {}), **streams)


def colossalai_run(nproc: int, port: int) -> dict:
    """What start() is to be given for `colossalai run`: its launcher and environment."""
    launcher = [
        sys.executable,
        "-c",
        "from colossalai.cli import cli; cli()",
        "run",
        "--nproc_per_node",
        str(nproc),
    ]
    # Its launcher calls `torchrun`, by its name.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {"launcher": [*launcher, "--master_port", str(port)], "env": {"PATH": path}}


def finish(process: subprocess.Popen, timeout) -> subprocess.CompletedProcess:
    """Wait for a process of start(); after `timeout` seconds end it, with all that it has started,
    and fail with its output."""
    try:
        out, err = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)
    except subprocess.TimeoutExpired:
        kill_all(process)
        out, err = process.communicate()
        pytest.fail(f"not done after {timeout} s: {process.args}\n{out[-2000:]}\n{err[-4000:]}")


def finish_measured(process: subprocess.Popen, field: str, timeout):
    """finish(), and the largest that a field of the process's /proc/PID/status was, in bytes."""
    seen = [0]

    def watch():
        while process.poll() is None:
            try:
                text = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:  # over by now
                return
            seen.append(1024 * int((re.findall(rf"{field}:\s+(\d+)", text) or [0])[0]))
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    done = finish(process, timeout)
    watcher.join()
    return done, max(seen)


def run(script, *arguments, nproc=None, env=None, timeout=180):
    """start() and finish(). Returns the CompletedProcess, with stdout and stderr as text."""
    return finish(start(script, *arguments, nproc=nproc, env=env), timeout)


def free_port() -> int:
    """A TCP port that nothing on this host listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def kill_all(process: subprocess.Popen) -> None:
    """End a process and its descendants: torchrun's workers have sessions of their own, no signal
    to a group reaches them."""
    if process.poll() is None:
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for member in family:
            if member.is_running():
                member.kill()
        process.wait()
        psutil.wait_procs(family)


def pretend(folder: Path, *packages: str) -> dict:
    """The environment in which these distributions, "name version [requirement]" each, are found
    before those that are there."""
    for package in packages:
        name, version, *needs = package.split()
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        needs = "".join(f"Requires-Dist: {need}\n" for need in needs)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"
        )
    return {"PYTHONPATH": str(folder)}


def workers(launcher: subprocess.Popen, script: str) -> list[psutil.Process]:
    """The processes that run `script` under a launcher, by rank."""
    found = {}
    for process in psutil.Process(launcher.pid).children(recursive=True):
        try:
            if any(part.endswith(script) for part in process.cmdline()[1:3]):
                found[int(process.environ().get("RANK", 0))] = process
        except psutil.Error:  # over by now
            pass
    return [found[rank] for rank in sorted(found)]


def on_the_sample(output) -> tuple:
    """The flags of opt_train_demo.py that a run on the sample needs."""
    flags = ("--model_name_or_path", SAMPLE_MODEL, "--dataset", SAMPLE_DATA)
    return (*flags, "--output_path", output)


def train(output, *arguments, script=REPO / "opt_train_demo.py", nproc=None, env=None, timeout=180):
    """Run opt_train_demo.py, or a `script` like it, on the sample, writing to `output`; fail with
    its own words if it fails."""
    given = on_the_sample(output)
    flags = [
        part
        for flag, value in zip(given[::2], given[1::2], strict=True)
        if flag not in arguments
        for part in (flag, value)
    ]
    done = run(script, *flags, *arguments, nproc=nproc, env=env, timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def like_the_sample(folder: Path, **config) -> Path:
    """The sample's model, without weights, with another configuration."""
    shutil.copytree(SAMPLE_MODEL, folder)
    config = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def wide_model(folder: Path) -> tuple[Path, int]:
    """The configuration of a model of 65 M parameters, beside which activations are nothing, with
    the sample's tokenizer; and how many they are."""
    sizes = {"hidden_size": 1024, "word_embed_proj_dim": 1024, "ffn_dim": 4096}
    sizes |= {"num_hidden_layers": 5, "num_attention_heads": 16, "max_position_embeddings": 20}
    like_the_sample(folder, **sizes)
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    number = 5 * (12 * 1024**2 + 13 * 1024) + 1024 * (vocab_size + 20 + 4)
    return folder, number


def tokenize(dataset, column, max_length, eval_fraction, seed, tokenizer, *flags) -> Dataset:
    """What opt_train_demo.py makes of a data set before it trains."""
    given = ["--dataset", *(dataset if isinstance(dataset, list) else [dataset])]
    given += ["--text_column", column] if column else []
    given += ["--max_length", max_length, "--eval_fraction", eval_fraction, "--seed", seed, *flags]
    plan = train_parser().parse_args(list(map(str, given)))
    return open_dataset(tokens.tokenize(plan, tokenizer))


def stored(lengths: list[int], directory: Path, values=None, contexts=None) -> Rows:
    """Rows of these lengths in the files that Rows maps: of `values`, or each of its own tokens: row
    i holds 10 + i."""
    directory = Path(directory)
    if values is None:
        values = np.repeat(np.arange(len(lengths)) + 10, lengths)
    np.asarray(values, np.int32).tofile(directory / "train.tokens")
    lengths = list(map(int, lengths))
    ends = np.cumsum(lengths)
    rows = zip(ends - lengths, lengths, contexts or [1] * len(lengths), strict=True)
    np.array(list(rows), ROW).tofile(directory / "train.rows")
    facts = {"shortest": min(lengths), "longest": max(lengths), "tokens": int(ends[-1])}
    facts = {"splits": {"train": facts | {"checksum": "0"}}}
    (directory / "counts.json").write_text(json.dumps(facts))
    return Rows(directory, "train")


def metrics(output) -> list[dict]:
    """The lines of a run's metrics.jsonl; of a run that still writes those that are whole."""
    whole, _, _ = (Path(output) / "metrics.jsonl").read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def losses(output) -> list[float]:
    """The training loss of each step."""
    return [line["loss"] for line in metrics(output) if "loss" in line]
