"""The model card: README.md of an exported model, with the metadata that the Hub reads."""

import glob
import json
import os
import shlex
import sys
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from args import is_one_file
from opt import installed, measure
from opt.errors import in_a_line
from opt.model import lora, weights
from opt.train.export import CARD, CARD_MARK
from opt.train.plan import Run
from opt.train.recorder import perplexity

_LICENSE = "https://github.com/facebookresearch/metaseq/blob/main/projects/OPT/MODEL_LICENSE.md"
# What holds for a model that was fine-tuned from another as it does for that one
_INHERITED = ("license", "license_name", "license_link", "language", "base_model")


def text(run: Run, step: int, best_step: int | None) -> str | None:
    """README.md of the model that `run` has trained, in `step` steps; its weights are those after
    `best_step`, if there is one. None, and a line that says why, where that fails: no reason to
    lose the model."""
    try:
        return _text(run, step, best_step)
    except Exception as error:
        print(f"no model card ({CARD}): {in_a_line(error)}", flush=True)
        return None


def _text(run: Run, step: int, best_step: int | None) -> str:
    plan, steps, dataset = run.plan, run.steps, run.dataset
    base = plan.model_name_or_path
    is_adapter = lora.is_saved_alone(plan)
    data = ModelCardData(**_metadata(run, is_adapter))
    lines = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line.get("loss") is not None]
    evaluated = [line for line in lines if line.get("eval_loss") is not None]
    losses = [
        f"| {line['step']} | | {line['loss']:.4f} | |" for line in trained[:1] + trained[1:][-1:]
    ]
    losses += [
        f"| {line['step']} | {line['eval_loss']:.4f} | | {perplexity(line['eval_loss']):.2f} |"
        for number, line in enumerate(evaluated)
        if number in (0, len(evaluated) - 1) or line["step"] == best_step
    ]
    which = f"The weights are those after step {best_step}, the best. " if best_step else ""
    of_planned = f" of {steps.total_steps:,}" if step < steps.total_steps else ""
    from_scratch = not weights.weight_files(run.setup.directory)
    name = Path(plan.output_path).resolve()
    settings = {
        "plugin": plan.plugin,
        "processes": f"{run.here.world_size} (data {plan.dp_size}, tensor {plan.tp_size}, "
        f"pipeline {plan.pp_size})",
        "precision": plan.precision,
        "optimizer": plan.optim,
        "rows a step": plan.batch_size * plan.gradient_accumulation_steps * plan.dp_size,
        "tokens a row, at most": plan.max_length,
        "steps": f"{step:,}{of_planned} ({steps.steps_per_epoch:,} an epoch)",
        "learning rate": f"{steps.learning_rate:g}",
        "weight decay": plan.weight_decay,
        "seed": plan.seed,
        "device": measure.device_name(run.here.device),
        "commit": installed.commit() or "unknown",
        "versions": ", ".join(f"{k} {v}" for k, v in measure.versions().items()),
    }
    table = "\n".join(f"| {what} | {value} |" for what, value in settings.items())
    what = (
        "An adapter (LoRA) of"
        if is_adapter
        else "OPT trained from scratch, as"
        if from_scratch
        else "A fine-tune of"
    )
    return f"""---
{data.to_yaml()}
---
{CARD_MARK}

# {name.stem if is_one_file(plan.output_path) else name.name}

{what} {base}, by ColossalAI: {run.setup.weights.num_parameters / 1e6:,.1f} M parameters.

Data: {dataset.source}; {dataset.counts.texts:,} texts, {dataset.counts.tokens:,} tokens, of which
{len(dataset.train):,} rows were trained on and {len(dataset.held_out):,} held out.

| step | held-out loss | training loss | perplexity |
|---|---|---|---|
{chr(10).join(sorted(losses, key=lambda line: int(line.split()[1])))}

{which}Losses are in nats a token; `metrics.jsonl` has every step.

| | |
|---|---|
{table}

```bash
{_launcher(run.here.world_size)} {shlex.join(sys.argv)}
```
"""


def _launcher(world_size: int) -> str:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    nodes = f"--nnodes {world_size // local} " * (world_size > local)
    return "python" if world_size == 1 else f"torchrun {nodes}--nproc_per_node {local}"


def _metadata(run: Run, is_adapter: bool) -> dict:
    base, found = run.plan.model_name_or_path, {}
    source = run.setup.directory / CARD
    if source.is_file():
        card = ModelCard(source.read_text(encoding="utf-8"), ignore_metadata_errors=True)
        found = {k: v for k, v in card.data.to_dict().items() if k in _INHERITED}
    if not os.path.isdir(base):
        found["base_model"] = base
        if base.startswith("facebook/opt-"):
            found |= {"license": "other", "license_link": _LICENSE}
    datasets = [
        name
        for name in run.plan.dataset
        if name.count("/") == 1
        and name[0] not in "./~"
        and not (os.path.exists(name) or glob.has_magic(name))
    ]
    if datasets:
        found["datasets"] = datasets
    tags = ["opt", "colossalai", *(["lora"] if is_adapter else [])]
    library = "peft" if is_adapter else "transformers"
    return found | {"library_name": library, "pipeline_tag": "text-generation", "tags": tags}
