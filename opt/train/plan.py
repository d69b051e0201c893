"""What is about to happen: what the data settle, and all of it in words."""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from transformers import OPTConfig

from args import output_directory
from opt import limits
from opt.colossal.processes import Place, node_first
from opt.data.batches import Position
from opt.data.rows import Counts, Dataset
from opt.errors import UserError
from opt.model import float8, kernel_probe, weights
from opt.model.config import DTYPES
from opt.model.lora import Lora
from opt.registry import plugin_class
from opt.train import checkpoints, export, fit, hub, memory
from opt.train.checkpoints import Checkpoint
from opt.train.checks import Setup, check_shared, lock_output
from opt.train.schedule import Steps, count_steps


@dataclass(frozen=True)
class Run:
    """One training, settled: nothing writes to it."""

    plan: Namespace  # the flags, with what they left open
    here: Place
    setup: Setup
    dataset: Dataset
    resumed_from: Checkpoint | None
    steps: Steps
    needed: memory.Estimate
    room: memory.Room
    chosen: list[str]  # by --auto: what, and why

    @property
    def start(self) -> Position:
        """How far it had come when it starts."""
        return self.resumed_from.position if self.resumed_from else Position()

    @cached_property
    def weights(self) -> weights.Weights:
        """What the model starts with: a checkpoint's, or what was given."""
        given, before = self.setup.weights, self.resumed_from
        return given.taken_up(before.tensors("weights")) if before else given

    @property
    def copies_checkpoints(self) -> bool:
        """Whether training goes on while a copy is written: not where Adam is in host memory, or
        this has no room for it."""
        return not self.plan.offload_optim_frac and self.room.is_surely_enough_to_copy(self.needed)

    @property
    def output(self) -> Path:
        """The folder of its results."""
        return output_directory(self.plan.output_path)


def make_run(setup: Setup, here: Place, dataset: Dataset) -> Run:
    """Settle the rest: what depends on the rows, and on a checkpoint that --resume asks for. From
    here on the output folder is this run's. Raises UserError."""
    plan = setup.plan.but(padding_free=is_padding_free(setup.plan, here, dataset))
    case = case_of(setup, plan, here, memory.RowLengths(dataset.longest, dataset.train.lengths))
    chosen = []
    if plan.auto:
        case, chosen = fit.choose(case)
        plan, setup = case.plan, replace(setup, flags=case.flags, plan=case.plan)
    needed = fit.refuse(case)
    if not plan.dry_run:
        node_first(here, lambda: lock_output(plan.output_path) if here.is_main else None)
        check_shared(plan.output_path, here)
    if plan.push_to_hub:
        node_first(here, lambda: hub.check(plan) if here.is_main else None)
    folder = output_directory(plan.output_path)
    before = None
    if plan.resume or not plan.eval_only:
        saves = not plan.eval_only
        before = node_first(here, lambda: checkpoints.find(plan.resume, folder, saves))
    if before:
        checkpoints.check_same_run(before, plan, setup.weights, dataset.train)
        before = before.comparable(dataset.held_out)
    _check_evaluations(plan, dataset, before)
    start = before.position if before else Position()
    steps = count_steps(plan, len(dataset.train), start)
    return Run(plan, here, setup, dataset, before, steps, needed, case.room, chosen)


def refuse_early(setup: Setup, here: Place) -> None:
    """Raise UserError for what cannot fit whatever the rows are: before they are made."""
    if setup.plan.auto:
        return  # there is nothing yet that was asked for
    plan = setup.plan.but(padding_free=False)
    shortest, longest = memory.RowLengths(1), memory.RowLengths(plan.block_size or plan.max_length)
    case = case_of(setup, plan, here, shortest)
    fit.refuse(case, others=replace(case, rows=longest))


def case_of(setup: Setup, plan: Namespace, here: Place, rows: memory.RowLengths) -> fit.Case:
    """What memory is asked for."""
    room = memory.find_room(here, plan.mem_cap)
    has_weights = bool(weights.weight_files(setup.directory))
    reading = setup.weights.reading_bytes
    return fit.Case(setup.flags, plan, setup.config, here, rows, room, reading, has_weights)


