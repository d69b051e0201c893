"""run_demo.sh as a newcomer runs it, on a machine without a GPU and without the Hub."""

import math
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .conftest import REPO, metrics, pretend, workers

# Nothing listens there: the Hub is out of reach at once. Without CUDA devices the script takes the
# CPU's way anywhere.
NO_HUB = {
    "HF_ENDPOINT": "http://127.0.0.1:9",
    "CUDA_VISIBLE_DEVICES": "",
    "INSTALL": "0",
    "PYTHON": sys.executable,
}


def run_demo(*arguments, cores: set[int] | None = None, script=REPO / "run_demo.sh", **env):
    command = ["bash", str(script), *arguments]
    return subprocess.run(
        command,
        env=os.environ | NO_HUB | env,
        capture_output=True,
        text=True,
        timeout=400,
        preexec_fn=cores and (lambda: os.sched_setaffinity(0, cores)),
    )


def test_without_gpu_and_hub_the_sample_is_learned(tmp_path):
    begun = time.monotonic()
    # On one core: two threads that share cores with what else the machine does wait for each other
    # a hundred times longer than they compute. One epoch of four is enough to see it learn.
    core = {min(os.sched_getaffinity(0))}
    done = run_demo(OUTPUT=str(tmp_path), EPOCH="1", cores=core)
    seconds = time.monotonic() - begun
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "model sample/opt-tiny (no GPU)" in done.stdout
    assert "plugin torch_ddp: the fastest on a CPU" in done.stdout
    assert "CPU, 1 process on " in done.stdout
    assert seconds < 180

    evaluations = [
        line["eval_perplexity"] for line in metrics(tmp_path) if "eval_perplexity" in line
    ]
    assert evaluations[0] < 2048 / math.exp(1.5)  # from scratch it is the vocabulary
    assert evaluations[-1] < evaluations[0] / 2

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    ids = tokenizer("A detective returns to the town", return_tensors="pt").input_ids
    with torch.no_grad():
        assert model(ids, labels=ids).loss < 5.5  # from scratch ln(2048) = 7.6
    assert done.stdout.count("\n  - ") == 3  # descriptions that it writes


def test_a_named_model_is_never_replaced(tmp_path):
    done = run_demo(
        OUTPUT=str(tmp_path / "out"), MODEL="facebook/opt-125m", HF_HOME=str(tmp_path / "hub")
    )
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line]
    assert len(errors) == 1 and "facebook/opt-125m" in errors[0]
    assert not (tmp_path / "out").exists()


def test_choices_are_the_users(tmp_path):
    env = {
        "PLUGIN": "low_level_zero",
        "GPUNUM": "1",
        "BS": "8",
        "LR": "1e-3",
        "EPOCH": "1",
        "OUTPUT": str(tmp_path),
    }
    done = run_demo("--max_train_steps", "2", "--eval_fraction", "0", **env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "plugin low_level_zero on 1 process(es) a node (you chose it)" in done.stdout
    assert "8 rows x 1 accumulated x 1 data-parallel = 8 rows a step" in done.stdout
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize(("torch_version", "asks_pip"), [("2.11.0", False), ("2.2.2", True)])
def test_pip_is_asked_only_where_something_is_missing(tmp_path, torch_version, asks_pip):
    """It would put torch 2.5.1 in the place of a newer one, which ColossalAI's pins do not
    allow."""
    stub = tmp_path / "python"
    stub.write_text(
        f"""#!/usr/bin/env bash
case "$1 $2" in
  "-m pip") echo "asked pip: $*" ;;
  "-m opt.installed" | "-c import"*) exec {sys.executable} "$@" ;;
esac
"""
    )
    stub.chmod(0o755)
    done = run_demo(
        INSTALL="1", PYTHON=str(stub), **pretend(tmp_path / "packages", f"torch {torch_version}")
    )
    assert ("asked pip: -m pip install" in done.stdout) == asks_pip
    # A pip that could not help is not the end of it
    assert ("torch 2.2.2" in done.stderr) == asks_pip


HYBRID = "--plugin hybrid_parallel --tp_size"


@pytest.mark.parametrize(
    ("gpus", "env", "arguments", "expected"),
    [
        (1, {}, [], "--batch_size 32"),
        (1, {}, ["--precision", "fp16"], "--batch_size 32"),
        (1, {"PLUGIN": "gemini"}, [], "--plugin gemini --batch_size 32"),
        (2, {}, [], "--batch_size 16"),
        (3, {}, [], "--batch_size 11"),
        (4, {"BS": "32"}, [], "--batch_size 32"),
        (2, {"PLUGIN": "torch_ddp"}, [], "--plugin torch_ddp --batch_size 16"),
        (2, {"PLUGIN": "hybrid_parallel"}, [], f"{HYBRID} 2 --pp_size 1 --batch_size 32"),
        (4, {"PLUGIN": "hybrid_parallel"}, [], f"{HYBRID} 2 --pp_size 2 --batch_size 32"),
        (4, {"TP": "2"}, [], f"{HYBRID} 2 --pp_size 1 --batch_size 16"),
        (4, {"PP": "4"}, [], f"{HYBRID} 1 --pp_size 4 --batch_size 32"),
        (4, {}, ["--tp_size=2"], f"{HYBRID} 2 --pp_size 1 --batch_size 16"),
    ],
)
def test_what_it_calls_on_gpus(tmp_path, gpus, env, arguments, expected):
    """A stand-in for Python says how many there are, and what it was called with instead of
    training. The rest --auto chooses (test_memory.py): rows a step are always as many."""
    stub = tmp_path / "python"
    stub.write_text(
        f"""#!/usr/bin/env bash
case "$*" in
  "-m opt.limits") echo {gpus} ;;
  "- "* | "-m opt.installed"*) exit 0 ;;
  *) echo "asked for: $*" ;;
esac
"""
    )
    stub.chmod(0o755)
    done = run_demo(*arguments, PYTHON=str(stub), MODEL="facebook/opt-350m", **env)
    assert done.returncode == 0, done.stderr
    *before, command = done.stdout.splitlines()
    assert not any("asked for" in line for line in before), "checked by the processes themselves"
    launcher = "" if gpus == 1 else f"-m opt.torchrun --standalone --nproc_per_node {gpus} "
    assert command.startswith(f"asked for: {launcher}opt_train_demo.py ")
    assert " --auto " in command and command.endswith(" ".join(arguments))
    found = re.findall(r"--(?:plugin|[tp]p_size|batch_size) \S+", command)
    assert " ".join(found) == expected


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"GPUNUM": "abc"}, "GPUNUM=abc is no number of at least 1"),
        ({"TP": "08"}, "TP=08 is no number of at least 1"),
        ({"TP": "0"}, "TP=0 is no number of at least 1"),
        ({"PP": "1.5"}, "PP=1.5 is no number of at least 1"),
        ({"HOSTFILE": "none"}, "HOSTFILE=none cannot be read"),
        ({"HOSTFILE": "/dev/null"}, "HOSTFILE=/dev/null names no host"),
    ],
)
def test_what_is_no_choice_is_refused(env, said):
    done = run_demo(**env)
    assert (done.returncode, done.stderr) == (2, f"run_demo.sh: error: {said}\n")


