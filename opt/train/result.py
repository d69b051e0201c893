"""What a run leaves behind: the model, in the weights that were asked for, with its card; and the
last lines."""

import os
from pathlib import Path

from opt.colossal.plugin import Plugin
from opt.train import card, export, hub, samples
from opt.train.checkpoints import Saver
from opt.train.plan import Run
from opt.train.signals import Control


def save(
    run: Run, plugin: Plugin, saver: Saver, control: Control, step: int, stopped_by: str | None
) -> bool:
    """Export the model after its last step, unless a signal has `stopped_by` the run, and say where
    it is. To be called by all processes. Whether there is a model, and no signal has come
    meanwhile: whether it is to be shown."""
    plan, setup, is_main = run.plan, run.setup, run.here.is_main
    if stopped_by:
        if is_main:
            print(
                f"{stopped_by}: stopped after step {step}, saved in {saver.saved}; go on with the "
                "same command and --resume auto",
                flush=True,
            )
            if file := os.environ.get("OPT_STOPPED_FILE"):  # for cluster/slurm.sbatch
                Path(file).write_text(stopped_by)
        return False
    if plan.load_best_model_at_end:
        saver.load_best()
    if not plan.no_save:
        whole = (setup.directory, setup.source, setup.tokenizer, plan.output_path)
        best_step = saver.evaluations.best_step if plan.load_best_model_at_end else None
        text = card.text(run, step, best_step) if is_main else None
        export.export_model(plugin, *whole, card=text)
    if is_main and step < run.steps.total_steps:
        print(
            f"ended early, after step {step} of {run.steps.total_steps}: "
            f"{saver.evaluations.without_better} evaluations in a row had no lower held-out loss",
            flush=True,
        )
    if is_main and not plan.no_save:
        print(f"saved the model to {plan.output_path}", flush=True)
    if late := control.close():
        if is_main:
            unsent = f", nor uploaded to {plan.push_to_hub}" * bool(plan.push_to_hub)
            print(f"{late.name} after the last step: the model is not shown{unsent}", flush=True)
    return late is None


def show(run: Run) -> None:
    """After the processes' end, by the main one: what the model writes, and its way to the Hub."""
    samples.show(run)
    if run.plan.push_to_hub:
        hub.push(run.plan)
