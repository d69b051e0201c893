"""Training state on disk: saved whole or not at all, found again, taken up where it stopped.

A checkpoint is a folder <output_path>/checkpoints/step-00000123:

    rank-00000.safetensors ...   a file a process: its share of the model and of Adam's moments, as
                                 whole tensors by name (weights/..., exp_avg/..., exp_avg_sq/...),
                                 in fp32 or, with --optim, as they are kept (in 8 bits with
                                 exp_avg_scale/..., exp_avg_sq_scale/...), and its random-number
                                 state (rng/...)
    state.json                   position in the data, Adam's count of updates, loss scale, plan,
                                 checksums of the data, the best evaluation so far
    metrics.jsonl                the run's up to here
    manifest.json                bytes and SHA-256 of each of these

Nothing in it is a pickle. It is written under another name, flushed to disk and renamed. Tensors
are copied to host memory while training waits (12 bytes a parameter over all processes, with
--optim 6 or 4); a thread writes them while it goes on. Where they are in host memory already
(--offload_optim_frac), or it has no room for a copy, training waits until they are written, a
tensor at a time.
"""

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import threading
from argparse import Namespace
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from colossalai.accelerator import get_accelerator
from safetensors import safe_open

from opt.colossal.pieces import WEIGHTS, TrainingState, load_scaler_state, scaler_state
from opt.colossal.processes import Place
from opt.data.batches import Position
from opt.data.rows import Rows
from opt.errors import Diverged, UserError
from opt.model import weights
from opt.train.evaluations import Evaluations
from opt.train.export import flush_to_disk
from opt.train.schedule import set_step
from opt.train.signals import Control

_MANIFEST, _WRITING, _REMOVING = "manifest.json", ".writing-", ".removing-"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}


