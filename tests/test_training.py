"""Ten steps of opt_train_demo.py under every plugin are ten steps of a plain PyTorch loop: of a
title, which has no loss, and the description behind it."""

import csv
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from opt.data import tokens
from opt.data.batches import Batches
from opt.data.rows import Dataset, Rows

from .conftest import SAMPLE_DATA, SAMPLE_MODEL, metrics, tokenize, train

TEXTS, EVAL_FRACTION, SEED, MAX_LENGTH = 94, 0.1, 5, 128  # of 94 texts, 9 are held out
# The last step of an epoch has 5 of its 85 rows
ROWS, STEPS, STEPS_PER_EPOCH, EVAL_STEPS, WARMUP = (
    16,
    10,
    6,
    4,
    2,
)
LEARNING_RATE, WEIGHT_DECAY, MAX_NORM = 1e-3, 0.1, 0.7
BETAS, EPSILON = (0.7, 0.9), 1e-4  # far from the defaults, which would show

HYBRID = ("--plugin", "hybrid_parallel")


@dataclass
class Run:
    """A start of opt_train_demo.py: all of them do the same ten steps."""

    nproc: int | None
    flags: tuple
    near: float = 1e-4  # how near its losses must be to the plain loop's, in fp32
    steps: int = STEPS


RUNS = {
    "torch_ddp": Run(2, ("--plugin", "torch_ddp", "--batch_size", 8, "--report_to", "tensorboard")),
    # Three steps, since a CPU is slow in fp16: their learning rates are those of the others, as the
    # third is the first after the warm-up.
    "torch_ddp_fp16": Run(
        2,
        (
            "--plugin",
            "torch_ddp_fp16",
            "--batch_size",
            8,
            "--max_train_steps",
            3,
        ),
        near=0.02,
        steps=3,
    ),
    "low_level_zero": Run(2, ("--plugin", "low_level_zero", "--batch_size", 8, "--fused_loss")),
    # --scale_lr doubles the rate for two data-parallel ranks, and leaves it alone for two
    # tensor-parallel ones.
    "low_level_zero, stage 2": Run(
        2,
        (
            "--plugin",
            "low_level_zero",
            "--zero_stage",
            2,
            "--batch_size",
            8,
            "--scale_lr",
            "--learning_rate",
            LEARNING_RATE / 2,
        ),
    ),
    # bf16 weights with fp32 copies have an update of their own (opt/colossal/copies.py), with one
    # process and with several.
    "low_level_zero, bf16": Run(
        2, ("--plugin", "low_level_zero", "--precision", "bf16", "--batch_size", 8), near=0.02
    ),
    "low_level_zero, bf16, accumulated": Run(
        2,
        (
            "--plugin",
            "low_level_zero",
            "--precision",
            "bf16",
            "--batch_size",
            4,
            "--gradient_accumulation_steps",
            2,
        ),
        near=0.02,
    ),
    "low_level_zero, bf16, alone": Run(
        None, ("--plugin", "low_level_zero", "--precision", "bf16", "--batch_size", 16), near=0.02
    ),
    "tp=2, zero 1, bf16": Run(
        2,
        (*HYBRID, "--tp_size", 2, "--zero_stage", 1, "--precision", "bf16", "--batch_size", 16),
        near=0.02,
    ),
    "pp=2 x dp=2, zero 1, bf16": Run(
        4,
        (*HYBRID, "--pp_size", 2, "--zero_stage", 1, "--precision", "bf16", "--batch_size", 8),
        near=0.02,
    ),
    "tp=2 x pp=2, bf16": Run(
        4,
        (*HYBRID, "--tp_size", 2, "--pp_size", 2, "--precision", "bf16", "--batch_size", 16),
        near=0.02,
    ),
    "gemini": Run(2, ("--plugin", "gemini", "--batch_size", 8, "--fused_loss"), near=0.02),
    "gemini, fp16": Run(
        2,
        (
            "--plugin",
            "gemini",
            "--precision",
            "fp16",
            "--batch_size",
            8,
            "--max_train_steps",
            3,
        ),
        near=0.02,
        steps=3,
    ),
    "gemini, compiled, alone": Run(
        None, ("--plugin", "gemini", "--batch_size", 16, "--compile", "--fused_loss"), near=0.02
    ),
    "tp=2": Run(2, (*HYBRID, "--tp_size", 2, "--batch_size", 16, "--scale_lr")),
    "pp=2": Run(2, (*HYBRID, "--pp_size", 2, "--batch_size", 16, "--fused_loss")),
    "tp=2 x pp=2": Run(4, (*HYBRID, "--tp_size", 2, "--pp_size", 2, "--batch_size", 16)),
    "pp=2 x dp=2": Run(4, (*HYBRID, "--pp_size", 2, "--batch_size", 8, "--padding_free")),
    "tp=2 x dp=2, accumulated": Run(
        4, (*HYBRID, "--tp_size", 2, "--batch_size", 4, "--gradient_accumulation_steps", 2)
    ),
    "torch_ddp, accumulated": Run(
        2, ("--plugin", "torch_ddp", "--batch_size", 4, "--gradient_accumulation_steps", 2)
    ),
    "torch_ddp, padded": Run(2, ("--plugin", "torch_ddp", "--batch_size", 8, "--no-padding_free")),
    "gemini, padded": Run(
        2, ("--plugin", "gemini", "--batch_size", 8, "--no-padding_free"), near=0.02
    ),
    "low_level_zero, accumulated": Run(
        2,
        (
            "--plugin",
            "low_level_zero",
            "--batch_size",
            4,
            "--gradient_accumulation_steps",
            2,
            "--grad_checkpoint",
        ),
    ),
    "gemini, accumulated": Run(
        2, ("--plugin", "gemini", "--batch_size", 4, "--gradient_accumulation_steps", 2), near=0.02
    ),
    "pp=2, accumulated": Run(
        2,
        (
            *HYBRID,
            "--pp_size",
            2,
            "--batch_size",
            8,
            "--gradient_accumulation_steps",
            2,
            "--grad_checkpoint",
        ),
    ),
}
# What has a near relative above, or takes a minute to compile
LONG = (
    *("gemini, compiled, alone", "tp=2 x pp=2, bf16", "torch_ddp, padded"),
    "pp=2 x dp=2, zero 1, bf16",
)


