"""What is measured and recorded: metrics.jsonl, the progress bar, TensorBoard or wandb, loss.png;
step times, FLOPs, memory."""

import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from opt.data.batches import Batch, Position
from opt.errors import UserError, in_a_line
from opt.measure import mark, seconds_between, seconds_since_launch
from opt.train.checks import warning_of_first_loss
from opt.train.plan import Run


class Recorder:
    """Writes one JSON line a step. Created on every process; the main one writes.

    Losses stay on the device until they are shown, about once a second: reading one makes the host
    wait for the GPU. A step lasts from the end of the one before to its own end, on the device.
    """

    def __init__(self, run: Run):
        self._run = run
        self.is_main, self._pending, self._shown = run.here.is_main, [], time.perf_counter()
        # Steps without an update, up to the last that was written; known to the main process.
        self.skipped_in_a_row = 0
        self._last = mark()
        self.path = run.output / "metrics.jsonl"
        if not self.is_main:
            return
        run.output.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".writing")
        fresh.write_bytes(run.resumed_from.metrics if run.resumed_from else b"")
        fresh.replace(self.path)
        self._file = open(self.path, "a", buffering=1)
        self._bar = tqdm(
            total=run.steps.total_steps,
            initial=run.start.step,
            unit="step",
            dynamic_ncols=True,
            # In a log file, where each refresh is a line of its own, one now and then is enough.
            mininterval=0.1 if sys.stderr.isatty() else 10,
        )
        self._tracker = _tracker(run)

    @property
    def tracking(self) -> dict:
        """What a run that goes on from here has to know to go on in the same place."""
        return self._tracker.state() if self.is_main else {}

    def step(
        self, position: Position, batches: list[Batch], share: torch.Tensor, lr: float, grad_norm
    ) -> None:
        """Record an optimizer step, which has come to `position`. `share`, `grad_norm`: what
        train_step gives. All processes call it."""
        dist.all_reduce(share)
        if position.step == 1 and not len(self._run.dataset.held_out):
            _warn(self._run, share.item())
        if not self.is_main:
            return
        now, ended = time.perf_counter(), mark()
        epoch = round(position.epoch + position.rows / len(self._run.dataset.train), 4)
        line = {"step": position.step, "epoch": epoch, "loss": share, "lr": lr}
        if grad_norm is not None:
            line["grad_norm"] = grad_norm
        tokens = sum(batch.tokens for batch in batches)
        line |= {"tokens": tokens, "tokens_per_second": None, "seconds": (self._last, ended)}
        self._last = ended
        self._pending.append(line)
        if now - self._shown > 1 or position.step == self._run.start.step + 1:
            self.flush()

    def flush(self) -> None:
        """Write what has been recorded so far."""
        if not self.is_main or not self._pending:
            return
        for line in self._pending:
            line["seconds"] = seconds_between(*line["seconds"])
            line["tokens_per_second"] = line["tokens"] / line["seconds"]
            line = {k: float(v) if isinstance(v, torch.Tensor) else v for k, v in line.items()}
            self._note_skip(line)
            self._write(line)
        if self._bar.n == self._run.start.step:
            tqdm.write(f"first step done {seconds_since_launch():.1f} s after launch")
        rate = sum(p["tokens"] for p in self._pending) / sum(p["seconds"] for p in self._pending)
        postfix = {
            "loss": f"{line['loss']:.3f}",
            "lr": f"{line['lr']:.2e}",
            "tokens/s": f"{rate:,.0f}",
        }
        self._bar.set_postfix(postfix, refresh=False)
        self._bar.update(len(self._pending))
        self._pending, self._shown = [], time.perf_counter()

    def _note_skip(self, line: dict) -> None:
        """Mark a step that was not taken, see adam.HybridAdam.step. With a loss scale, gradients
        overflow now and then by design."""
        norm = 0.0 if self._run.plan.precision == "fp16" else line.get("grad_norm", 0.0)
        if math.isfinite(line["loss"]) and math.isfinite(norm):
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        line["skipped"] = True
        tqdm.write(
            f"step {line['step']} is skipped: loss {line['loss']}, gradient norm {norm}; "
            f"{self.skipped_in_a_row} in a row"
        )

    def evaluation(self, step: int, loss: float) -> float:
        """Record the held-out loss after `step` optimizer steps; returns it."""
        if step == 0:
            _warn(self._run, loss)
        self.flush()
        if self.is_main:
            self._write(_evaluation(step, loss))
            tqdm.write(_said(step, loss))
        self._last = mark()  # the evaluation's time is not the next step's
        return loss

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        """Write the rest and draw loss.png; after an error, only leave the terminal to its
        message."""
        if not self.is_main:
            return
        if error is None:
            self.flush()
        self._bar.close()
        self._file.close()
        for work in (self._tracker.close, *([self._draw] if error is None else [])):
            try:
                work()
            except Exception as fault:
                # A tracker's network, a font: the model is trained, and still to be saved
                print(f"after the last step: {in_a_line(fault)}", file=sys.stderr)

    def _draw(self) -> None:
        draw_losses(self.path, self.path.with_name("loss.png"))

    def _write(self, line: dict) -> None:
        line = _without_nan(line)
        self._file.write(json.dumps(line) + "\n")
        self._tracker.add({k: v for k, v in line.items() if v is not None})


