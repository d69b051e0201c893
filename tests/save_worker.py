"""Kill -9 a process that saves without a pause, again and again; after each kill look for the
newest checkpoint.

    python tests/save_worker.py DIRECTORY KILLS

Child processes are forked from one that has the model built: a kill takes a fraction of a second,
not a start. The weights of a checkpoint are all its step's number, so that parts of two checkpoints
under one name would show.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from args import resolve, train_parser
from opt.colossal import processes
from opt.data import tokens
from opt.data.batches import Position
from opt.model import kernel_probe, weights
from opt.model.config import load_config
from opt.model.opt import meta_model
from opt.train import checkpoints
from opt.train.schedule import Steps
from opt.train.signals import Control
from opt_train_demo import boost
from tests.conftest import tokenize

SAMPLE = Path(__file__).resolve().parent.parent / "sample"


def save_for_ever(run, boosted, report: int) -> None:
    """What a run does that has nothing to do but to save: from the newest checkpoint on. Reports
    each that is complete."""
    found = checkpoints.find("auto", run.output)
    saver = checkpoints.Saver(run, Control(run.here), boosted)
    step = found.position.step if found else 0
    while True:
        step += 1
        for parameter in boosted.model.parameters():
            parameter.data.fill_(step)
        saver.begin(Position(step, 0, step), run.output / "metrics.jsonl")
        saver.finish()
        os.write(report, f"{step}\n".encode())


def main(output: Path, kills: int) -> None:
    """Prints one JSON line: kills, checkpoints made, and how many kills left a half-written one
    behind."""
    torch.set_num_threads(1)  # threads do not survive a fork
    here = processes.place()
    flags = train_parser().parse_args(["--dropout", "0", "--output_path", str(output)])
    plan = resolve(flags, here.device.type, kernel_probe.has_bf16(here.device))
    processes.start(here)
    torch.set_num_threads(1)
    config = load_config(SAMPLE / "opt-tiny")
    initial = weights.InitialWeights(meta_model(config), 0)
    boosted = boost(plan, here, config, initial, Steps.of_benchmark(1e-3))
    tokenizer = tokens.load_tokenizer(SAMPLE / "opt-tiny")
    dataset = tokenize(str(SAMPLE / "netflix_sample.csv"), "description", 64, 0.1, 1, tokenizer)
    (output / "metrics.jsonl").write_text("")
    run = SimpleNamespace(plan=plan, here=here, dataset=dataset, output=output)
    run.resumed_from, run.weights, run.copies_checkpoints = None, initial, True

    chance, made, in_the_middle = random.Random(0), 0, 0
    for _ in range(kills):
        reading, report = os.pipe()
        child = os.fork()
        if child == 0:
            save_for_ever(run, boosted, report)
        os.close(report)
        first = os.read(reading, 100)  # its first checkpoint of this round is complete
        assert first, "the child ended by itself"
        time.sleep(chance.uniform(0, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        reported = first
        while more := os.read(reading, 10000):
            reported += more
        os.close(reading)

        last = int(reported.split()[-1])
        found = checkpoints.find("auto", output)  # reads every byte
        assert found.position.step in (last, last + 1), (
            f"{last} was complete, {found.path} is found"
        )
        saved = found.tensors("weights")
        assert len(saved) == len(initial) and all(
            (saved[name] == found.position.step).all() for name in saved
        ), found.path
        assert json.loads(json.dumps(found.state["position"])) == {
            "step": found.position.step,
            "epoch": 0,
            "rows": found.position.step,
        }
        made = found.position.step
        in_the_middle += any((output / "checkpoints").glob(".writing-*"))
    print(json.dumps({"kills": kills, "checkpoints": made, "half_written": in_the_middle}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