class Runs:
    """All runs, each made when it is first asked for; and what they are judged by."""

    def __init__(self, folder: Path):
        self.folder, self._done = folder, {}
        self.model, self.texts = folder / "model", folder / "texts.csv"
        torch.manual_seed(0)
        # Not ReLU: parallel plugins add up in another order, and a unit whose input rounds to the
        # other side of 0 gives another gradient. One such unit at the start token, which all rows
        # share, moved the losses by 4e-4.
        config = OPTConfig.from_pretrained(SAMPLE_MODEL, init_std=0.06, activation_function="gelu")
        OPTForCausalLM(config).save_pretrained(self.model)
        AutoTokenizer.from_pretrained(SAMPLE_MODEL).save_pretrained(self.model)
        with open(SAMPLE_DATA, newline="") as sample, open(self.texts, "w", newline="") as part:
            rows = list(csv.DictReader(sample))[:TEXTS]
            writer = csv.DictWriter(part, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)

    def output(self, name: str) -> Path:
        """The output directory of a run. What it printed is in the file `stdout`."""
        if name in self._done:
            return self._done[name]
        output = self.folder / f"output {name}"
        given = {
            "--model_name_or_path": self.model,
            "--dataset": self.texts,
            "--prompt_column": "title",
            "--response_column": "description",
            "--eval_fraction": EVAL_FRACTION,
            "--max_length": MAX_LENGTH,
            "--seed": SEED,
            "--dropout": 0,
            "--learning_rate": LEARNING_RATE,
            "--weight_decay": WEIGHT_DECAY,
            "--adam_beta1": BETAS[0],
            "--adam_beta2": BETAS[1],
            "--adam_epsilon": EPSILON,
            "--lr_scheduler_type": "cosine",
            "--warmup_steps": WARMUP,
            "--max_norm": MAX_NORM,
            "--num_epoch": 2,
            "--max_train_steps": STEPS,
            "--eval_steps": EVAL_STEPS,
        }
        run = RUNS[name]
        flags = [part for pair in given.items() if pair[0] not in run.flags for part in pair]
        done = train(output, *flags, *run.flags, nproc=run.nproc, env={"CUDA_VISIBLE_DEVICES": ""})
        (output / "stdout").write_text(done.stdout)
        self._done[name] = output
        return output

    @functools.cached_property
    def dataset(self) -> Dataset:
        """What all of them train on."""
        tokenizer = tokens.load_tokenizer(self.model)
        flags = ("--prompt_column", "title", "--response_column", "description")
        return tokenize(self.texts, None, MAX_LENGTH, EVAL_FRACTION, SEED, tokenizer, *flags)

    @functools.cached_property
    def labels(self) -> dict[tuple, list]:
        """{ids of a row: its labels}, by the tokenizer alone: BOS, title, description, EOS."""
        tokenizer, found = AutoTokenizer.from_pretrained(self.model), {}
        with open(self.texts, newline="") as texts:
            for row in csv.DictReader(texts):
                title, description = (
                    tokenizer(row[name], add_special_tokens=False)["input_ids"]
                    for name in ("title", "description")
                )
                end = [*description, tokenizer.eos_token_id]
                ids = (tokenizer.bos_token_id, *title, *end)
                found[ids] = [-100] * (len(title) + 1) + end
        return found

    @functools.cached_property
    def plain(self) -> dict:
        """Losses, norms and the rest of a plain PyTorch loop."""
        return plain_loop(self.model, self.dataset, self.labels)