def _check_evaluations(plan: Namespace, dataset: Dataset, before: Checkpoint | None) -> None:
    """Raise UserError where evaluations are asked for and there is nothing to evaluate on, or the
    best model so far is gone."""
    for flag in ("eval_only", "load_best_model_at_end", "early_stopping_patience"):
        if getattr(plan, flag) and not len(dataset.held_out):
            raise UserError(
                f"--{flag} needs held-out texts, and there are none: give --eval_fraction, over 0"
            )
    if before and plan.load_best_model_at_end and before.has_lost_its_best:
        step = before.evaluations.best_step
        raise UserError(
            f"--load_best_model_at_end: the best model up to {before.path} is that after step "
            f"{step}, of which there is no checkpoint beside it: go on without this flag, or start "
            "anew with it"
        )


def is_padding_free(plan: Namespace, here: Place, dataset: Dataset) -> bool:
    """What --padding_free says, or else whether it pays: where a tenth or more would be pads.

    On a CPU attention needs a rectangle as long as the longest row of all (see attention.attend);
    padded batches are as long as their own, which is better where few rows are much longer than the
    rest.
    """
    if plan.padding_free is not None:
        return plan.padding_free
    fill = dataset.train.num_tokens / len(dataset.train) / dataset.longest
    return fill < 0.9 and (here.device.type == "cuda" or fill > 0.4 and plan.pp_size == 1)


def missing_kernels(
    plan: Namespace, here: Place, config: OPTConfig, longest: int | None
) -> str | None:
    """What is to be said of our own GPU kernels that this run would use and that cannot be built
    here; None if nothing is missing.

    `longest`: tokens of the longest row where batches are packed, else None.
    """
    return (
        kernel_probe.missing_kernels(here.device, _kernels(plan, here, config, longest))
        if here.device.type == "cuda"
        else None
    )