class Saver:
    """Writes checkpoints, one at a time, and says when a run is to stop. Made and used by all
    processes together."""

    def __init__(self, run, control: Control, boosted):
        """`run`: a plan.Run; `boosted`: what is trained, see opt_train_demo.py. Takes up the state
        of the checkpoint that the run goes on from, if there is one."""
        model = run.weights
        self._directory, self._plan = folder(run.output), run.plan
        self._here, self._control, self._dataset = run.here, control, run.dataset
        self._optimizer, self._lr_schedule = boosted.optimizer, boosted.lr_schedule
        self._boosted, self._model = boosted, model
        before = run.resumed_from
        self.evaluations = before.evaluations if before else Evaluations()
        self._best = before.best if before else None  # the checkpoint of the best one
        self._frozen_checksum = model.frozen_checksum if run.here.is_main else None
        shapes = {name: torch.Size(model.shape(name)) for name in model}
        self._state = TrainingState(boosted.plugin.form, boosted.plugin.spread, shapes)
        self._copies = run.copies_checkpoints
        self._has_begun, self._thread = False, None
        self.saved: Path | None = None  # the newest that is complete
        if self._here.is_main:
            for left_over in (
                *self._directory.glob(f"{_WRITING}*"),
                *self._directory.glob(f"{_REMOVING}*"),
            ):
                shutil.rmtree(left_over)
        if before:
            self._restore(before)

    def after(self, position: Position, recorder, is_last: bool) -> str | None:
        """To be called after each step by all processes, which all do the same of this:

        - after --max_bad_steps steps in a row that changed nothing raise Diverged;
        - where a signal has come to any of them, save, and return its name; not after the last
          step, as the run ends by itself;
        - where a checkpoint is due (--save_steps, an epoch's end) and the step changed something,
          or the evaluation was the best so far, save;
        - otherwise, when all have written what was begun before, make it a checkpoint.

        What only some of them know is agreed on: a signal, what is skipped (the main process's
        recorder counts it), whether a thread still writes.
        """
        is_due = bool(self._plan.save_steps) and (
            position.step % self._plan.save_steps == 0 or position.rows == 0 or is_last
        )
        is_best = self._plan.load_best_model_at_end and self.evaluations.best_step == position.step
        if is_due or is_best or is_last:
            recorder.flush()
        skipped, signal_ = recorder.skipped_in_a_row, self._control.signal or 0
        everyones = self._control.agree(signal=signal_, skipped=skipped, writing=self.is_writing)
        stopped_by, skipped = 0 if is_last else everyones["signal"], everyones["skipped"]
        if skipped >= self._plan.max_bad_steps:
            recorder.flush()
            self.finish()
            way = (
                f"the newest checkpoint is {self.saved}: go on from it with --resume"
                if self.saved
                else "there is no checkpoint: start anew"
            )
            raise Diverged(
                f"{skipped} steps in a row had a loss or a gradient that is not finite; {way}, and "
                "with a lower --learning_rate"
            )
        # The best may come after a step that changed nothing: its weights are those from before.
        if stopped_by or is_best or (is_due and not skipped):
            recorder.flush()
            self.begin(position, recorder.path, recorder.tracking)
        elif not everyones["writing"]:
            self.finish()
        return signal.Signals(stopped_by).name if stopped_by else None

    @property
    def is_writing(self) -> bool:
        """Whether this process's thread is at work."""
        return self._thread is not None and self._thread.is_alive()

    def _restore(self, checkpoint: "Checkpoint") -> None:
        """Put its state into a run that was built with its weights, in fp32 where Adam updates
        them.

        The random-number state is taken up where each process has the place that it had: shares of
        the same layers drop the same elements, and batches do not. Otherwise dropout starts from
        the seed.
        """
        for kind in self._state.kinds[1:]:
            self._state.load(kind, checkpoint.tensors(kind))
        self._state.updates = checkpoint.state["updates"]
        set_step(self._lr_schedule, checkpoint.position.step)
        load_scaler_state(self._optimizer, checkpoint.state["scaler"] or {})
        before = checkpoint.state["arguments"] | {"world_size": checkpoint.state["world_size"]}
        now = vars(self._plan) | {"world_size": self._here.world_size}
        if all(before[size] == now[size] for size in ("world_size", "tp_size", "pp_size")):
            _set_rng_state(checkpoint.tensors("rng"), self._here)
        self.saved = checkpoint.path

    def begin(self, position: Position, metrics: Path, tracking: dict | None = None) -> None:
        """Copy the state; its writing goes on in the background. Or write it at once, a tensor at a
        time. `metrics` is the main process's metrics.jsonl, `tracking` its Recorder's."""
        self.finish()
        rng = {
            f"rng/{self._here.rank}/{name}": tensor
            for name, tensor in _rng_state(self._here).items()
        }
        kinds = self._state.kinds
        entries = {f"{kind}/{n}": of for kind in kinds for n, of in self._state.own_entries(kind)}
        tensors = (tensor for kind in kinds for _, tensor in self._state.own_share(kind))
        if self._copies:
            tensors = list(tensors)
        entries |= {name: (tensor.dtype, tensor.shape) for name, tensor in rng.items()}
        tensors = itertools.chain(tensors, rng.values())
        texts = {}
        if self._here.is_main:
            state = {
                "position": asdict(position),
                "updates": self._state.updates,
                "scaler": scaler_state(self._optimizer),
                "world_size": self._here.world_size,
                "arguments": vars(self._plan),
                "data": self._dataset.train.checksum,
                "held_out": self._dataset.held_out.checksum,
                "frozen": self._frozen_checksum,
                "evaluations": self.evaluations.state(),
                "tracking": tracking or {},
                "best": str(self._best) if self._best else None,  # where it is not this one
            }
            texts = {"state.json": json.dumps(state, indent=1).encode()}
            texts["metrics.jsonl"] = metrics.read_bytes()
        self._final, self._written, self._error = (
            self._directory / f"step-{position.step:08d}",
            {},
            "its writer did not come to an end",
        )
        # For as long as this checkpoint is the newest, whatever the next evaluation says
        self._is_best = self.evaluations.best_step == position.step
        self._has_begun = True
        if self._copies:
            self._thread = threading.Thread(target=self._write, args=(entries, tensors, texts))
            self._thread.start()
        else:
            self._write(entries, tensors, texts)
            for _ in tensors:  # after an error: other processes need this one for theirs
                pass
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one, and make it one. Raises
        UserError on all processes if any of them could not write its part; the checkpoints from
        before are untouched then."""
        if not self._has_begun:
            return
        if self._thread:
            self._thread.join()
        self._has_begun, self._thread = False, None
        best = self._final if self._is_best else self._best
        results = self._control.gather((self._written, self._error))
        error = next((error for _, error in results if error), None)
        if error is None:
            if self._here.is_main:
                error = self._try(
                    lambda: self._publish(
                        {name: entry for written, _ in results for name, entry in written.items()},
                        best,
                    )
                )
            error = self._control.gather(error)[0]
        if error:
            before = (
                f"the newest complete one is {self.saved}"
                if self.saved
                else "there is none before it"
            )
            raise UserError(
                f"checkpoint {self._final} could not be written ({error}): {before}; make room, "
                "then go on with --resume auto"
            )
        self.saved, self._best = self._final, best

    def load_best(self) -> None:
        """Put the weights of the best evaluation in place, of which there is a checkpoint, and say
        which they are. To be called by all processes after the last step and finish()."""
        is_finite = self._best is not None
        if self._here.is_main:
            step = self.evaluations.best_step
            which = f"those after step {step}" if is_finite else "the last ones"
            print(f"{self.evaluations.describe()}; saved are {which}", flush=True)
        if not is_finite:
            return
        damage = self._control.gather(_damage(self._best) if self._here.is_main else None)[0]
        if damage:
            raise UserError(f"checkpoint {self._best} of the best model is damaged, {damage}")
        # Weights may still be on their way from other processes, see reduction.LayerwiseZero
        get_accelerator().synchronize()
        best = Checkpoint.read(self._best)
        whole = self._model.taken_up(best.tensors(WEIGHTS))
        self._boosted.plugin.place(self._boosted.model, whole)

    def _write(self, entries: dict, tensors: Iterable[torch.Tensor], texts: dict) -> None:
        """This process's files, to disk."""
        self._error = self._try(lambda: self._write_files(entries, tensors, texts))

    def _try(self, work) -> str | None:
        try:
            work()
        except OSError as error:  # for all processes to hear of at the next finish()
            return f"{error.strerror}: {error.filename or self._aside}"
        return None

    @property
    def _aside(self) -> Path:
        return self._final.with_name(_WRITING + self._final.name)

    def _write_files(self, entries: dict, tensors: Iterable[torch.Tensor], texts: dict) -> None:
        self._aside.mkdir(parents=True, exist_ok=True)
        name = f"rank-{self._here.rank:05d}.safetensors"
        self._written[name] = _write(self._aside / name, safetensors_parts(entries, tensors))
        for name, text in texts.items():
            self._written[name] = _write(self._aside / name, [text])

    def _publish(self, manifest: dict, best: Path | None) -> None:
        """Rename the folder, then remove what is now too old, but for the best one up to here where
        that is to be exported."""
        for name in manifest:
            if not (self._aside / name).is_file():
                raise OSError(
                    errno.ENOENT,
                    "a process wrote elsewhere, the nodes must share --output_path",
                    name,
                )
        _write(self._aside / _MANIFEST, [json.dumps(manifest, indent=1).encode()])
        flush_to_disk(self._aside)
        if self._final.exists():  # of an earlier try, from which this run has gone back
            self._remove(self._final)
        self._aside.rename(self._final)
        flush_to_disk(self._directory)
        there = complete(self._directory)
        abandoned = [c for c in there if c.name > self._final.name]  # the run went back behind them
        for old in (
            abandoned + [c for c in there if c not in abandoned][: -self._plan.save_total_limit]
        ):
            if not (self._plan.load_best_model_at_end and best and old.samefile(best)):
                self._remove(old)

    def _remove(self, checkpoint: Path) -> None:
        """Renamed first: no half of it is ever found under its name."""
        aside = checkpoint.with_name(_REMOVING + checkpoint.name)
        checkpoint.rename(aside)
        shutil.rmtree(aside)


