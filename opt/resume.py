"""Training state on disk: saved whole or not at all, found again, taken up where it stopped.

A checkpoint is a folder <output_path>/checkpoints/step-00000123 with the model and Adam's state as whole, named tensors
(safetensors), the random-number state of every process, state.json, and manifest.json with each file's size and checksum. It
is written under another name, flushed to disk and renamed; `latest` names the newest. Nothing in it is a pickle.
"""

import hashlib
import json
import os
import re
import shutil
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from args import UserError

from .build import Built
from .checkpoint import flush_to_disk, whole_parameters, write_shards
from .launch import Place
from .state import OptimizerState, grad_scaler
from .weights import CheckpointWeights, place

# What must be the same for a run to go on: with other data, order or model it would be another run.
_SAME = ("dataset", "text_column", "max_length", "eval_fraction", "seed")


@dataclass
class Position:
    """How far a run has come."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # the epoch that the next step belongs to
    rows: int = 0  # rows of that epoch done, over all data-parallel ranks


def folder(output_directory: Path) -> Path:
    """Where the checkpoints of a run are."""
    return output_directory / "checkpoints"


def save(directory: Path, built: Built, here: Place, position: Position, args: Namespace, keep: int | None) -> None:
    """Write a checkpoint; to be called by all processes. `keep`: older ones beyond this number are removed."""
    final, aside = directory / f"step-{position.step:08d}", directory / ".writing"
    if here.is_main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()

    write_shards(whole_parameters(built.model), built.parallel, aside / "model")
    state = _optimizer_state(built)
    for key in state.keys:
        write_shards(state.whole(key), built.parallel, aside / key)
    (aside / "rng").mkdir(exist_ok=True)
    save_file(_rng_state(here), aside / "rng" / f"rank-{here.rank:05d}.safetensors")
    if here.is_main:
        scaler = grad_scaler(built.optimizer)
        content = {
            "position": asdict(position),
            "world_size": here.world_size,
            "keys": state.keys,
            "scaler": {k: float(v) for k, v in scaler.state_dict().items()} if scaler else None,
            "arguments": vars(args),
        }
        (aside / "state.json").write_text(json.dumps(content, indent=1) + "\n")
    dist.barrier()
    if here.is_main:
        _seal(aside)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        pointer = directory / ".latest.writing"
        pointer.write_text(final.name + "\n")
        flush_to_disk(pointer)
        pointer.replace(directory / "latest")
        flush_to_disk(directory)
        for old in _complete(directory)[:-keep] if keep else []:
            shutil.rmtree(old)
    dist.barrier()


def find(which: str, output_directory: Path, args: Namespace) -> Path | None:
    """The checkpoint that --resume names, checked file by file; None for `auto` where there is none. Raises UserError."""
    if which == "auto":
        there = _complete(folder(output_directory))
        if not there:
            return None
        checkpoint = there[-1]
    else:
        checkpoint = Path(which)
        if not (checkpoint / "manifest.json").is_file():
            raise UserError(f"--resume {which}: no complete checkpoint (a folder with manifest.json); give one, or auto for the newest")
    damaged = _damage(checkpoint)
    if damaged:
        before = [c for c in _complete(checkpoint.parent) if c.name < checkpoint.name]
        offer = f"--resume {before[-1]}" if before else "start anew, without --resume: there is none before it"
        raise UserError(f"checkpoint {checkpoint} is damaged ({damaged}): {offer}")
    before = json.loads((checkpoint / "state.json").read_text())["arguments"]
    for name in _SAME:
        if before[name] != getattr(args, name):
            raise UserError(f"checkpoint {checkpoint} was made with --{name} {before[name]}, not {getattr(args, name)}: give the same, or start anew")
    return checkpoint


def position_of(checkpoint: Path) -> Position:
    """How far the run had come."""
    return Position(**json.loads((checkpoint / "state.json").read_text())["position"])


def restore(checkpoint: Path, built: Built, here: Place) -> None:
    """Put a checkpoint's state into a run that has been built; to be called by all processes.

    The optimizer's state goes to another number of data-parallel ranks as well; a plugin that keeps other tensors than the
    one that saved them (an fp32 copy of the weights) makes them from the model. The random-number state is taken up where the
    number of processes is the same.
    """
    content = json.loads((checkpoint / "state.json").read_text())
    place(built.model, built.optimizer, CheckpointWeights(checkpoint / "model"))
    state = _optimizer_state(built)
    for key in state.keys:
        if key in content["keys"]:
            state.load(key, CheckpointWeights(checkpoint / key))
    step = content["position"]["step"]
    state.set_steps(step)
    built.schedule.last_epoch = step - 1
    built.schedule.step()
    scaler = grad_scaler(built.optimizer)
    if scaler and content["scaler"]:
        like = scaler.state_dict()
        scaler.load_state_dict({k: _like(like[k], v) for k, v in content["scaler"].items()})
    if content["world_size"] == here.world_size:
        saved = load_file(checkpoint / "rng" / f"rank-{here.rank:05d}.safetensors")
        torch.set_rng_state(saved["cpu"])
        if "cuda" in saved and here.device.type == "cuda":
            torch.cuda.set_rng_state(saved["cuda"], here.device)


def _like(example, value: float):
    if isinstance(example, torch.Tensor):
        return torch.full_like(example, value)
    return type(example)(value)


def _optimizer_state(built: Built) -> OptimizerState:
    return OptimizerState(built.model, built.optimizer, built.parallel, built.shapes)


def _rng_state(here: Place) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if here.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(here.device)
    return state


def _complete(directory: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first. A folder of this name is complete: it got it by being renamed."""
    return sorted(p for p in directory.glob("step-*") if re.fullmatch(r"step-\d{8}", p.name) and p.is_dir())


def _files(checkpoint: Path) -> list[Path]:
    return sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != "manifest.json")


def _seal(checkpoint: Path) -> None:
    """Write the manifest, and everything to disk."""
    manifest = {}
    for file in _files(checkpoint):
        manifest[str(file.relative_to(checkpoint))] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        flush_to_disk(file)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    flush_to_disk(checkpoint / "manifest.json")
    flush_to_disk(checkpoint)


def _damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint's files, in words; empty if nothing."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
    except (OSError, ValueError):
        return "manifest.json cannot be read"
    for name, expected in manifest.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, not {expected['bytes']}"
        if _sha256(file) != expected["sha256"]:
            return f"{name} has changed since it was written"
    return ""


def _sha256(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
