"""A run that stopped and went on is the run that did not stop: curve, model, files; under every
plugin."""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import OPTConfig, OPTForCausalLM

from opt.data.rows import Rows
from opt.errors import UserError
from opt.train import checkpoints

from . import conftest
from .conftest import (
    REPO,
    SAMPLE_DATA,
    SAMPLE_MODEL,
    like_the_sample,
    losses,
    metrics,
    run,
    train,
)

HYBRID = ("--plugin", "hybrid_parallel")
# name: processes, flags, how near the losses after the resume are to those of the run that went
# through
RUNS = {
    "torch_ddp": (1, ("--plugin", "torch_ddp"), 0),
    "torch_ddp, accumulated": (2, ("--plugin", "torch_ddp", "--gradient_accumulation_steps", 2), 0),
    "torch_ddp, bf16": (2, ("--plugin", "torch_ddp", "--precision", "bf16"), 0),
    "torch_ddp_fp16": (1, ("--plugin", "torch_ddp_fp16", "--batch_size", 2), 0),
    "low_level_zero, fp32": (2, ("--plugin", "low_level_zero"), 0),
    "low_level_zero, stage 2, bf16": (
        2,
        ("--plugin", "low_level_zero", "--zero_stage", 2, "--precision", "bf16"),
        0,
    ),
    "low_level_zero, one process, bf16": (
        1,
        ("--plugin", "low_level_zero", "--precision", "bf16"),
        0,
    ),
    "gemini": (2, ("--plugin", "gemini"), 0),
    "gemini, one process": (1, ("--plugin", "gemini"), 0),
    "gemini, offloaded, accumulated": (
        2,
        ("--plugin", "gemini", "--offload_optim_frac", 1, "--gradient_accumulation_steps", 2),
        0,
    ),
    "gemini, offloaded in 16 bits, accumulated": (
        2,
        (
            *("--plugin", "gemini", "--offload_optim_frac", 1, "--gradient_accumulation_steps", 2),
            *("--optim", "adamw_anyprecision"),
        ),
        0,
    ),
    "tp=2": (2, (*HYBRID, "--tp_size", 2), 0),
    "pp=2, bf16": (2, (*HYBRID, "--pp_size", 2, "--precision", "bf16"), 0),
    "tp=2 x pp=2": (4, (*HYBRID, "--tp_size", 2, "--pp_size", 2), 0),
    # The loss scales of fp16, each plugin's own.
    "low_level_zero, fp16": (2, ("--plugin", "low_level_zero", "--precision", "fp16"), 0),
    "gemini, fp16": (2, ("--plugin", "gemini", "--precision", "fp16"), 0),
    "tp=2, fp16": (2, (*HYBRID, "--tp_size", 2, "--precision", "fp16"), 0),
    "dp=2, ZeRO 1, tp=2": (
        4,
        (*HYBRID, "--tp_size", 2, "--zero_stage", 1, "--precision", "bf16"),
        0,
    ),
}
SHORT = (
    "torch_ddp, accumulated",
    "low_level_zero, stage 2, bf16",
    "gemini, offloaded, accumulated",
    "tp=2",
)
STEPS, SAVED, PER_EPOCH = 9, 6, 4


def long(*values):
    """A case for test_ci.sh --full alone."""
    return pytest.param(*values, marks=pytest.mark.long)


def gpu(flags):
    """A case for one process on a GPU."""
    return pytest.param(None, flags, marks=pytest.mark.gpu)


