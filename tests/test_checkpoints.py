"""A run that stopped and went on is the run that did not stop: curve, model, files; under every plugin."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .conftest import SAMPLE_MODEL, losses, metrics, train

HYBRID = ("--plugin", "hybrid_parallel")
# name: processes, flags, how near the losses after the resume are to those of the run that went through
RUNS = {
    "torch_ddp": (1, ("--plugin", "torch_ddp"), 0),
    "torch_ddp, accumulated": (2, ("--plugin", "torch_ddp", "--gradient_accumulation_steps", 2), 0),
    "torch_ddp, bf16": (2, ("--plugin", "torch_ddp", "--precision", "bf16"), 0),
    "torch_ddp_fp16": (1, ("--plugin", "torch_ddp_fp16", "--batch_size", 2), 0),
    "low_level_zero, fp32": (2, ("--plugin", "low_level_zero"), 0),
    "low_level_zero, stage 2, bf16": (2, ("--plugin", "low_level_zero", "--zero_stage", 2, "--precision", "bf16"), 0),
    "gemini": (2, ("--plugin", "gemini"), 0),
    "gemini, offloaded, accumulated": (2, ("--plugin", "gemini", "--offload_optim_frac", 1, "--gradient_accumulation_steps", 2), 0),
    "tp=2": (2, (*HYBRID, "--tp_size", 2), 0),
    "pp=2, bf16": (2, (*HYBRID, "--pp_size", 2, "--precision", "bf16"), 0),
    "tp=2 x pp=2": (4, (*HYBRID, "--tp_size", 2, "--pp_size", 2), 0),
    "dp=2, ZeRO 1, tp=2": (4, (*HYBRID, "--tp_size", 2, "--zero_stage", 1, "--precision", "bf16"), 0),
}
STEPS, SAVED, PER_EPOCH = 9, 6, 4


def start(output, name, *more):
    """Nine steps of `name`'s in epochs of four, dropout on, a checkpoint at 3, 4, 6, 8 and 9."""
    processes, flags, _ = RUNS[name]
    return train(
        output, *flags, *more, "--save_steps", 3, "--save_total_limit", 9, "--eval_steps", 3, nproc=processes if processes > 1 else None
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The sample's, with a vocabulary that two ranks cannot share evenly."""
    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(SAMPLE_MODEL, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 2049, "num_hidden_layers": 2, "dropout": 0.2}))
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_resumed_run_is_the_uninterrupted_one(name, model, tmp_path):
    near = RUNS[name][2]
    processes, flags = RUNS[name][0], RUNS[name][1]
    sizes = dict(zip(flags[::2], flags[1::2], strict=True))
    ranks = processes // (sizes.get("--tp_size", 1) * sizes.get("--pp_size", 1))
    rows = ranks * sizes.get("--batch_size", 4) * sizes.get("--gradient_accumulation_steps", 1)
    data = tmp_path / "texts.txt"
    data.write_text("".join(f"{'word ' * (n % 13 + 3)}number {n}\n" for n in range(rows * PER_EPOCH + 2)))  # and 2 held out
    common = ("--model_name_or_path", model, "--dataset", data, "--eval_fraction", 2 / (rows * PER_EPOCH + 2))
    common += ("--max_train_steps", STEPS, "--learning_rate", 3e-3) + (() if "--batch_size" in flags else ("--batch_size", 4))

    start(tmp_path / "through", name, *common)
    saved = sorted(p.name for p in (tmp_path / "through" / "checkpoints").glob("step-*"))
    assert saved == [f"step-{n:08d}" for n in (3, 4, 6, 8, 9)]
    start(tmp_path / "resumed", name, *common, "--resume", tmp_path / "through" / "checkpoints" / f"step-{SAVED:08d}")

    assert len(losses(tmp_path / "through")) == STEPS
    assert losses(tmp_path / "resumed") == pytest.approx(losses(tmp_path / "through"), abs=near)
    for through, resumed in zip(metrics(tmp_path / "through"), metrics(tmp_path / "resumed"), strict=True):
        times = ("seconds", "tokens_per_second")
        assert {k: v for k, v in resumed.items() if k not in times} == {k: v for k, v in through.items() if k not in times}
    before, after = (load_file(tmp_path / run / "model.safetensors") for run in ("through", "resumed"))
    assert all(torch.equal(before[key], after[key]) for key in before)