def _kernels(
    plan: Namespace, here: Place, config: OPTConfig, longest: int | None
) -> Iterator[tuple]:
    """The kernels of opt/model/kernels.py that training comes to. What is left out here is tried
    when it is needed."""
    dtype = DTYPES[plan.precision]
    yield from plugin_class(plan.plugin).update_kernels(plan)
    if plan.fused_loss:
        split = (plan.tp_size,) if plan.tp_size > 1 else ()
        yield "loss", dtype, -(-config.vocab_size // plan.tp_size), *split
    if memory.is_fused(plan, config):
        given = config.dropout, config.do_layer_norm_before, not plan.lora_r
        yield "residual", dtype, config.hidden_size, *given
    if plan.fp8:
        yield "fp8", dtype, float8.FORWARD
        yield "fp8", dtype, float8.BACKWARD
    head_dim = config.hidden_size // config.num_attention_heads
    if longest and kernel_probe.takes_short_attention(here.device, dtype, head_dim, longest):
        yield "attention", dtype, head_dim, kernel_probe.padded(longest)


_OPTIMS = {
    "adamw_torch": "",
    "adamw_anyprecision": "; AdamW on these weights, rounded stochastically, moments in bf16",
    "adamw_8bit": "; AdamW on these weights, rounded stochastically, moments in 8 bits",
}


def describe(run: Run) -> str:
    """The plan in words."""
    plan, here, setup, dataset, steps = run.plan, run.here, run.setup, run.dataset, run.steps
    about = plugin_class(plan.plugin).describe(plan, plan.dp_size)
    schedule = f" ({steps.scheduler_type})" * (steps.scheduler_type != "linear")
    patience = f", until {plan.early_stopping_patience} in a row are no better"
    there = export.replaced(plan)
    lines = {
        "device": _device(here),
        "plugin": plan.plugin + f" ({about})" * bool(about),
        "precision": plan.precision
        + ", the layers' matrix products in fp8" * plan.fp8
        + ", the layers' frozen matrices in 4 bits" * plan.load_in_4bit
        + _OPTIMS[plan.optim],
        "model": f"{plan.model_name_or_path}, {setup.weights.num_parameters / 1e6:,.1f} M "
        "parameters",
        "weights": _origin(setup),
        "data": f"{dataset.source}: {_described(dataset.counts, plan)}",
        "rows": f"{len(dataset.train):,} to train on, {len(dataset.held_out):,} held out",
        "batch": _batch(plan),
        "steps": f"{steps.total_steps:,} ({steps.steps_per_epoch:,} an epoch), "
        f"{steps.warmup_steps:,} of warm-up, learning rate {steps.learning_rate:g}"
        f"{schedule}; evaluation every {steps.eval_steps:,}"
        + patience
        * bool(plan.early_stopping_patience),
        "saved": _saved(run),
        "memory": memory_line(run.needed, run.room)
        + f"; {memory.gib(run.needed.host_copy)} more of host memory while a checkpoint is written"
        * (_saves(plan) and run.copies_checkpoints),
        "output": plan.output_path
        + " (model not saved)" * plan.no_save
        + f", and {plan.push_to_hub} on the Hub" * bool(plan.push_to_hub)
        + f"; {', '.join(there)} there will be gone" * bool(there),
    }
    if run.chosen:
        lines["auto"] = f"\n{' ' * 12}".join(run.chosen)
    if plan.eval_only:
        lines["steps"], lines["saved"] = "none: evaluation only", "no model"
    if plan.lora_r:
        lines["trained"] = _adapters(run)
    if setup.tokenizer_said:
        lines["tokenizer"] = setup.tokenizer_said
    longest = dataset.longest if plan.padding_free else None
    if kernels := missing_kernels(plan, here, setup.config, longest):
        lines["kernels"] = kernels
    if run.resumed_from:
        lines["resumed"] = _resumed(run)
    elif plan.resume:
        lines["resumed"] = "there is no checkpoint yet"
    return "\n".join(f"  {name:<9} {value}" for name, value in lines.items())


def _device(here: Place) -> str:
    if here.device.type == "cuda":
        return f"{here.world_size} x {torch.cuda.get_device_name(here.device)}"
    cores = limits.cores()
    device = (
        f"CPU, {here.world_size} process{'es' * (here.world_size > 1)} on "
        f"{cores} core{'s' * (cores > 1)}"
    )
    if reason := limits.unused_gpus():
        device += f"; NVIDIA's driver is here, but no GPU for PyTorch: {reason}"
    return device


def _origin(setup: Setup) -> str:
    """Where the weights come from."""
    files = weights.weight_files(setup.directory)
    origin = (
        f"{setup.directory}: {', '.join(f.name for f in files[:3])}{' ...' * (len(files) > 3)}"
        if files
        else f"none in {setup.directory}: it trains from scratch"
    )
    if getattr(setup.source, "quantization_config", None):
        origin += "; the quantization_config in config.json is left out, they are not quantized"
    return origin + "".join(f"; {note}" for note in setup.weights.notes)


def _batch(plan: Namespace) -> str:
    rows = plan.batch_size * plan.gradient_accumulation_steps * plan.dp_size
    microbatches = (
        f", each cut into {plan.num_microbatches} micro-batches" if plan.pp_size > 1 else ""
    )
    return (
        f"{plan.batch_size} rows x {plan.gradient_accumulation_steps} accumulated x "
        f"{plan.dp_size} data-parallel = "
        f"{rows} rows a step{microbatches}{', without pads' * plan.padding_free}"
    )


def _saves(plan: Namespace) -> bool:
    """Whether there are checkpoints even if no signal comes."""
    return bool(plan.save_steps) or plan.load_best_model_at_end


def _saved(run: Run) -> str:
    """When checkpoints are written."""
    plan = run.plan
    saved = (
        f"every {plan.save_steps:,} steps and after each epoch"
        if plan.save_steps
        else "when a signal stops the run"
    )
    saved += ", and the best held-out loss, which is exported" * plan.load_best_model_at_end
    if _saves(plan) and not run.copies_checkpoints:
        why_no_copy = (
            "from host memory, where it is already"
            if plan.offload_optim_frac
            else "host memory has no room for a copy"
        )
        saved += f"; training waits until it is written, {why_no_copy}"
    return saved


def _adapters(run: Run) -> str:
    """What of the model is trained with LoRA."""
    plan, whole = run.plan, run.setup.weights
    trained = whole.trained.num_parameters
    return (
        f"{trained:,} parameters ({trained / whole.num_parameters:.2%}), "
        f"adapters of rank {plan.lora_r}, scale {Lora.of(plan).scale:g}, dropout "
        f"{plan.lora_dropout:g}, of {', '.join(plan.lora_target_modules)}"
        + f"; from {plan.lora_adapter}" * bool(plan.lora_adapter)
        + f"; saved {'merged into the whole model' if plan.merge_lora else 'alone'}"
        * (not plan.eval_only)
    )


def _resumed(run: Run) -> str:
    """What the run goes on from, and what it does otherwise."""
    plan, before = run.plan, run.resumed_from
    resumed = f"{before.path}, {run.start.step:,} steps done"
    changes = [
        name
        for name in ("plugin", "precision", "tp_size", "pp_size")
        if before.state["arguments"][name] != getattr(plan, name)
    ]
    if changes:
        resumed += (
            f"; other {', '.join(changes)} than before: model and Adam's state are taken over"
        )
    if not before.was_evaluated_on(run.dataset.held_out):
        resumed += "; other texts are held out, with whose losses the best starts anew"
    if changes := _other_course(run):
        resumed += f"; from here on {', '.join(changes)}"
    return resumed


def memory_line(needed: memory.Estimate, room: memory.Room) -> str:
    """What a run takes and what there is, in GiB."""
    processes = f" x {room.local} processes" if room.local > 1 else ""
    host = f"{memory.gib(needed.host)}{processes} of {memory.gib(room.host)} in host memory"
    if room.device is None:
        parts = f"{needed.parts}, " * bool(needed.parts)
        line = f"{parts}the process itself {memory.gib(needed.host_process)}: {host}"
    else:
        if needed.host_optimizer:
            host += f", {memory.gib(needed.host_optimizer)} of them the optimizer's"
        line = f"{needed.parts}: {memory.gib(needed.device)} of {memory.gib(room.device)} on each"
        line += f" GPU; {host}"
    line += " (an estimate, GiB)"
    if room.is_surely_too_small(needed):
        line += "; it does not fit, and starts all the same (--ignore_memory_estimate)"
    elif not room.is_surely_enough(needed):
        line += f"; it may not fit: estimates are within {memory.ERROR:.0%}"
    return line


def _other_course(run: Run) -> list[str]:
    """What a resumed run does otherwise than the one before it, whose learning rates and updates
    it would go on with."""
    before, now = run.resumed_from.state["arguments"], vars(run.plan)
    flags = (
        *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_ratio"),
        *("warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    )
    return [
        f"--{flag} {now[flag]} (was {before[flag]})"
        for flag in flags
        if flag in before and before[flag] != now[flag]
    ]


def _described(counts: Counts, plan: Namespace) -> str:
    """What became of the texts."""
    said = [
        f"{counts.texts:,} texts, {counts.tokens:,} tokens",
        f"{counts.empty:,} empty texts skipped",
    ]
    if plan.block_size:
        said.append(f"joined and cut into blocks of {plan.block_size:,} tokens")
    elif plan.long_texts == "cut":
        share = counts.cut / max(counts.tokens + counts.cut, 1)
        said.append(
            f"{counts.long:,} cut at {plan.max_length:,} tokens, {counts.cut:,} tokens "
            f"({share:.1%}) lost"
        )
    else:
        said.append(f"{counts.long:,} over {plan.max_length:,} tokens go on in a next row")
    if counts.unanswered:
        said.append(f"{counts.unanswered:,} rows of prompt alone left out")
    return "; ".join(said + [f"{number:,} {what}" for what, number in counts.notes.items()])
