"""2,000 steps with twenty kills and resumes end where 2,000 steps without do, and do not grow."""

import json
import random
import statistics
import time

import psutil
import pytest

from .conftest import REPO, SAMPLE_DATA, SAMPLE_MODEL, kill_all, losses, metrics, start

STEPS, SAVE_STEPS, KILLS = 2000, 25, 20
# Two processes; 4 rows a step.
FLAGS = [
    "--no_save",
    "--model_name_or_path",
    SAMPLE_MODEL,
    "--dataset",
    SAMPLE_DATA,
    "--batch_size",
    2,
    "--max_length",
    32,
]
FLAGS += [
    "--num_epoch",
    20,
    "--max_train_steps",
    STEPS,
    "--learning_rate",
    1e-3,
    "--save_steps",
    SAVE_STEPS,
]


def go(output, *more):
    with open(output.with_suffix(".log"), "a") as log:
        return start(
            REPO / "opt_train_demo.py",
            *FLAGS,
            "--output_path",
            output,
            *more,
            nproc=2,
            stdout=log,
            stderr=log,
        )


def newest_step(output) -> int:
    there = sorted((output / "checkpoints").glob("step-*"))
    return int(there[-1].name.removeprefix("step-")) if there else 0


@pytest.mark.long
def test_soak(tmp_path):
    through, killed = tmp_path / "through", tmp_path / "killed"
    process, memory = go(through), []  # memory: (step, bytes that the workers hold together)
    while process.poll() is None:
        time.sleep(1)
        try:
            workers = psutil.Process(process.pid).children()
            memory.append((newest_step(through), sum(w.memory_info().rss for w in workers)))
        except psutil.NoSuchProcess:
            break
    assert process.wait() == 0, (tmp_path / "through.log").read_text()[-3000:]

    chance = random.Random(0)
    for kill in range(KILLS):
        process, before = go(killed, "--resume", "auto"), newest_step(killed)
        limit = STEPS * (kill + 1) / (KILLS + 2)  # the kills are spread over the run
        while process.poll() is None and newest_step(killed) < max(before + 1, limit):
            time.sleep(0.02)
        assert process.poll() is None, (tmp_path / "killed.log").read_text()[-3000:]
        time.sleep(chance.uniform(0, 2))
        kill_all(process)
    assert go(killed, "--resume", "auto").wait() == 0, (tmp_path / "killed.log").read_text()[-3000:]

    assert [line["step"] for line in metrics(killed)] == [line["step"] for line in metrics(through)]
    assert len(losses(killed)) == STEPS and losses(killed) == losses(through)
    settled = [(step, size) for step, size in memory if STEPS / 4 < step < STEPS and size]
    slope, _ = statistics.linear_regression(*zip(*settled, strict=True))
    result = {
        "final_loss": losses(killed)[-1],
        "kilobytes_per_1000_steps": slope,
        "at_the_end_megabytes": settled[-1][1] / 1e6,
    }
    print(json.dumps(result))
    assert slope * 1000 < 20e6, f"host memory grows by {slope * 1000 / 1e6:.1f} MB in 1,000 steps"
