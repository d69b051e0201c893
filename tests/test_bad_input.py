"""What the user gets wrong: one line that says so, exit code 2, and nothing else happens."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from args import OF_TRANSFORMERS, resolve, train_parser
from opt import installed
from opt.colossal.processes import Place
from opt.errors import UserError
from opt.train import checks

from .conftest import (
    REPO,
    SAMPLE_DATA,
    SAMPLE_MODEL,
    finish,
    losses,
    on_the_sample,
    pretend,
    run,
    start,
)

SCRIPT = REPO / "opt_train_demo.py"


def assert_refused(done, *says, script="opt_train_demo.py") -> None:
    """That a process ended with one line for its user, which has all of `says` in it."""
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Traceback" not in done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(f"{script}: error: ")
    for part in says:
        assert part in lines[0]


# ---- arguments that are wrong whatever the model, data and device: refused before any heavy import


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--plugin zero3", ["zero3", "gemini"]),
        ("--precision fp8", ["fp8", "bf16"]),
        ("--lora_adapter=", ["--lora_adapter is empty", "leave it out"]),
        ("--text_column=", ["--text_column is empty", "leave it out"]),
        ('--lr_scheduler_kwargs {"min_lr":NaN}', ["--lr_scheduler_kwargs", "no finite number"]),
        ("--batch_size 0", ["--batch_size", "at least 1"]),
        ("--batch_size 2.5", ["--batch_size", "2.5"]),
        ("--batch_size many", ["--batch_size", "many"]),
        ("--learning_rate nan", ["--learning_rate", "nan"]),
        ("--learning_rate -1", ["--learning_rate", "-1"]),
        ("--learning_rate inf", ["--learning_rate", "inf"]),
        ("--num_epoch -1", ["--num_epoch"]),
        ("--max_length 1", ["--max_length", "at least 2"]),
        ("--eval_fraction 1", ["--eval_fraction", "0.9"]),
        ("--dropout 1.5", ["--dropout", "at most 1"]),
        ("--zero_stage 3", ["--zero_stage", "3"]),
        ("--seed x", ["--seed", "x"]),
        ("--epochs 3", ["--epochs"]),
        ("--dataset", ["--dataset"]),
        ("--output_dir x --bf16", ["--output_dir is --output_path here", "--precision bf16 here"]),
        ("--batch-size=4", ["--batch-size is --batch_size here"]),
        ("--max_steps 5", ["--max_steps is --max_train_steps here"]),
        ("--load_in_8bit", ["did you mean --load_in_4bit instead of --load_in_8bit?"]),
    ],
)
def test_a_mistyped_argument(flags, says):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert_refused(run(SCRIPT, *flags.split()), *says)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Importing torch alone takes more
    assert used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime < 1


def test_what_transformers_calls_otherwise():
    taken = train_parser().format_help()
    for theirs, ours in OF_TRANSFORMERS.items():
        assert f"{ours.split()[0]} " in taken and f"{theirs} " not in taken


# ---- packages that were not tested with one another: refused before one is imported


@pytest.mark.parametrize(
    "packages, says",
    [
        (["torch 2.2.2+cu121"], ["torch 2.2.2+cu121", "pip install -r", "requirements.txt"]),
        (["torch 2.15.0"], ["torch 2.15.0", "pip install -r"]),
        (["transformers 5.17.0", "numpy 1.23.5"], ["transformers 5.17.0", "numpy 1.23.5"]),
        (["datasets 2.21.0"], ["datasets 2.21.0"]),
        (
            ["torch 2.11.0", "torchvision 0.20.1 torch==2.5.1"],
            ["torchvision 0.20.1", "pip install torch==2.11.0 torchvision"],
        ),
    ],
    ids=lambda value: " ".join(value),
)
def test_packages_that_were_not_tested(tmp_path, packages, says):
    """By the scripts, and by run_demo.sh before its own look at the GPUs, which imports torch."""
    env = pretend(tmp_path, *packages) | {"INSTALL": "0", "PYTHON": sys.executable}
    for script, launcher in (
        ("opt_train_demo.py", None),
        ("opt_benchmark.py", None),
        ("run_demo.sh", ["bash"]),
        ("run_benchmark.sh", ["bash"]),
    ):
        done = finish(start(REPO / script, env=env, launcher=launcher), timeout=60)
        assert_refused(done, *says, script=script)


@pytest.mark.parametrize("version", ["2.11.0+cu130", "2.11.0a0+git1"])
def test_a_torch_that_colossalai_does_not_allow(tmp_path, monkeypatch, version):
    """But requirements.txt does: the newest stack (requirements-newest.txt), and a build from
    source."""
    monkeypatch.syspath_prepend(
        next(
            iter(
                pretend(
                    tmp_path, f"torch {version}", f"torchvision 0.26.0 torch=={version}"
                ).values()
            )
        )
    )
    assert metadata.version("torch") == version
    installed.check()


def test_packages_that_are_missing():
    # Without site-packages
    done = finish(start(SCRIPT, launcher=[sys.executable, "-S"]), timeout=60)
    assert_refused(done, "not installed: colossalai, torch, transformers", "pip install -r")


# ---- what takes a look at the model, the data or the machine


@dataclass
class Case:
    """A command line with one mistake, on top of one without; {} is the folder of broken(). And
    what the line must say."""

    name: str
    flags: str
    says: list[str]
    env: dict = field(default_factory=dict)


HYBRID = "--plugin hybrid_parallel "
CASES = [
    # plugins and processes
    Case("world size", HYBRID + "--tp_size 2", ["3 processes", "tp_size 2"], {"WORLD_SIZE": "3"}),
    Case("world size of one", HYBRID + "--pp_size 2 --batch_size 4", ["1 processes", "pp_size 2"]),
    Case(
        "heads", HYBRID + "--tp_size 3", ["4 attention heads", "--tp_size 3"], {"WORLD_SIZE": "3"}
    ),
    Case(
        "layers",
        HYBRID + "--pp_size 8 --batch_size 8",
        ["4 layers", "--pp_size 8"],
        {"WORLD_SIZE": "8"},
    ),
    Case(
        "micro-batches",
        HYBRID + "--pp_size 2 --batch_size 6 --num_microbatches 4",
        ["--batch_size 6", "4 micro"],
        {"WORLD_SIZE": "2"},
    ),
    Case(
        "odd batch",
        HYBRID + "--pp_size 2 --batch_size 5",
        ["--batch_size 5", "2 micro"],
        {"WORLD_SIZE": "2"},
    ),
    Case(
        "few micro-batches",
        HYBRID + "--pp_size 4 --num_microbatches 2",
        ["--num_microbatches 2", "--pp_size 4"],
        {"WORLD_SIZE": "4"},
    ),
    Case(
        "micro-batches alone", HYBRID + "--num_microbatches 2", ["--num_microbatches", "--pp_size"]
    ),
    Case("gemini in fp32", "--plugin gemini --precision fp32", ["gemini", "fp32"]),
    Case("fp16 in bf16", "--plugin torch_ddp_fp16 --precision bf16", ["torch_ddp_fp16", "bf16"]),
    Case(
        "tp without hybrid",
        "--plugin gemini --tp_size 2",
        ["--tp_size", "gemini", "hybrid_parallel"],
    ),
    Case("ZeRO stage of DDP", "--zero_stage 1", ["--zero_stage", "torch_ddp", "low_level_zero"]),
    Case(
        "offload without gemini",
        "--plugin low_level_zero --offload_optim_frac 0.5",
        ["--offload_optim_frac", "gemini"],
    ),
    Case("ZeRO stage 0", "--plugin low_level_zero --zero_stage 0", ["low_level_zero", "stage"]),
    Case(
        "ZeRO 2 in stages",
        HYBRID + "--pp_size 2 --zero_stage 2 --precision bf16",
        ["stage 2", "pipeline"],
        {"WORLD_SIZE": "2"},
    ),
    # model
    Case(
        "no model",
        "--model_name_or_path {}/nowhere",
        ["--model_name_or_path", "/nowhere", "no such directory"],
    ),
    Case("no config", "--model_name_or_path {}/empty", ["/empty", "config.json"]),
    Case("not JSON", "--model_name_or_path {}/not_json", ["config.json"]),
    Case("not OPT", "--model_name_or_path {}/gpt2", ["gpt2", "OPT"]),
    Case(
        "odd heads",
        "--model_name_or_path {}/odd_heads",
        ["hidden_size 128", "3 attention heads", "config.json"],
    ),
    Case(
        "no tokenizer", "--model_name_or_path {}/no_tokenizer", ["/no_tokenizer", "tokenizer.json"]
    ),
    Case(
        "other tokenizer",
        "--model_name_or_path {}/other_tokenizer",
        ["2048 tokens", "vocabulary 1000"],
    ),
    Case("max_length", "--max_length 257", ["--max_length 257", "256 positions"]),
    # weights
    Case(
        "other shape",
        "--model_name_or_path {}/other_shape",
        ["/other_shape", "fc1.weight", "(512, 128)", "(256, 128)"],
    ),
    Case("tensors missing", "--model_name_or_path {}/lacking", ["/lacking", "lack 1", "fc2.bias"]),
    Case("tensors too many", "--model_name_or_path {}/extra", ["/extra", "layers.4"]),
    Case(
        "shard missing",
        "--model_name_or_path {}/shard_missing",
        ["model.safetensors.index.json", "00002-of-"],
    ),
    Case(
        "index missing",
        "--model_name_or_path {}/index_missing",
        ["/index_missing", "model-00001-of-", "index.json"],
    ),
    Case(
        "index broken",
        "--model_name_or_path {}/index_broken",
        ["model.safetensors.index.json", "index"],
    ),
    Case(
        "safetensors cut", "--model_name_or_path {}/cut_safetensors", ["model.safetensors", "again"]
    ),
    Case(
        "safetensors garbage",
        "--model_name_or_path {}/garbage_safetensors",
        ["model.safetensors", "again"],
    ),
    Case("bin cut", "--model_name_or_path {}/cut_bin", ["pytorch_model.bin", "again"]),
    Case("bin garbage", "--model_name_or_path {}/garbage_bin", ["pytorch_model.bin", "again"]),
    Case(
        "bin of something else", "--model_name_or_path {}/list_bin", ["pytorch_model.bin", "again"]
    ),
    # data
    Case("no file", "--dataset {}/nowhere.csv", ["--dataset", "/nowhere.csv", "no such file"]),
    Case("folder", "--dataset {}/folder", ["--dataset", "a folder without a file that ends in"]),
    Case("other format", "--dataset {}/data.xlsx", ["data.xlsx", "csv", "parquet"]),
    # A name in Latin-1, as Python has it: exported, it would end the run behind its last step
    Case("name in Latin-1", "--output_path /nowhere/mod\udce9le", ["mod", "is not UTF-8: rename"]),
    # As Kaggle gives the data set of the demo
    Case("archive", "--dataset {}/archive.zip", ["archive.zip is an archive", "unpack it"]),
    Case("empty file", "--dataset {}/empty.csv", ["empty.csv", "empty"]),
    Case("no rows", "--dataset {}/no_rows.csv", ["no_rows.csv", "no rows"]),
    Case("no text", "--dataset {}/blank.csv", ["blank.csv", "no text", "3 of its texts are empty"]),
    Case(
        "no column",
        "--dataset {}/two.csv --text_column plot",
        ["'plot'", "description", "--text_column"],
    ),
    Case("numbers", "--dataset {}/numbers.jsonl", ["line 1", "int", "not text", "--text_column"]),
    Case("not parquet", "--dataset {}/not.parquet", ["not.parquet", "cannot be read"]),
    Case("not jsonl", "--dataset {}/not.jsonl", ["not.jsonl", "line 2", "no JSON"]),
    Case("nothing to hold out", "--dataset {}/two.csv", ["2 texts", "--eval_fraction"]),
    # output
    Case(
        "output under a file",
        "--output_path {}/empty.csv/out",
        ["--output_path", "cannot be written", "Not a directory"],
    ),
    Case(
        "output is a file",
        "--output_path {}/empty.csv",
        ["--output_path", "cannot be written", "Not a directory"],
    ),
    Case(
        "output in /proc",
        "--output_path /proc/out",
        ["--output_path /proc/out", "cannot be written"],
    ),
    Case(
        "output too long",
        "--output_path {}/" + "x" * 300,
        ["--output_path", "cannot be written", "too long"],
    ),
    Case(
        "output's folder is a file",
        "--output_path {}/empty.csv/model.bin",
        ["--output_path", "cannot be written"],
    ),
    Case(
        "output.bin is a folder",
        "--output_path {}/folder.bin",
        ["--output_path", "folder.bin", "directory"],
    ),
    Case(
        "a folder where a file belongs",
        "--output_path {}/taken",
        ["taken/model.safetensors is a folder"],
    ),
    Case(
        "a file where checkpoints belong",
        "--output_path {}/filed",
        ["filed/checkpoints is a file"],
    ),
    Case("a suffix alone", "--output_path {}/.bin", ["is a suffix alone"]),
]


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    """A folder of models and data sets, each with a fault of its own."""
    root = tmp_path_factory.mktemp("broken")
    config = json.loads((SAMPLE_MODEL / "config.json").read_text())
    weights = {
        k: v
        for k, v in transformers.OPTForCausalLM(transformers.OPTConfig(**config))
        .state_dict()
        .items()
        if k != "lm_head.weight"
    }
    names = sorted(weights)

    def model(name, change_config=None, tokenizer=True) -> Path:
        folder = root / name
        shutil.copytree(
            SAMPLE_MODEL, folder, ignore=None if tokenizer else shutil.ignore_patterns("*token*")
        )
        (folder / "config.json").write_text(json.dumps(config | (change_config or {})))
        return folder

    (root / "empty").mkdir()
    (model("not_json") / "config.json").write_text("{ model_type: opt")
    model("gpt2", {"model_type": "gpt2"})
    model("odd_heads", {"num_attention_heads": 3})
    model("no_tokenizer", tokenizer=False)
    model("other_tokenizer", {"vocab_size": 1000})

    file = "model.safetensors"
    save_file(weights, model("other_shape", {"ffn_dim": 256}) / file)
    save_file(
        {k: v for k, v in weights.items() if not k.endswith("layers.3.fc2.bias")},
        model("lacking") / file,
    )
    save_file(
        weights | {k.replace("layers.3", "layers.4"): v.clone() for k, v in weights.items()},
        model("extra") / file,
    )

    shards = {f"model-{i:05d}-of-00003.safetensors": names[i - 1 :: 3] for i in (1, 2, 3)}
    index = {
        "metadata": {},
        "weight_map": {name: shard for shard, own in shards.items() for name in own},
    }
    for folder in (model("shard_missing"), model("index_missing"), model("index_broken")):
        for shard, own in shards.items():
            save_file({name: weights[name] for name in own}, folder / shard)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (root / "shard_missing" / "model-00002-of-00003.safetensors").unlink()
    (root / "index_missing" / "model.safetensors.index.json").unlink()
    (root / "index_broken" / "model.safetensors.index.json").write_text('{"metadata": {}}')

    save_file(weights, model("cut_safetensors") / file)
    os.truncate(root / "cut_safetensors" / file, 1_000_000)
    (model("garbage_safetensors") / file).write_bytes(b"<!DOCTYPE html>" * 99)
    torch.save(weights, model("cut_bin") / "pytorch_model.bin")
    os.truncate(root / "cut_bin" / "pytorch_model.bin", 1_000_000)
    (model("garbage_bin") / "pytorch_model.bin").write_bytes(b"<!DOCTYPE html>" * 99)
    torch.save(list(weights.values()), model("list_bin") / "pytorch_model.bin")

    (root / "data.xlsx").touch()
    (root / "archive.zip").touch()
    (root / "empty.csv").touch()
    (root / "folder").mkdir()
    (root / "no_rows.csv").write_text("show_id,description\n")
    (root / "blank.csv").write_text('show_id,description\ns1,\ns2," "\ns3,""\n')
    (root / "numbers.jsonl").write_text('{"description": 1984}\n')
    (root / "two.csv").write_text("show_id,description\ns1,One.\ns2,Two.\n")
    (root / "not.parquet").write_text("show_id,description\ns1,One.\n")
    (root / "not.jsonl").write_text('{"description": "One."}\n{"description": \n')
    (root / "folder.bin").mkdir()
    (root / "taken" / "model.safetensors").mkdir(parents=True)
    (root / "filed").mkdir()
    (root / "filed" / "checkpoints").touch()
    return root


# A process that has imported what the script imports, and forks itself for each command line that
# it reads. Importing takes a process 5 seconds, and taking all of it down again half a second: a
# fork does neither.
FORKS = """
import gc, json, os, runpy, sys, traceback
import datasets, transformers, opt.train.plan