def results_of_evaluation(run: Run, loss: float) -> None:
    """--eval_only: print the held-out loss, and write it into eval_results.json. All processes
    call it."""
    if not run.resumed_from:
        _warn(run, loss)
    if not run.here.is_main:
        return
    rows = run.dataset.held_out
    result = _evaluation(run.start.step, loss) | {
        "rows": len(rows),
        "tokens": rows.num_tokens,
        "model": str(run.resumed_from.path) if run.resumed_from else run.plan.model_name_or_path,
        **({"lora_adapter": run.plan.lora_adapter} if run.plan.lora_adapter else {}),
        "dataset": run.dataset.source,
    }
    file = run.output / "eval_results.json"
    file.write_text(json.dumps(_without_nan(result), indent=1) + "\n")
    print(f"{_said(run.start.step, loss)}; written to {file}", flush=True)


def _warn(run: Run, first_loss: float) -> None:
    warning = warning_of_first_loss(first_loss, run.setup)
    if warning and run.here.is_main:
        tqdm.write(warning)


def _evaluation(step: int, loss: float) -> dict:
    return {"step": step, "eval_loss": loss, "eval_perplexity": perplexity(loss)}


def _said(step: int, loss: float) -> str:
    return f"step {step}: held-out loss {loss:.4f}, perplexity {perplexity(loss):.2f}"


def _without_nan(line: dict) -> dict:
    """JSON has none."""
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()
    }


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that is over what a float holds."""
    return math.exp(loss) if loss < 700 else math.inf


class _NoTracker:
    def state(self) -> dict:
        return {}

    def add(self, line: dict) -> None:
        pass

    def close(self) -> None:
        pass


class _TensorBoard(_NoTracker):
    def __init__(self, run: Run):
        from torch.utils.tensorboard import SummaryWriter

        # What an earlier run wrote after the checkpoint that this one goes on from is not shown.
        start_step = run.start.step
        self._writer = SummaryWriter(
            run.output / "tensorboard" / (run.plan.run_name or ""),
            purge_step=start_step + 1 if start_step else 0,
        )

    def add(self, line: dict) -> None:
        for name, value in line.items():
            if name != "step":
                self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._writer.close()


class _Wandb(_NoTracker):
    """The user's own WANDB_ variables hold, where no flag says otherwise."""

    def __init__(self, run: Run):
        import wandb

        before = run.resumed_from.state.get("tracking", {}) if run.resumed_from else {}
        given = {}
        if "WANDB_PROJECT" not in os.environ:
            given["project"] = before.get("wandb_project", "opt-colossalai")
        if "wandb_id" in before and "WANDB_RUN_ID" not in os.environ:
            given["id"] = before["wandb_id"]
        if before:
            given["resume"] = "allow"
        if run.plan.run_name:
            given["name"] = run.plan.run_name
        try:
            self._run = wandb.init(dir=str(run.output), config=vars(run.plan), **given)
        except Exception as error:  # no login, no network: of wandb's own kinds, and others
            raise UserError(
                f"--report_to wandb: {in_a_line(error)}; "
                "`wandb login`, or set WANDB_MODE=offline, or leave it out"
            ) from error

    def state(self) -> dict:
        return {"wandb_id": self._run.id, "wandb_project": self._run.project}

    def add(self, line: dict) -> None:
        # With its step: W&B leaves out steps that are there, of the run that this one goes on from.
        self._run.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])

    def close(self) -> None:
        self._run.finish()


def _tracker(run: Run) -> _NoTracker:
    trackers = {"none": _NoTracker, "tensorboard": _TensorBoard, "wandb": _Wandb}
    kind = trackers[run.plan.report_to]
    return kind() if kind is _NoTracker else kind(run)


def draw_losses(metrics: Path, picture: Path) -> None:
    """Draw the training and the held-out loss by step, from a metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    train = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    held_out = [
        (line["step"], line["eval_loss"]) for line in lines if line.get("eval_loss") is not None
    ]
    figure, axes = pyplot.subplots(figsize=(8, 5))
    if train:
        axes.plot(*zip(*train, strict=True), linewidth=0.8, alpha=0.7, label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), marker="o", label="held out")
    axes.set(xlabel="optimizer step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