@functools.cache
def runs_in(folder: Path) -> Runs:
    """The runs of this session: tests/test_export.py asks for the same."""
    folder.mkdir()
    return Runs(folder)


def all_rows(rows: Rows) -> list:
    return [rows[i] for i in range(len(rows))]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return runs_in(tmp_path_factory.getbasetemp() / "runs")


def plain_loop(directory: Path, dataset: Dataset, labels: dict[tuple, list]) -> dict:
    """The same ten steps without this project and without ColossalAI, but for the order of the
    rows."""
    model = OPTForCausalLM.from_pretrained(directory, dropout=0.0, attention_dropout=0.0)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON)

    def loss_of(rows):
        """transformers' own: the mean over all targets that are not -100."""
        batch = {
            "input_ids": (rows, model.config.pad_token_id),
            "labels": ([labels[tuple(row)] for row in rows], -100),
            "attention_mask": ([[1] * len(row) for row in rows], 0),
        }
        longest = max(map(len, rows))
        padded = {
            name: torch.tensor([[*row, *[pad] * (longest - len(row))] for row in content])
            for name, (content, pad) in batch.items()
        }
        return model(**padded).loss

    def evaluate():
        with torch.no_grad():
            return loss_of([row.tolist() for row in all_rows(dataset.held_out)]).item()

    def batches(epoch):
        order = Batches(dataset.train, ROWS, 0, 1, model.config.pad_token_id, seed=SEED)
        for batch in order.epoch(epoch):
            rows = zip(batch.inputs["input_ids"], batch.inputs["labels"] != -100, strict=True)
            yield [row[: int(of.nonzero().max()) + 1].tolist() for row, of in rows if of.any()]

    found = {"loss": [], "grad_norm": [], "lr": [], "tokens": []}
    evaluations = {0: evaluate()}
    for step, batch in enumerate([*batches(0), *batches(1)][:STEPS], start=1):
        done = (step - 1 - WARMUP) / (STEPS - WARMUP)
        lr = LEARNING_RATE * (
            step / WARMUP if step <= WARMUP else 0.5 * (1 + math.cos(math.pi * done))
        )
        for group in adamw.param_groups:
            group["lr"] = lr
        loss = loss_of(batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        adamw.step()
        adamw.zero_grad()
        real_tokens = sum(map(len, batch))
        for key, value in (
            ("loss", loss.item()),
            ("grad_norm", norm.item()),
            ("lr", lr),
            ("tokens", real_tokens),
        ):
            found[key].append(value)
        if step % EVAL_STEPS == 0 or step == STEPS:
            evaluations[step] = evaluate()
    return found | {"evaluations": evaluations}


def test_the_plain_loop_is_a_fair_judge(runs):
    """It learns, it clips, and its batches are ragged: an error in any of these would show."""
    plain, dataset = runs.plain, runs.dataset
    assert (len(dataset.train), len(dataset.held_out)) == (85, 9)
    assert plain["loss"][0] - plain["loss"][-1] > 0.5
    assert all(norm > MAX_NORM for norm in plain["grad_norm"])
    assert len(set(dataset.train.lengths)) > 10


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in RUNS],
)
def test_losses_are_those_of_a_plain_loop(name, runs):
    run, lines = RUNS[name], metrics(runs.output(name))
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, run.steps + 1))
    plain = {key: runs.plain[key][: run.steps] for key in ("loss", "lr", "tokens", "grad_norm")}
    assert [line["loss"] for line in steps] == pytest.approx(plain["loss"], abs=run.near)
    assert [line["lr"] for line in steps] == pytest.approx(plain["lr"])
    assert [line["tokens"] for line in steps] == plain["tokens"]
    if name != "gemini, fp16":  # there it has the loss scale in it, and is not written
        assert [line["grad_norm"] for line in steps] == pytest.approx(
            plain["grad_norm"], rel=1e-3 if run.near < 1e-3 else 0.02
        )

    evaluations = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert list(evaluations) == ([0, 4, 8, 10] if run.steps == STEPS else [0, run.steps])
    wanted = {step: loss for step, loss in runs.plain["evaluations"].items() if step in evaluations}
    assert {step: evaluations[step] for step in wanted} == pytest.approx(wanted, abs=run.near)


