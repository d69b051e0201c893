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

from opt.choose import Machine, parameters_of, plugin
from opt.model.opt import meta_model
from opt.model.sizes import preset_config

from .conftest import REPO, metrics, pretend, workers

# Nothing listens there: the Hub is out of reach at once. Without CUDA devices the script takes the
# CPU's way anywhere.
NO_HUB = {
    "HF_ENDPOINT": "http://127.0.0.1:9",
    "CUDA_VISIBLE_DEVICES": "",
    "INSTALL": "0",
    "PYTHON": sys.executable,
}


def run_demo(*arguments, **env):
    # On one core: two threads that share cores with what else the machine does wait for each other
    # a hundred times longer than they compute.
    core = sorted(os.sched_getaffinity(0))[:1]
    return subprocess.run(
        ["bash", str(REPO / "run_demo.sh"), *arguments],
        env=os.environ | NO_HUB | env,
        capture_output=True,
        text=True,
        timeout=400,
        preexec_fn=lambda: os.sched_setaffinity(0, core),
    )


def test_without_gpu_and_hub_the_sample_is_learned(tmp_path):
    begun = time.monotonic()
    done = run_demo(OUTPUT=str(tmp_path), EPOCH="1")  # of four: enough to see it learn
    seconds = time.monotonic() - begun
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "model sample/opt-tiny (no GPU)" in done.stdout
    assert "plugin torch_ddp on 1 process(es) a node (the fastest on a CPU)" in done.stdout
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


GIB = 2**30


@pytest.mark.parametrize(
    ("parameters", "machine", "processes", "expected"),
    [
        (331e6, Machine(0), 1, ("torch_ddp", "")),
        (331e6, Machine(0), 4, ("torch_ddp", "")),
        (331e6, Machine(1, 80 * GIB, True), 1, ("low_level_zero", "")),
        (331e6, Machine(4, 80 * GIB, True), 4, ("low_level_zero", "")),
        (331e6, Machine(1, 16 * GIB, False), 1, ("torch_ddp", "")),
        # fp16: 16 bytes a parameter, or 10, are too many
        (
            1.3e9,
            Machine(2, 16 * GIB, False),
            2,
            ("gemini", ""),
        ),
        (331e6, Machine(1, 8 * GIB, True), 1, ("low_level_zero", "")),
        (1.3e9, Machine(1, 16 * GIB, True), 1, ("gemini", "--offload_optim_frac 1")),
        (6.7e9, Machine(4, 80 * GIB, True), 4, ("low_level_zero", "")),
        (13e9, Machine(4, 80 * GIB, True), 4, ("gemini", "")),
        (6.7e9, Machine(1, 80 * GIB, True), 1, ("gemini", "--offload_optim_frac 1")),
        (175e9, Machine(8, 80 * GIB, True), 8, ("gemini", "--offload_optim_frac 1")),
        (None, Machine(2, 80 * GIB, True), 2, ("low_level_zero", "")),
    ],
)
def test_what_is_chosen_by_size(parameters, machine, processes, expected):
    """The fastest that the model fits under; GPUs of 8 to 80 GiB."""
    assert plugin(parameters, machine, processes)[:2] == expected


def test_adapters_need_no_memory_for_the_weights_update():
    """Frozen weights take 2 bytes, in 4 bits a little over half of one."""
    one = Machine(1, 80 * GIB, True)
    assert plugin(6.7e9, one, 1, frozen=2)[:2] == ("low_level_zero", "")
    assert plugin(66e9, one, 1, frozen=2)[:2] == ("gemini", "")
    assert plugin(66e9, one, 1, frozen=0.6)[:2] == ("low_level_zero", "")
    assert plugin(66e9, Machine(4, 80 * GIB, True), 4, frozen=2)[:2] == ("gemini", "")


@pytest.mark.parametrize("size", ["125m", "350m", "1.3b", "6.7b", "175b"])
def test_parameters_by_config(tmp_path, size):
    """As the model has them, but for vectors and positions."""
    config = preset_config(size)
    config.save_pretrained(tmp_path)
    assert parameters_of(str(tmp_path), False) == pytest.approx(
        sum(p.numel() for p in meta_model(config).parameters()), rel=0.02
    )
    assert parameters_of(str(tmp_path / "nowhere"), False) is None


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


GRAPH = "--fused_loss --cuda_graph"