@dataclass
class Checkpoint:
    """A complete checkpoint, its files checked."""

    path: Path
    state: dict  # state.json

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """The one in a folder."""
        return cls(path, json.loads((path / "state.json").read_text()))

    @property
    def position(self) -> Position:
        """How far the run had come."""
        return Position(**self.state["position"])

    @property
    def evaluations(self) -> Evaluations:
        """What the run's evaluations had come to."""
        return Evaluations(**self.state.get("evaluations", {}))

    def was_evaluated_on(self, held_out: Rows) -> bool:
        """Whether its run's evaluations were on these. Older checkpoints do not say it."""
        return self.state.get("held_out", held_out.checksum) == held_out.checksum

    def comparable(self, held_out: Rows) -> "Checkpoint":
        """The same; without evaluations if they were on others, whose losses say nothing about
        those to come."""
        if self.was_evaluated_on(held_out):
            return self
        return replace(self, state=self.state | {"evaluations": {}, "best": None})

    @property
    def best(self) -> Path | None:
        """The checkpoint of the best evaluation up to here; None where there was none, or it is
        gone."""
        step = self.evaluations.best_step
        if step == self.position.step:
            return self.path
        # Beside this one, or where the run was that this one's had gone on from
        places = [self.path.with_name(f"step-{step or 0:08d}"), Path(self.state.get("best") or "")]
        return next((place for place in places if (place / _MANIFEST).is_file()), None)

    @property
    def has_lost_its_best(self) -> bool:
        """Whether there was a best one and its checkpoint is gone."""
        return self.evaluations.best_step is not None and self.best is None

    @property
    def metrics(self) -> bytes:
        """The run's metrics.jsonl up to here."""
        return (self.path / "metrics.jsonl").read_bytes()

    def tensors(self, kind: str) -> weights.Weights:
        """One of pieces.TrainingState.kinds, or "rng": names and whole tensors, each read when it
        is asked for."""
        return _Tensors(sorted(self.path.glob("rank-*.safetensors")), f"{kind}/")