gc.freeze()
for line in sys.stdin:
    script, flags, env, streams = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for number, file in enumerate(streams, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ |= env
    sys.argv = [script, *flags]
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)
"""


@pytest.fixture(scope="module")
def forks():
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        [sys.executable, "-c", FORKS],
        cwd=REPO,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as forks:
        yield forks
        forks.stdin.close()


def dry_run(flags: str, output: Path) -> list[str]:
    """The arguments of a dry run on the sample, as far as `flags` leave it."""
    flags = flags.split()
    given = {
        "--model_name_or_path": SAMPLE_MODEL,
        "--dataset": SAMPLE_DATA,
        "--output_path": output,
    }
    return [
        *flags,
        *(
            str(part)
            for flag, value in given.items()
            if flag not in flags
            for part in (flag, value)
        ),
        "--dry_run",
    ]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_mistake(case, forks, broken, tmp_path):
    flags = dry_run(case.flags.format(broken), tmp_path / "out")
    streams = [tmp_path / "stdout", tmp_path / "stderr"]
    print(
        json.dumps([str(SCRIPT), flags, case.env, list(map(str, streams))]),
        file=forks.stdin,
        flush=True,
    )
    code = int(forks.stdout.readline())
    assert_refused(
        subprocess.CompletedProcess(flags, code, *(file.read_text() for file in streams)),
        *case.says,
    )
    assert not (tmp_path / "out").exists()


def test_no_mistake(tmp_path):
    """The plan, for as many processes as WORLD_SIZE says, and nothing on disk."""
    flags = (
        "--plugin hybrid_parallel --tp_size 2 --pp_size 2 --batch_size 8 "
        "--gradient_accumulation_steps 3 --precision fp32"
    )
    done = run(
        SCRIPT,
        *dry_run(flags, tmp_path / "out"),
        env={"CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": "8"},
    )
    assert done.returncode == 0, done.stderr
    for part in (
        "tp 2 x pp 2 x dp 2",
        "8 rows x 3 accumulated x 2 data-parallel = 48 rows",
        "4 micro-batches",
        "fp32",
        "trains from scratch",
    ):
        assert part in done.stdout
    assert "kernels" not in done.stdout  # a CPU has none to miss
    assert not list(tmp_path.iterdir())


def test_variables_of_a_launcher_that_is_not_there(tmp_path):
    """MASTER_ADDR, which a job's script says to all that it starts, does not keep one process from
    training; of several it is not enough. And no shell makes the home of --output_path=~/folder."""
    flags = [*on_the_sample("")[:-2], "--output_path=~/out", "--max_train_steps", 1]
    env = {"CUDA_VISIBLE_DEVICES": "", "HOME": str(tmp_path), "MASTER_ADDR": "127.0.0.1"}
    done = run(SCRIPT, *flags, "--no_save", env=env)
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "out")) == 1
    for more, says in (
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE is 2", "MASTER_PORT and RANK are not set", "torchrun"]),
        ({"WORLD_SIZE": "1", "RANK": "0", "MASTER_PORT": "x"}, ["MASTER_PORT is 'x'", "port"]),
    ):
        assert_refused(run(SCRIPT, *flags, env=env | more), *says)


def test_a_dry_run_by_torchrun(tmp_path):
    """Checks and prints once, though nothing connects the processes."""
    done = run(SCRIPT, *dry_run("", tmp_path / "out"), nproc=2, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rows a step") == 1
    assert not list(tmp_path.iterdir())


def test_every_process_ends(broken, tmp_path):
    """The first process of a node finds the mistake in the data; the others wait for it, and end
    with it."""
    flags = (
        "--model_name_or_path",
        SAMPLE_MODEL,
        "--dataset",
        broken / "blank.csv",
        "--output_path",
        tmp_path / "out",
    )
    done = run(SCRIPT, *flags, nproc=2, env={"CUDA_VISIBLE_DEVICES": ""}, timeout=120)
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count("no text to train on") == 1
    # Torchrun's report of the first process to end
    assert re.search(r"exitcode *: 2 ", done.stderr)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--plugin gemini", "gemini"),
        ("--plugin torch_ddp --grad_checkpoint", "--grad_checkpoint"),
        ("--plugin low_level_zero --precision fp16", "bf16"),
        ("--plugin hybrid_parallel --precision fp16", "bf16"),
    ],
)
def test_what_a_cuda_graph_cannot_record(flags, says):
    """As on a GPU: only the argument check looks at these."""
    args = train_parser().parse_args(["--cuda_graph", *flags.split()])
    with pytest.raises(UserError, match=says):
        resolve(args, "cuda", True)
    assert (
        resolve(
            train_parser().parse_args(["--cuda_graph", "--plugin", "low_level_zero"]), "cuda", True
        ).precision
        == "bf16"
    )


@pytest.mark.parametrize(
    "flags, processes, is_recorded",
    [
        ("--plugin low_level_zero", 2, True),
        ("--plugin hybrid_parallel --tp_size 2", 2, True),
        ("--plugin hybrid_parallel --tp_size 2", 4, False),
        ("--plugin hybrid_parallel --tp_size 2 --zero_stage 1", 2, False),
        ("--plugin hybrid_parallel --pp_size 2", 2, True),
        ("--plugin hybrid_parallel --tp_size 2 --pp_size 2", 4, True),
        ("--plugin hybrid_parallel --pp_size 2", 4, False),
        ("--plugin torch_ddp", 2, False),
    ],
)
def test_which_collectives_a_cuda_graph_records(monkeypatch, flags, processes, is_recorded):
    """As on GPUs: ZeRO's, and those of processes that hold one model."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: processes)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    args = train_parser().parse_args(["--cuda_graph", *flags.split()])
    here = Place(0, processes, 0, torch.device("cuda", 0))
    if is_recorded:
        assert checks.settle(args, here).cuda_graph
    else:
        with pytest.raises(UserError, match=f"--tp_size x --pp_size {processes} "):
            checks.settle(args, here)
