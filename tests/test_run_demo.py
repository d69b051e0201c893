"""run_demo.sh as a newcomer runs it, on a machine without a GPU and without the Hub."""

import os
import re
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .conftest import REPO, metrics, pretend

# Nothing listens there: the Hub is out of reach at once. Without CUDA devices the script takes the CPU's way anywhere.
NO_HUB = {"HF_ENDPOINT": "http://127.0.0.1:9", "CUDA_VISIBLE_DEVICES": "", "INSTALL": "0", "PYTHON": sys.executable}


def run_demo(*arguments, **env):
    command = ["bash", str(REPO / "run_demo.sh"), *arguments]
    return subprocess.run(command, env=os.environ | NO_HUB | env, capture_output=True, text=True, timeout=400)


def test_without_gpu_and_hub_the_sample_is_learned(tmp_path):
    begun = time.monotonic()
    done = run_demo(OUTPUT=str(tmp_path))
    seconds = time.monotonic() - begun
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "model sample/opt-tiny (no GPU)" in done.stdout
    assert "plugin hybrid_parallel, tp 2 x pp 1 on 2 process(es) a node (2 processes)" in done.stdout
    assert "CPU, 2 processes" in done.stdout
    assert seconds < 180

    evaluations = [line["eval_perplexity"] for line in metrics(tmp_path) if "eval_perplexity" in line]
    assert evaluations[-1] < evaluations[0] / 2

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("A detective returns to the town", return_tensors="pt").input_ids
    with torch.no_grad():
        assert model(ids, labels=ids).loss < 6.5  # an untrained model has ln(2048) = 7.6
    assert done.stdout.count("\n  - ") == 3  # descriptions that it writes


def test_a_named_model_is_never_replaced(tmp_path):
    done = run_demo(OUTPUT=str(tmp_path / "out"), MODEL="facebook/opt-125m", HF_HOME=str(tmp_path / "hub"))
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line]
    assert len(errors) == 1 and "facebook/opt-125m" in errors[0]
    assert not (tmp_path / "out").exists()


def test_choices_are_the_users(tmp_path):
    env = {"PLUGIN": "low_level_zero", "GPUNUM": "1", "BS": "8", "LR": "1e-3", "EPOCH": "1", "OUTPUT": str(tmp_path)}
    done = run_demo("--max_train_steps", "2", "--eval_fraction", "0", **env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "plugin low_level_zero on 1 process(es) a node (you chose it)" in done.stdout
    assert "8 rows x 1 accumulated x 1 data-parallel = 8 rows a step" in done.stdout
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize(("torch_version", "asks_pip"), [("2.11.0", False), ("2.2.2", True)])
def test_pip_is_asked_only_where_something_is_missing(tmp_path, torch_version, asks_pip):
    """It would put torch 2.5.1 in the place of a newer one, which ColossalAI's pins do not allow."""
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
    done = run_demo(INSTALL="1", PYTHON=str(stub), **pretend(tmp_path / "packages", f"torch {torch_version}"))
    assert ("asked pip: -m pip install" in done.stdout) == asks_pip
    assert ("torch 2.2.2" in done.stderr) == asks_pip  # a pip that could not help is not the end of it


GRAPH = "--fused_loss --cuda_graph"


@pytest.mark.parametrize(
    ("gpus", "env", "arguments", "plugin", "extra"),
    [
        ("1 1", {}, [], "low_level_zero", GRAPH),
        ("1 0", {}, [], "torch_ddp", GRAPH),
        ("1 1", {}, ["--precision", "fp16"], "low_level_zero", "--fused_loss"),
        ("1 1", {}, ["--grad_checkpoint"], "low_level_zero", "--fused_loss"),
        ("1 1", {"PLUGIN": "gemini"}, [], "gemini", ""),
        ("2 1", {}, [], "hybrid_parallel", "--tp_size 2 --pp_size 1"),
        ("2 1", {"PLUGIN": "low_level_zero"}, [], "low_level_zero", GRAPH),
        ("2 1", {"PLUGIN": "torch_ddp"}, [], "torch_ddp", ""),
        ("3 1", {}, [], "low_level_zero", GRAPH),
        ("3 0", {}, [], "torch_ddp", ""),
        ("4 1", {}, [], "hybrid_parallel", "--tp_size 2 --pp_size 2"),
    ],
)
def test_what_it_chooses_on_gpus(tmp_path, gpus, env, arguments, plugin, extra):
    """As "GPUS BF16" have it: a stand-in for Python says what is there, and what it was called with instead of training."""
    stub = tmp_path / "python"
    stub.write_text(
        f"""#!/usr/bin/env bash
case "$1" in
  -) grep -q device_count && echo {gpus} ;;
  *.py) echo "asked for: $*" ;;
  *) case "$2" in *cli*) echo "asked for: $*" ;; *) exec {sys.executable} "$@" ;; esac ;;
esac
"""
    )
    stub.chmod(0o755)
    done = run_demo(*arguments, PYTHON=str(stub), **env)
    assert done.returncode == 0, done.stderr
    command, nproc = done.stdout.splitlines()[-1], gpus.split()[0]
    assert "--dry_run" not in command and (nproc == "1" or f"--nproc_per_node {nproc} " in command)
    assert re.findall(r"--plugin (\w+)", command) == [plugin]
    assert " ".join(re.findall(r"--[tp]p_size \S+|--fused_loss|--cuda_graph", command)) == extra
