"""What only several GPUs can show, through NCCL; skipped with fewer than two."""

import os
import signal
import time

import psutil
import pytest
import torch

from .conftest import (
    REPO,
    finish,
    losses,
    metrics,
    on_the_sample,
    start,
    train,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        0 < torch.cuda.device_count() < 2, reason="needs two CUDA devices, and this machine has one"
    ),
]

COMMON = [
    "--dropout",
    "0",
    "--num_epoch",
    "1",
    "--max_train_steps",
    "10",
    "--learning_rate",
    "1e-3",
    "--eval_fraction",
    "0",
]
HYBRID = ["--plugin", "hybrid_parallel"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> list[float]:
    """The losses of ten steps of 16 rows on one GPU, in fp32."""
    output = tmp_path_factory.mktemp("reference")
    train(
        output,
        *COMMON,
        "--precision",
        "fp32",
        "--batch_size",
        "16",
        env={"CUDA_VISIBLE_DEVICES": "0"},
    )
    found = losses(output)
    assert len(found) == 10 and found[-1] < found[0] - 0.3
    return found


@pytest.mark.parametrize(
    ("rows", "flags"),
    [
        (8, ["--plugin", "torch_ddp"]),
        (8, ["--plugin", "torch_ddp", "--compile"]),
        (8, ["--plugin", "low_level_zero"]),
        (8, ["--plugin", "low_level_zero", "--zero_stage", "2"]),
        (8, ["--plugin", "low_level_zero", "--compile"]),
        (8, ["--plugin", "low_level_zero", "--cuda_graph"]),
        (4, ["--plugin", "low_level_zero", "--cuda_graph", "--gradient_accumulation_steps", "2"]),
        (
            4,
            [
                "--plugin",
                "low_level_zero",
                "--cuda_graph",
                "--zero_stage",
                "2",
                "--gradient_accumulation_steps",
                "2",
            ],
        ),
        (8, ["--plugin", "gemini"]),
        (8, ["--plugin", "gemini", "--compile"]),
        (4, ["--plugin", "gemini", "--gradient_accumulation_steps", "2"]),
        (8, ["--plugin", "gemini", "--offload_optim_frac", "1"]),
        (8, [*HYBRID, "--tp_size", "1"]),
        (8, [*HYBRID, "--zero_stage", "1"]),
        (8, [*HYBRID, "--zero_stage", "1", "--cuda_graph"]),
        (16, [*HYBRID, "--tp_size", "2"]),
        (16, [*HYBRID, "--tp_size", "2", "--compile", "--fused_loss"]),
        (16, [*HYBRID, "--tp_size", "2", "--cuda_graph", "--fused_loss"]),
        (16, [*HYBRID, "--tp_size", "2", "--cuda_graph", "--fused_loss", "--compile"]),
        (
            8,
            [
                *HYBRID,
                "--tp_size",
                "2",
                "--cuda_graph",
                "--gradient_accumulation_steps",
                "2",
            ],
        ),
        (16, [*HYBRID, "--pp_size", "2"]),
        (16, [*HYBRID, "--pp_size", "2", "--no-padding_free"]),
        (16, [*HYBRID, "--pp_size", "2", "--cuda_graph", "--fused_loss"]),
        (16, [*HYBRID, "--pp_size", "2", "--cuda_graph", "--compile", "--num_microbatches", "8"]),
        (
            8,
            [*HYBRID, "--pp_size", "2", "--cuda_graph", "--gradient_accumulation_steps", "2"],
        ),
        (
            8,
            [*HYBRID, "--pp_size", "2", "--compile", "--gradient_accumulation_steps", "2"],
        ),
        (
            8,
            [
                *(*HYBRID, "--pp_size", "2", "--cuda_graph", "--compile"),
                *("--gradient_accumulation_steps", "2"),
            ],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else f"{value} rows",
)
def test_loss_curve_is_that_of_one_gpu(tmp_path, reference, rows, flags):
    """The same 16 rows a step, within the noise of 16 bits."""
    train(tmp_path, *COMMON, *flags, "--batch_size", str(rows), nproc=2)
    assert losses(tmp_path) == pytest.approx(reference, abs=0.03)


BLOCKS = [*COMMON, "--num_epoch", "5", "--block_size", "256", "--batch_size", "64"]


@pytest.fixture(scope="module")
def reference_of_blocks(tmp_path_factory) -> list[float]:
    """The losses of ten steps on one GPU, in fp32: of 64 full rows of 256 tokens, and of the few
    that are left, in turn."""
    output = tmp_path_factory.mktemp("blocks")
    train(output, *BLOCKS, "--precision", "fp32", env={"CUDA_VISIBLE_DEVICES": "0"})
    return losses(output)


def test_batches_in_halves_have_the_loss_curve_of_one_gpu(tmp_path, reference_of_blocks):
    """Recorded, 16,384 tokens go through cut layers on two streams, and fewer do not."""
    flags = [*HYBRID, "--tp_size", "2", "--compile", "--cuda_graph", "--fused_loss"]
    done = train(tmp_path, *BLOCKS, *flags, nproc=2)
    assert "AccumulateGrad" not in done.stderr  # PyTorch's warning of gradients from two streams
    assert len(reference_of_blocks) == 10
    assert reference_of_blocks[-1] < reference_of_blocks[0] - 0.3
    assert losses(tmp_path) == pytest.approx(reference_of_blocks, abs=0.03)


@pytest.mark.parametrize(("before", "after"), [(2, None), (None, 2)], ids=["2 to 1", "1 to 2"])
@pytest.mark.parametrize("plugin", ["low_level_zero", "gemini"])
def test_saved_on_some_gpus_and_resumed_on_others(tmp_path, reference, plugin, before, after):
    def go(output, nproc, *flags):
        rows = "8" if nproc else "16"
        one = {} if nproc else {"CUDA_VISIBLE_DEVICES": "0"}
        train(
            output,
            *COMMON,
            "--plugin",
            plugin,
            "--batch_size",
            rows,
            "--no_save",
            *flags,
            nproc=nproc,
            env=one,
        )

    go(tmp_path / "first", before, "--save_steps", "5")
    go(tmp_path / "second", after, "--resume", tmp_path / "first" / "checkpoints" / "step-00000005")
    assert [line["step"] for line in metrics(tmp_path / "second")] == list(range(1, 11))
    assert losses(tmp_path / "second") == pytest.approx(reference, abs=0.03)


def test_one_of_two_killed(tmp_path):
    """The other ends, and the launcher with it."""
    flags = [
        *on_the_sample(tmp_path),
        "--num_epoch",
        "1000",
        "--no_save",
    ]
    run = start(REPO / "opt_train_demo.py", *flags, "--plugin", "low_level_zero", nproc=2)
    file = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (file.is_file() and '"loss"' in file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.2)
    workers = [
        p
        for p in psutil.Process(run.pid).children(recursive=True)
        if "opt_train_demo.py" in " ".join(p.cmdline())
    ]
    os.kill(workers[-1].pid, signal.SIGKILL)
    killed = time.monotonic()
    assert finish(run, 60).returncode != 0
    assert time.monotonic() - killed < 60
    assert not any(w.is_running() for w in workers)
