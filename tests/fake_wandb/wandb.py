"""Stands in for the wandb package, which no test installs: writes down what it is asked for."""

import json
import os
from types import SimpleNamespace


def _write(**what):
    with open(os.environ["FAKE_WANDB_FILE"], "a") as file:
        file.write(json.dumps(what) + "\n")


def init(**given):
    """As wandb.init: flags before the environment's variables."""
    if "WANDB_REFUSES" in os.environ:
        raise RuntimeError("api_key not configured (no-tty). call wandb.login")
    config = given.pop("config")
    _write(init=given, seed=config["seed"])
    project = given.get("project") or os.environ["WANDB_PROJECT"]
    return SimpleNamespace(
        id=given.get("id") or "made-up",
        project=project,
        log=lambda line, step: _write(log=line, step=step),
        finish=lambda: _write(finish=True),
    )