class _Tensors(weights.Weights):
    def __init__(self, files: list[Path], prefix: str):
        opened = [safe_open(file, framework="pt") for file in files]
        super().__init__(
            {
                key.removeprefix(prefix): (file, key)
                for file in opened
                for key in file.keys()
                if key.startswith(prefix)
            }
        )

    def _read(self, where):
        file, key = where
        return file.get_tensor(key)

    def shape(self, name):
        file, key = self._where(name)
        return tuple(file.get_slice(key).get_shape())


def folder(output_directory: Path) -> Path:
    """Where a run's checkpoints are."""
    return output_directory / "checkpoints"


def complete(directory: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first. One of such a name is complete: it got it by being
    renamed."""
    return sorted(
        p
        for p in directory.glob("step-*")
        if re.fullmatch(r"step-\d{8,}", p.name) and (p / _MANIFEST).is_file()
    )


def find(resume: str | None, output_directory: Path, saves: bool = True) -> Checkpoint | None:
    """The checkpoint that --resume asks for, all of its files checked; None to start anew. Raises
    UserError; also, if the run `saves` checkpoints of its own, where another run's are."""
    own = folder(output_directory)
    there = complete(own)
    if resume == "auto":
        if not there:
            return None
        path = there[-1]
    elif resume:
        path = Path(resume)
        if not (path / _MANIFEST).is_file():
            raise UserError(
                f"--resume {resume} is not a complete checkpoint, a folder with {_MANIFEST}: give "
                "one, or auto for the newest"
            )
    is_own = resume and path.resolve().parent == own.resolve()
    if there and saves and not is_own:  # which this run would take for its own, and remove
        raise UserError(
            f"{own} has checkpoints, {there[-1].name} the newest: go on from it with --resume "
            f"auto; to {'go on from another' if resume else 'start anew'}, move them away or "
            "choose another --output_path"
        )
    if resume is None:
        return None
    damage = _damage(path)
    if damage:
        before = [c for c in complete(path.parent) if c.name < path.name]
        offer = (
            f"go on from the one before it, --resume {before[-1]}"
            if before
            else "there is none before it: start anew"
        )
        raise UserError(f"checkpoint {path} is damaged, {damage}; {offer}")
    return Checkpoint.read(path)


def check_same_run(
    checkpoint: Checkpoint, plan: Namespace, model: weights.Weights, rows: Rows
) -> None:
    """Raise UserError if a checkpoint is of other data, another order of them, or another model."""
    before, now = checkpoint.state["arguments"], vars(plan)
    if before["seed"] != plan.seed:
        raise UserError(
            f"checkpoint {checkpoint.path} was made with --seed {before['seed']}, not {plan.seed}: "
            "give the same"
        )
    if checkpoint.state["data"] != rows.checksum:
        flags = (
            *("dataset", "text_column", "template", "prompt_column", "response_column"),
            *("max_length", "long_texts", "block_size", "eval_fraction", "max_train_samples"),
        )
        changed = ", ".join(
            f"--{flag} was {before[flag]}, not {now[flag]}"
            for flag in flags
            if before[flag] != now[flag]
        )
        raise UserError(
            f"checkpoint {checkpoint.path} was made with other training data "
            f"({changed or 'same flags, other texts or tokenizer'}): give the same"
        )
    optim = before.get("optim", "adamw_torch")  # the only one in older checkpoints
    if optim != plan.optim:
        raise UserError(
            f"checkpoint {checkpoint.path} was made with --optim {optim}, not {plan.optim}, which "
            "keeps other state: give the same"
        )
    frozen = model.frozen_checksum
    if frozen and checkpoint.state.get("frozen") not in (None, frozen):
        raise UserError(
            f"checkpoint {checkpoint.path} has adapters to other weights than those of "
            f"{plan.model_name_or_path}: give the model that they were trained beside"
        )
    # The others show in names and shapes below.
    for flag in ("lora_alpha", "use_rslora", "load_in_4bit"):
        if plan.lora_r and before.get(flag) != now[flag]:
            raise UserError(
                f"checkpoint {checkpoint.path} was made with --{flag} {before.get(flag)}, not "
                f"{now[flag]}: give the same"
            )
    saved, model = checkpoint.tensors(WEIGHTS), model.trained
    own = {*saved} & {*model}  # a tied head is in neither
    for name in sorted({*saved, *model}):
        if name not in own or saved.shape(name) != model.shape(name):
            raise UserError(
                f"checkpoint {checkpoint.path} is of another model than {plan.model_name_or_path}, "
                f"or of other --lora flags: they differ in {name}"
            )


def safetensors_parts(
    entries: dict[str, tuple[torch.dtype, torch.Size]], tensors: Iterable[torch.Tensor]
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file of `tensors`, whose names, dtypes and shapes are `entries`.
    [C24] That package's own writer first copies each tensor, and [F44] has errors of the disk in
    words only."""
    header, end = {}, 0
    for name, (dtype, shape) in entries.items():
        start, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {
            "dtype": _DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for (name, entry), tensor in zip(entries.items(), tensors, strict=True):
        assert entry == (tensor.dtype, tensor.shape), name
        yield memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _write(file: Path, parts) -> dict:
    """Write a file, to disk and for good; its entry in the manifest."""
    digest = hashlib.sha256()
    with open(file, "wb") as f:
        for part in parts:
            f.write(part)
            digest.update(part)
        f.flush()
        os.fsync(f.fileno())
        return {"bytes": f.tell(), "sha256": digest.hexdigest()}


def _damage(checkpoint: Path) -> str | None:
    """The first thing that is wrong with a checkpoint's files, in words."""
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_text())
        sizes = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"its {_MANIFEST} cannot be read"
    for name, (expected, _) in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected:
            return f"{name} has {file.stat().st_size} bytes, not {expected}"
    with ThreadPoolExecutor() as pool:
        for name, digest in zip(
            sizes, pool.map(_sha256, (checkpoint / name for name in sizes)), strict=True
        ):
            if digest != sizes[name][1]:
                return f"{name} is not what was written (SHA-256)"
    return None


def _sha256(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _rng_state(here: Place) -> dict[str, torch.Tensor]:
    """What dropout draws from; Python's and NumPy's generators are not used in training."""
    state = {"cpu": torch.get_rng_state()}
    if here.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(here.device)
    return state


def _set_rng_state(saved, here: Place) -> None:
    torch.set_rng_state(saved[f"{here.rank}/cpu"])
    if here.device.type == "cuda" and f"{here.rank}/cuda" in saved:
        torch.cuda.set_rng_state(saved[f"{here.rank}/cuda"], here.device)