@pytest.mark.parametrize(
    ("gpus", "chosen", "env", "arguments", "expected"),
    [
        ("1 1", "low_level_zero", {}, [], f"--plugin low_level_zero --batch_size 32 {GRAPH}"),
        ("1 0", "torch_ddp", {}, [], f"--plugin torch_ddp --batch_size 32 {GRAPH}"),
        (
            "1 1",
            "low_level_zero",
            {},
            ["--precision", "fp16"],
            "--plugin low_level_zero --batch_size 32 --fused_loss",
        ),
        (
            "1 1",
            "low_level_zero",
            {},
            ["--grad_checkpoint"],
            "--plugin low_level_zero --batch_size 32 --fused_loss",
        ),
        (
            "1 1",
            "gemini --offload_optim_frac 1",
            {},
            [],
            "--plugin gemini --offload_optim_frac 1 --batch_size 32",
        ),
        ("1 1", "low_level_zero", {"PLUGIN": "gemini"}, [], "--plugin gemini --batch_size 32"),
        ("2 1", "low_level_zero", {}, [], f"--plugin low_level_zero --batch_size 16 {GRAPH}"),
        ("3 1", "low_level_zero", {}, [], f"--plugin low_level_zero --batch_size 11 {GRAPH}"),
        ("4 1", "low_level_zero", {}, [], f"--plugin low_level_zero --batch_size 8 {GRAPH}"),
        (
            "4 1",
            "low_level_zero",
            {"BS": "32"},
            [],
            f"--plugin low_level_zero --batch_size 32 {GRAPH}",
        ),
        ("2 0", "torch_ddp", {}, [], "--plugin torch_ddp --batch_size 16"),
        (
            "2 1",
            "low_level_zero",
            {"PLUGIN": "torch_ddp"},
            [],
            "--plugin torch_ddp --batch_size 16",
        ),
        (
            "2 1",
            "low_level_zero",
            {"PLUGIN": "hybrid_parallel"},
            [],
            f"--plugin hybrid_parallel --tp_size 2 --pp_size 1 --batch_size 32 {GRAPH}",
        ),
        (
            "2 1",
            "low_level_zero",
            {"PLUGIN": "hybrid_parallel"},
            ["--zero_stage", "1"],
            "--plugin hybrid_parallel --tp_size 2 --pp_size 1 --batch_size 32 --fused_loss",
        ),
        (
            "4 1",
            "low_level_zero",
            {"PLUGIN": "hybrid_parallel"},
            [],
            f"--plugin hybrid_parallel --tp_size 2 --pp_size 2 --batch_size 32 {GRAPH}",
        ),
        (
            "4 1",
            "low_level_zero",
            {"TP": "2"},
            [],
            "--plugin hybrid_parallel --tp_size 2 --pp_size 1 --batch_size 16",
        ),
        (
            "4 1",
            "low_level_zero",
            {"PP": "4"},
            [],
            f"--plugin hybrid_parallel --tp_size 1 --pp_size 4 --batch_size 32 {GRAPH}",
        ),
    ],
)
def test_what_it_calls_on_gpus(tmp_path, gpus, chosen, env, arguments, expected):
    """As "GPUS BF16" have it: a stand-in for Python says what is there, and what it was called with
    instead of training."""
    stub, (name, *flags) = tmp_path / "python", chosen.split()
    stub.write_text(
        f"""#!/usr/bin/env bash
case "$*" in
  "-m opt.choose"*) printf '%s\\n' {gpus} {name} "{" ".join(flags)}" "a reason" ;;
  "- "* | "-m opt.installed"*) exit 0 ;;
  *) echo "asked for: $*" ;;
esac
"""
    )
    stub.chmod(0o755)
    given = {name: value for name, value in env.items()}
    done = run_demo(*arguments, PYTHON=str(stub), MODEL="facebook/opt-350m", **given)
    assert done.returncode == 0, done.stderr
    *before, command = done.stdout.splitlines()
    assert not any("asked for" in line for line in before), "checked by the processes themselves"
    nproc = gpus.split()[0]
    launcher = "" if nproc == "1" else f"-m opt.torchrun --standalone --nproc_per_node {nproc} "
    assert command.startswith(f"asked for: {launcher}opt_train_demo.py ")
    found = re.findall(
        r"--(?:plugin|[tp]p_size|offload_optim_frac|batch_size) \S+|--fused_loss|--cuda_graph",
        command,
    )
    assert " ".join(found) == expected


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
    assert (tmp_path / "checkpoints" / "latest").is_file()


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