def test_a_choice_that_a_plugin_does_not_have_is_refused(tmp_path):
    """And not left out."""
    done = run_demo(PLUGIN="torch_ddp", GPUNUM="2", TP="2", PP="1", OUTPUT=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.strip().endswith(
        "--tp_size has no meaning for --plugin torch_ddp: it is for hybrid_parallel; leave it out "
        "or change the plugin"
    )


def test_arguments_are_choices_too(tmp_path):
    """Data that are named take the place of the sample, and adapters' learning rate is theirs; by
    whatever link it is called."""
    link = tmp_path / "demo"
    link.symlink_to(REPO / "run_demo.sh")
    (tmp_path / "mine.txt").write_text("a text of a few words\n" * 64)
    flags = ("--dataset", str(tmp_path / "mine.txt"), "--lora_r=4", "--dry_run")
    done = run_demo(*flags, OUTPUT=str(tmp_path / "out"), script=link)
    assert done.returncode == 0, done.stderr
    assert f"run_demo: data {tmp_path}/mine.txt (you chose it)" in done.stdout
    assert "mine.txt: 64 texts" in done.stdout and "learning rate 0.0002;" in done.stdout


def test_a_mistake_with_several_processes_is_one_line(tmp_path):
    """Not buried under a launcher's report; the exit code is that of the processes."""
    done = run_demo("--max_length", "1000", GPUNUM="2", OUTPUT=str(tmp_path / "out"))
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line]
    assert "--max_length 1000 is over the model's 256 positions" in line


def test_two_processes_say_their_plan_once_and_nothing_of_others(tmp_path):
    done = run_demo("--max_train_steps", "2", GPUNUM="2", OUTPUT=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "16 rows a step" in done.stdout and done.stdout.count("rows a step") == 1
    for text in ("OMP_NUM_THREADS", "CUDA_HOME", "Nodes", "Warning", "torch/distributed"):
        assert text not in done.stdout + done.stderr


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_kill_is_named(tmp_path, nproc):
    """By run_demo.sh, and by the process that is left."""
    demo = start_demo("--num_epoch", "100000", "--no_save", GPUNUM=str(nproc), OUTPUT=str(tmp_path))
    victim = until_training(demo, tmp_path, nproc)[-1]
    victim.kill()
    out, err = demo.communicate(timeout=60)
    assert demo.returncode == 137
    assert "run_demo: killed, most likely for host memory (exit code 137)" in err
    if nproc == 2:
        assert re.search(
            rf"error: another process was lost: rank 1 \(process {victim.pid}\) was killed, most likely for host memory",
            err,
        )
    assert "Traceback" not in out + err


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_signal_to_the_script_alone_saves(tmp_path, nproc):
    demo = start_demo("--num_epoch", "100000", "--no_save", GPUNUM=str(nproc), OUTPUT=str(tmp_path))
    until_training(demo, tmp_path, nproc)
    demo.send_signal(signal.SIGTERM)
    out, err = demo.communicate(timeout=60)
    assert demo.returncode == (0 if nproc == 1 else 128 + signal.SIGTERM), err
    assert "SIGTERM: stopped after step" in out
    assert list((tmp_path / "checkpoints").glob("step-*"))


def start_demo(*arguments, **env) -> subprocess.Popen:
    command = ["bash", str(REPO / "run_demo.sh"), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | NO_HUB | env, **pipes)


def until_training(demo: subprocess.Popen, output, nproc: int) -> list[psutil.Process]:
    """Wait until some steps are done; the processes that train, by rank."""
    end = time.monotonic() + 90
    while not (output / "metrics.jsonl").exists() or len(metrics(output)) < 3:
        assert time.monotonic() < end and demo.poll() is None
        time.sleep(0.1)
    family = workers(demo, "opt_train_demo.py")
    assert len(family) == nproc
    return family