def start(output, name, *more):
    """Nine steps of `name`'s in epochs of four, dropout on, a checkpoint at 3, 4, 6, 8 and 9."""
    processes, flags, _ = RUNS[name]
    return train(
        output,
        *flags,
        *more,
        "--save_steps",
        3,
        "--save_total_limit",
        9,
        "--eval_steps",
        3,
        nproc=processes if processes > 1 else None,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The sample's, with a vocabulary that two ranks cannot share evenly."""
    folder = tmp_path_factory.mktemp("model") / "model"
    return like_the_sample(folder, vocab_size=2049, num_hidden_layers=2, dropout=0.2)


@pytest.mark.parametrize("name", [name if name in SHORT else long(name) for name in RUNS])
def test_resumed_run_is_the_uninterrupted_one(name, model, tmp_path):
    near = RUNS[name][2]
    processes, flags = RUNS[name][0], RUNS[name][1]
    sizes = dict(zip(flags[::2], flags[1::2], strict=True))
    ranks = processes // (sizes.get("--tp_size", 1) * sizes.get("--pp_size", 1))
    rows = ranks * sizes.get("--batch_size", 4) * sizes.get("--gradient_accumulation_steps", 1)
    texts = tmp_path / "texts.txt"
    # And 2 held out
    texts.write_text(
        "".join(f"{'word ' * (n % 13 + 3)}number {n}\n" for n in range(rows * PER_EPOCH + 2))
    )
    common = (
        "--model_name_or_path",
        model,
        "--dataset",
        texts,
        "--eval_fraction",
        2 / (rows * PER_EPOCH + 2),
    )
    common += ("--max_train_steps", STEPS, "--learning_rate", 3e-3) + (
        () if "--batch_size" in flags else ("--batch_size", 4)
    )

    start(tmp_path / "through", name, *common)
    saved = sorted(p.name for p in (tmp_path / "through" / "checkpoints").glob("step-*"))
    assert saved == [f"step-{n:08d}" for n in (3, 4, 6, 8, 9)]
    start(
        tmp_path / "resumed",
        name,
        *common,
        "--resume",
        tmp_path / "through" / "checkpoints" / f"step-{SAVED:08d}",
    )

    assert len(losses(tmp_path / "through")) == STEPS
    assert losses(tmp_path / "resumed") == pytest.approx(losses(tmp_path / "through"), abs=near)
    for through, resumed in zip(
        metrics(tmp_path / "through"), metrics(tmp_path / "resumed"), strict=True
    ):
        times = ("seconds", "tokens_per_second")
        assert {k: v for k, v in resumed.items() if k not in times} == {
            k: v for k, v in through.items() if k not in times
        }
    files = sorted(file.name for file in (tmp_path / "through").glob("*.safetensors"))
    assert files
    for file in files:
        before, after = (
            load_file(tmp_path / "through" / file),
            load_file(tmp_path / "resumed" / file),
        )
        assert before.keys() == after.keys() and all(
            torch.equal(before[key], after[key]) for key in before
        )


@pytest.mark.parametrize(
    "nproc, flags",
    [
        (2, ("--plugin", "low_level_zero", "--precision", "bf16")),
        (2, (*HYBRID, "--tp_size", 2, "--precision", "bf16")),
        (2, (*HYBRID, "--pp_size", 2, "--zero_stage", 1, "--precision", "fp16")),
        (2, ("--plugin", "gemini")),
        (None, ("--plugin", "gemini", "--precision", "fp16")),
    ],
    ids=["low_level_zero", "tp=2", "pp=2, ZeRO 1, fp16", "gemini", "gemini alone, fp16"],
)
def test_adam_starts_from_the_given_weights_not_from_rounded_ones(nproc, flags, tmp_path):
    """Seen in a checkpoint after a step with a learning rate of 0."""
    torch.manual_seed(0)
    model = tmp_path / "model"
    shutil.copytree(SAMPLE_MODEL, model)
    given = OPTForCausalLM(OPTConfig.from_pretrained(SAMPLE_MODEL))
    given.save_pretrained(model)
    common = (
        "--model_name_or_path",
        model,
        "--learning_rate",
        0,
        "--max_train_steps",
        1,
        "--eval_fraction",
        0,
        "--save_steps",
        1,
        "--no_save",
    )
    train(tmp_path / "output", *common, *flags, nproc=nproc)
    saved = checkpoints.find("auto", tmp_path / "output").tensors("weights")
    for name, parameter in given.named_parameters():
        assert torch.equal(saved[name].float(), parameter.data), name


@pytest.fixture(scope="module")
def reference(model, tmp_path_factory) -> Path:
    """A folder with a run of torch_ddp on two processes, fp32, dropout off: 16 rows a step, four
    steps an epoch."""
    folder = tmp_path_factory.mktemp("reference")
    texts = folder / "texts.txt"
    texts.write_text("".join(f"{'word ' * (n % 13 + 3)}number {n}\n" for n in range(66)))
    flags = ("--batch_size", 8, "--save_steps", 3, "--save_total_limit", 9)
    train(folder / "output", *reference_flags(folder, model), *flags, nproc=2)
    return folder


def reference_flags(folder, model) -> tuple:
    given = {
        "--model_name_or_path": model,
        "--dataset": folder / "texts.txt",
        "--eval_fraction": 2 / 66,
        "--dropout": 0,
    }
    given |= {"--max_train_steps": STEPS, "--learning_rate": 3e-3}
    return tuple(part for pair in given.items() for part in pair)


@pytest.mark.parametrize(
    "processes, flags",
    [
        (4, ("--batch_size", 16, *HYBRID, "--tp_size", 2, "--pp_size", 2)),
        long(1, ("--batch_size", 16, "--plugin", "low_level_zero", "--precision", "fp32")),
        long(1, ("--batch_size", 8, "--gradient_accumulation_steps", 2)),
    ],
    ids=["tp=2 x pp=2", "low_level_zero on one rank", "torch_ddp on one rank"],
)
def test_resume_under_another_plugin_and_number_of_ranks(
    processes, flags, reference, model, tmp_path
):
    """Adam's state goes along: without it, or with a wrong part of it, the losses are off by far
    more."""
    checkpoint = reference / "output" / "checkpoints" / "step-00000003"
    done = train(
        tmp_path,
        *reference_flags(reference, model),
        *flags,
        "--resume",
        checkpoint,
        nproc=processes,
    )
    assert losses(tmp_path) == pytest.approx(losses(reference / "output"), abs=1e-5)
    assert ("model and Adam's state are taken over" in done.stdout) == ("--plugin" in flags)


def test_dropout_of_two_data_parallel_ranks_is_not_that_of_two_tensor_parallel_ones(
    reference, model, tmp_path
):
    """Ranks that hold shares of the same layers drop the same elements; those of two batches do
    not."""
    flags = (*reference_flags(reference, model), "--dropout", 0.2, "--no_save")
    flags = (*flags, "--save_steps", 1, "--batch_size", 8)
    train(tmp_path, *flags, "--max_train_steps", 1, nproc=2)
    tp = (*HYBRID, "--tp_size", 2, "--precision", "fp32", "--resume", "auto")
    train(tmp_path, *flags, "--max_train_steps", 2, *tp, nproc=2)
    for step, is_same in ((1, False), (2, True)):
        path = tmp_path / "checkpoints" / f"step-{step:08}"
        states = checkpoints.Checkpoint.read(path).tensors("rng")
        assert torch.equal(states["0/cpu"], states["1/cpu"]) == is_same


def test_resume_in_an_epoch_with_smaller_batches_leaves_out_no_row(reference, model, tmp_path):
    """After 48 of 64 rows, 16 are left: one step for two ranks of 8, six for one rank of 3."""
    checkpoint = reference / "output" / "checkpoints" / "step-00000003"
    train(
        tmp_path,
        *reference_flags(reference, model),
        "--max_train_steps",
        9,
        "--batch_size",
        3,
        "--no_save",
        "--resume",
        checkpoint,
    )
    tokens = [line["tokens"] for line in metrics(tmp_path) if "tokens" in line]
    through = [line["tokens"] for line in metrics(reference / "output") if "tokens" in line]
    assert tokens[:3] == through[:3] and sum(tokens[:9]) == sum(through[:4])
    assert [line["epoch"] for line in metrics(tmp_path) if "tokens" in line][-1] == 1


def refused(*flags) -> str:
    """The one line that a dry run ends with, exit code 2."""
    done = run(REPO / "opt_train_demo.py", *flags, "--dry_run")
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    return lines[0]


def test_what_is_damaged_is_named_and_the_one_before_offered(reference, model, tmp_path):
    def damaged(name, change) -> str:
        output = tmp_path / name
        shutil.copytree(reference / "output" / "checkpoints", output / "checkpoints")
        change(output / "checkpoints" / "step-00000009")
        with pytest.raises(UserError) as error:
            checkpoints.find("auto", output)
        assert f"--resume {output}/checkpoints/step-00000008" in str(error.value)
        assert (
            checkpoints.find(str(output / "checkpoints" / "step-00000008"), output).position.step
            == 8
        )
        return str(error.value)

    def truncate(path):
        os.truncate(path / "rank-00001.safetensors", 1000)

    def flip_a_bit(path):
        content = bytearray((path / "rank-00000.safetensors").read_bytes())
        content[len(content) // 2] ^= 1
        (path / "rank-00000.safetensors").write_bytes(content)

    assert "rank-00001.safetensors has 1000 bytes, not" in damaged("truncated", truncate)
    assert "rank-00000.safetensors is not what was written" in damaged("flipped", flip_a_bit)
    assert "state.json is missing" in damaged(
        "missing", lambda path: (path / "state.json").unlink()
    )
    assert "manifest.json cannot be read" in damaged(
        "manifest", lambda path: (path / "manifest.json").write_text("{")
    )

    output = tmp_path / "flipped"
    line = refused(*reference_flags(reference, model), "--output_path", output, "--resume", "auto")
    assert "step-00000009 is damaged" in line and "step-00000008" in line


def test_another_run_is_not_taken_up(reference, model, tmp_path):
    flags = reference_flags(reference, model)
    resume = ("--output_path", reference / "output", "--resume", "auto")
    assert "--seed 42, not 7" in refused(*flags, *resume, "--seed", 7)
    assert "of another model" in refused(*flags, *resume, "--model_name_or_path", SAMPLE_MODEL)
    assert "--resume auto" in refused(*flags, "--output_path", reference / "output")
    with pytest.raises(UserError, match="not a complete checkpoint"):
        checkpoints.find(str(tmp_path), tmp_path)

    # Nor goes on where another one's are, which would count as left behind, and be removed
    other = tmp_path / "other"
    shutil.copytree(reference / "output" / "checkpoints", other / "checkpoints")
    there = sorted(path.name for path in (other / "checkpoints").iterdir())
    elsewhere = reference / "output" / "checkpoints" / "step-00000003"
    resume = ("--output_path", other, "--resume", elsewhere)
    line = refused(*flags, *resume)
    assert "step-00000009 the newest" in line and "to go on from another, move them away" in line
    assert sorted(path.name for path in (other / "checkpoints").iterdir()) == there
    assert checkpoints.find(str(elsewhere), other, saves=False).path == elsewhere
    own = other / "checkpoints" / "step-00000003"
    assert checkpoints.find(str(own), other).path == own

    saved = checkpoints.find("auto", reference / "output")
    rows = Rows.__new__(Rows)
    rows.checksum = "that of other rows"
    with pytest.raises(UserError, match="--eval_fraction was .*, not 0.2"):
        checkpoints.check_same_run(
            saved, argparse.Namespace(**saved.state["arguments"] | {"eval_fraction": 0.2}), {}, rows
        )
    with pytest.raises(UserError, match="same flags, other texts or tokenizer"):
        checkpoints.check_same_run(saved, argparse.Namespace(**saved.state["arguments"]), {}, rows)


@pytest.mark.parametrize("kills", [5, long(50)])
def test_kill_while_saving(kills, tmp_path):
    """At a random moment: the newest complete checkpoint is found, whole; none that was complete is
    lost."""
    done = run(
        REPO / "tests" / "save_worker.py", tmp_path, kills, env={"TOKENIZERS_PARALLELISM": "false"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["kills"] == kills and counts["checkpoints"] > kills
    assert counts["half_written"] >= kills // 5, "kills that did not hit a save show nothing"


def on_a_small_disk(
    folder, size: str, launcher: str, flags: str, then: str, limit: int | str = "unlimited"
):
    """opt_train_demo.py with `folder` on a file system of `size`, and files of `limit` x 512 bytes
    at most, and then a shell command: what they print, and the lines of the script's errors."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("needs a mount namespace (unshare -rm)")
    script = (
        f"ulimit -f {limit}; mount -t tmpfs -o size={size} tmpfs {folder} && {shlex.quote(sys.executable)} {launcher} "
        f"opt_train_demo.py --model_name_or_path {SAMPLE_MODEL} --dataset {SAMPLE_DATA} "
        f"--output_path {folder} --batch_size 4 {flags}; echo code=$?; {then}"
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = done.stderr.splitlines()
    return done, [line for line in lines if line.startswith("opt_train_demo.py: error:")]


def test_disk_full_while_saving(tmp_path):
    """On a file system of 30 MB: two checkpoints of 13 MB fit, the third does not."""
    newest = f"{tmp_path}/checkpoints/step-00000006"
    done, errors = on_a_small_disk(
        tmp_path,
        "30m",
        "-m torch.distributed.run --standalone --nproc_per_node 2",
        "--no_save --save_steps 3 --max_train_steps 30",
        f"find {tmp_path}/checkpoints | sort; sha256sum {newest}/*; cat {newest}/manifest.json",
    )
    assert (
        len(errors) == 1 and "No space left on device" in errors[0] and "step-00000006" in errors[0]
    ), done.stderr
    # Torchrun's own words for "non-zero"
    assert "code=1" in done.stdout and "opt_train_demo.py FAILED" in done.stderr
    assert "Traceback" not in done.stderr.split("opt_train_demo.py: error:")[0]
    present = done.stdout.split("code=1")[1]
    assert "step-00000003\n" in present and "step-00000009\n" not in present.replace(
        ".writing-step-00000009", ""
    )
    sums = [
        line.split()[0]
        for line in present.splitlines()
        if "step-00000006/rank" in line and len(line.split()) == 2
    ]
    assert len(sums) == 2 and all(present.count(digest) == 2 for digest in sums), (
        "the old one is whole"
    )


def test_disk_full_at_the_end(tmp_path):
    """On a file system of 4 MB the model of 6 MB is not written, and one line says why."""
    done, errors = on_a_small_disk(tmp_path, "4m", "", "--max_train_steps 2", f"ls {tmp_path}")
    assert len(errors) == 1 and "No space left on device" in errors[0], done.stderr
    assert "Traceback" not in done.stderr
    assert "code=1" in done.stdout and "model.safetensors" not in done.stdout.split("code=1")[1]


@pytest.mark.parametrize(
    ("size", "limit", "name", "why"),
    [("7m", "unlimited", "model.bin", "No space left"), ("99m", 6000, "model", "File too large")],
    ids=["a full disk, .bin", "a limit, .safetensors"],
)
def test_what_a_disk_refuses_is_a_line(tmp_path, size, limit, name, why):
    flags = f"--max_train_steps 1 --eval_fraction 0 --output_path {tmp_path}/{name}"
    done, errors = on_a_small_disk(tmp_path, size, "", flags, f"ls {tmp_path}/*", limit)
    assert len(errors) == 1 and why in errors[0] and "make room" in errors[0], done.stderr
    assert "Traceback" not in done.stderr and "code=1" in done.stdout
    assert "metrics.jsonl" in done.stdout and f"{name}\n" not in done.stdout.split("code=1")[1]


class Started:
    """A run in the background, of the sample model, that can be sent signals."""

    def __init__(self, output, *arguments, nproc=None):
        given = (
            "--model_name_or_path",
            SAMPLE_MODEL,
            "--dataset",
            SAMPLE_DATA,
            "--output_path",
            output,
            "--no_save",
            *arguments,
        )
        self.metrics = Path(output) / "metrics.jsonl"
        self.process = conftest.start(REPO / "opt_train_demo.py", *given, nproc=nproc)

    def wait_for_step(self, step: int) -> None:
        """Until metrics.jsonl has it."""
        until = time.monotonic() + 90
        while (
            not self.metrics.exists() or f'"step": {step}, "epoch"' not in self.metrics.read_text()
        ):
            assert self.process.poll() is None and time.monotonic() < until, (
                self.process.communicate()[1]
            )
            time.sleep(0.05)

    @property
    def workers(self) -> list[psutil.Process]:
        """torchrun's processes, by rank."""
        return sorted(
            psutil.Process(self.process.pid).children(), key=lambda p: int(p.environ()["RANK"])
        )

    def end(self, timeout=60) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err


LONG_RUN = ("--batch_size", 4, "--num_epoch", 2, "--learning_rate", 1e-3, "--max_train_steps", 40)


@pytest.mark.parametrize("name, nproc", [("SIGINT", None), ("SIGTERM", 2), long("SIGUSR1", 2)])
def test_signal(name, nproc, tmp_path):
    """The step is finished, a checkpoint written, exit 0; the resumed run is the one that was not
    stopped."""
    started = Started(tmp_path / "stopped", *LONG_RUN, nproc=nproc)
    started.wait_for_step(1)
    if name == "SIGUSR1":  # torchrun does not hand this one on
        for worker in started.workers:
            worker.send_signal(signal.SIGUSR1)
    else:
        started.process.send_signal(getattr(signal, name))
    code, out, err = started.end()
    # torchrun itself ends with 1 when it is told to stop, whatever its processes end with.
    assert code == (1 if name == "SIGTERM" else 0), err
    (line,) = [line for line in out.splitlines() if line.startswith(name)]
    assert "--resume auto" in line
    (checkpoint,) = (tmp_path / "stopped" / "checkpoints").glob("step-*")
    assert str(checkpoint) in line and int(checkpoint.name[5:]) < 40
    if name == "SIGINT":
        train(tmp_path / "stopped", *LONG_RUN, "--no_save", "--resume", "auto", nproc=nproc)
        train(tmp_path / "through", *LONG_RUN, "--no_save", nproc=nproc)
        assert losses(tmp_path / "stopped") == losses(tmp_path / "through")


def test_second_signal_stops_at_once(tmp_path):
    """Also a process that waits in a collective for one that does not come."""
    started = Started(tmp_path, *LONG_RUN, nproc=2)
    started.wait_for_step(1)
    first, second = started.workers
    second.send_signal(signal.SIGSTOP)
    first.send_signal(signal.SIGINT)
    time.sleep(2.5)
    assert first.is_running() and first.status() != psutil.STATUS_ZOMBIE
    first.send_signal(signal.SIGINT)
    began = time.monotonic()
    gone, _ = psutil.wait_procs([first], timeout=10)
    waited = time.monotonic() - began
    second.send_signal(signal.SIGKILL)
    code, _, err = started.end()
    assert gone and waited < 5 and code != 0 and "second signal (SIGINT)" in err


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory) -> Path:
    """The sample model with a position, the 40th, that overflows: rows that are longer than that
    have no finite loss."""
    folder = tmp_path_factory.mktemp("poisoned")
    shutil.copytree(SAMPLE_MODEL, folder, dirs_exist_ok=True)
    model = OPTForCausalLM(OPTConfig.from_pretrained(SAMPLE_MODEL))
    model.model.decoder.embed_positions.weight.data[40 + 2] = 3e38  # OPT's positions start at 2
    model.save_pretrained(folder)
    rows = ["word " * 50 if n % 8 == 0 else f"short {n}" for n in range(64)]
    (folder / "texts.txt").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.parametrize(
    "nproc, flags",
    [
        (2, ("--batch_size", 1)),
        long(2, ("--batch_size", 1, "--plugin", "gemini", "--max_norm", 0)),
        long(2, ("--batch_size", 2, *HYBRID, "--tp_size", 2)),
        long(2, ("--batch_size", 2, *HYBRID, "--tp_size", 2, "--precision", "bf16")),
        (2, ("--batch_size", 1, "--plugin", "low_level_zero", "--precision", "bf16")),
        gpu(("--batch_size", 2, "--plugin", "torch_ddp", "--precision", "bf16")),
        gpu(("--batch_size", 2, "--plugin", "low_level_zero", "--precision", "bf16")),
        gpu(("--batch_size", 2, "--plugin", "low_level_zero", "--cuda_graph")),
        gpu(("--batch_size", 2, "--plugin", "low_level_zero", "--optim", "adamw_8bit")),
    ],
)
def test_steps_with_nan_are_skipped(nproc, flags, poisoned, tmp_path):
    flags = (
        *flags,
        "--model_name_or_path",
        poisoned,
        "--dataset",
        poisoned / "texts.txt",
        "--eval_fraction",
        0,
        "--num_epoch",
        1,
    )
    done = train(tmp_path, *flags, "--learning_rate", 1e-3, "--save_steps", 8, nproc=nproc)
    lines = metrics(tmp_path)
    skipped = [line["step"] for line in lines if line.get("skipped")]
    assert [line["step"] for line in lines if line["loss"] is None] == skipped and 3 <= len(
        skipped
    ) <= 8
    assert len(lines) == 32 and done.stdout.count("is skipped") == len(skipped)
    assert lines[-1]["loss"] is None or lines[0]["loss"] - lines[-1]["loss"] > 0.5, (
        "and it learns from the others"
    )
    weights = load_file(tmp_path / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    # Adam's bias correction goes by the updates, and not by the steps
    newest = checkpoints.find("auto", tmp_path)
    last = newest.position.step
    assert newest.state["updates"] == last - sum(step <= last for step in skipped) >= 16


@pytest.mark.long
def test_an_overflow_in_fp16_costs_its_step_alone(tmp_path):
    """Also where several batches add up, as Gemini's did into the gradients that had overflowed:
    low_level_zero, whose loss scale is the same, learns as much."""
    flags = ("--precision", "fp16", "--gradient_accumulation_steps", 2, "--batch_size", 4)
    flags += ("--max_train_steps", 14, "--warmup_steps", 0, "--dropout", 0, "--eval_steps", 7)
    flags += ("--model_name_or_path", REPO / "sample" / "opt-tiny", "--learning_rate", 3e-3)
    held_out = {}
    for plugin in ("gemini", "low_level_zero"):
        train(tmp_path / plugin, *flags, "--seed", 1, "--plugin", plugin, "--no_save")
        lines = metrics(tmp_path / plugin)
        held_out[plugin] = [line["eval_loss"] for line in lines if "eval_loss" in line]
    first, middle, last = held_out["low_level_zero"]
    assert first - middle > 0.3 and middle - last > 0.05
    assert held_out["gemini"] == pytest.approx([first, middle, last], abs=0.01)


def test_too_many_bad_steps_in_a_row(poisoned, tmp_path):
    """The run ends, its model is not written, and the checkpoint from before is named."""
    given = (
        "--model_name_or_path",
        poisoned,
        "--dataset",
        poisoned / "texts.txt",
        "--eval_fraction",
        0,
        "--batch_size",
        2,
    )
    flags = (
        "--output_path",
        tmp_path,
        *given,
        "--num_epoch",
        9,
        "--save_steps",
        1,
        "--max_bad_steps",
        2,
    )
    done = run(REPO / "opt_train_demo.py", *flags)
    lines = metrics(tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    good = [line["step"] for line in lines if line["loss"] is not None]
    assert good and [line["step"] for line in lines if line.get("skipped")][-2:] == [
        good[-1] + 1,
        good[-1] + 2,
    ]
    (error,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert f"step-{good[-1]:08d}" in error and "2 steps in a row" in error
    assert not (tmp_path / "model.safetensors").exists()