@pytest.mark.parametrize("name", ["torch_ddp", "gemini", "tp=2 x pp=2"])
def test_metrics_say_what_they_should(name, runs):
    dataset = runs.dataset
    lines = metrics(runs.output(name))
    assert lines[0]["step"] == 0
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 10], (
        "an evaluation follows its step"
    )
    for line in lines:
        if "eval_loss" in line:
            assert line.keys() == {"step", "eval_loss", "eval_perplexity"}
            assert math.isclose(line["eval_perplexity"], math.exp(line["eval_loss"]))
        else:
            assert list(line) == [
                "step",
                "epoch",
                "loss",
                "lr",
                "grad_norm",
                "tokens",
                "tokens_per_second",
                "seconds",
            ]
            assert line["seconds"] > 0 and math.isclose(
                line["tokens_per_second"], line["tokens"] / line["seconds"]
            )
            epochs, steps = divmod(line["step"], STEPS_PER_EPOCH)
            assert line["epoch"] == pytest.approx(
                epochs + steps * ROWS / len(dataset.train), abs=1e-4
            )
    epoch = [
        line["tokens"]
        for line in lines
        if 1 <= line["step"] <= STEPS_PER_EPOCH and "tokens" in line
    ]
    assert sum(epoch) == dataset.train.lengths.sum()


def test_what_else_a_run_leaves(runs):
    output = runs.output("torch_ddp")
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "model.safetensors" in next(
        line for line in (output / "stdout").read_text().splitlines() if "weights " in line
    )

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    lines = metrics(output)
    for name in ("loss", "eval_loss", "lr"):
        recorded = [(event.step, event.value) for event in events.Scalars(name)]
        wanted = [(line["step"], line[name]) for line in lines if name in line]
        assert [step for step, _ in recorded] == [step for step, _ in wanted]
        assert [value for _, value in recorded] == pytest.approx([value for _, value in wanted])
    assert not (runs.output("gemini") / "tensorboard").exists()
