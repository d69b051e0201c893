"""Everything that can go wrong before training, checked; and what is about to happen, printed.

check() runs on every process before any of them waits for another: it reaches the same verdict everywhere, so a mistake
ends all processes at once.
"""

import os
from argparse import Namespace
from collections.abc import Iterator

import torch
from transformers import OPTConfig

from opt.colossal.processes import Place
from opt.data import tokens
from opt.model import kernel_probe, weights
from opt.model.config import DTYPES
from opt.train.checks import Setup
from opt.train.schedule import Schedule


def is_padding_free(args: Namespace, here: Place, dataset: tokens.Dataset) -> bool:
    """What --padding_free says, or else whether it pays: where a tenth or more would be pads.

    On a CPU attention needs a rectangle as long as the longest row of all (see attention.attend); padded batches are as long as
    their own, which is better where few rows are much longer than the rest.
    """
    if args.padding_free is not None:
        return args.padding_free
    fill = float(dataset.train.lengths.mean()) / dataset.longest
    return args.pp_size == 1 and fill < 0.9 and (fill > 0.4 or here.device.type == "cuda")


def missing_kernels(args: Namespace, here: Place, config: OPTConfig, longest: int | None) -> str | None:
    """What the plan says of our own GPU kernels that this run would use and that cannot be built here; None if nothing is missing.

    `longest`: tokens of the longest row where batches are packed, else None.
    """
    return kernel_probe.missing_kernels(here.device, _kernels(args, here, config, longest)) if here.device.type == "cuda" else None


def _kernels(args: Namespace, here: Place, config: OPTConfig, longest: int | None) -> Iterator[tuple]:
    """The kernels of opt/kernels.py that training comes to, as kernel_probe knows them. What is left out here is tried when it is needed."""
    dtype, is_ddp, is_gemini = DTYPES[args.precision], args.plugin.startswith("torch_ddp"), args.plugin == "gemini"
    # Gradients come in 16 bits to the step of opt/mixed_precision.py and from Gemini; other plugins of ColossalAI's widen them first.
    own_step = args.precision == "bf16" and not is_ddp and not is_gemini and args.adam_kernel == "torch"
    gradient = dtype if own_step or is_gemini else torch.float32
    if args.adam_kernel == "torch" and args.offload_optim_frac < 1:
        yield "update", gradient, dtype if own_step else None
    if getattr(args, "max_norm", 0) > 0 and (is_ddp or own_step and args.tp_size * args.pp_size == 1):
        yield "norm", gradient
    if args.fused_loss:
        yield "loss", dtype, config.vocab_size
    head_dim = config.hidden_size // config.num_attention_heads
    if longest and kernel_probe.takes_short_attention(here.device, dtype, head_dim, longest):
        yield "attention", dtype, head_dim, kernel_probe.padded(longest)


def describe(
    args: Namespace, here: Place, setup: Setup, dataset: tokens.Dataset, plan: Schedule, dp_size: int, before, kernels: str | None
) -> str:
    """The plan in words. `before`: the checkpoint that the run goes on from, or None. `kernels`: see missing_kernels."""
    if here.device.type == "cuda":
        device = f"{here.world_size} x {torch.cuda.get_device_name(here.device)}"
    else:
        device = f"CPU, {here.world_size} process{'es' * (here.world_size > 1)} on {len(os.sched_getaffinity(0))} cores"
    plugin = args.plugin
    if args.plugin == "hybrid_parallel":
        plugin += f" (tp {args.tp_size} x pp {args.pp_size} x dp {dp_size}, ZeRO stage {args.zero_stage})"
    elif args.plugin == "low_level_zero":
        plugin += f" (ZeRO stage {args.zero_stage})"
    microbatches = f", each cut into {args.num_microbatches} micro-batches" if args.pp_size > 1 else ""
    rows = args.batch_size * args.gradient_accumulation_steps * dp_size
    counts = dataset.counts
    files = weights.weight_files(setup.directory)
    origin = (
        f"{setup.directory}: {', '.join(f.name for f in files[:3])}{' ...' * (len(files) > 3)}"
        if files
        else f"none in {setup.directory}: it trains from scratch"
    )
    if getattr(setup.source, "quantization_config", None):
        origin += "; the quantization_config in config.json is left out, they are not quantized"
    lines = {
        "device": device,
        "plugin": plugin,
        "precision": args.precision + ", the layers' matrix products in fp8" * args.fp8,
        "model": f"{args.model_name_or_path}, {setup.weights.num_parameters / 1e6:,.1f} M parameters",
        "weights": origin,
        "data": f"{dataset.source}: {counts.rows:,} rows, {counts.tokens:,} tokens; {counts.empty:,} empty texts skipped, {counts.truncated:,} cut at {args.max_length} tokens"
        + "".join(f"; {number:,} {what}" for what, number in counts.notes.items()),
        "rows": f"{len(dataset.train):,} to train on, {len(dataset.held_out):,} held out",
        "batch": f"{args.batch_size} rows x {args.gradient_accumulation_steps} accumulated x {dp_size} data-parallel = {rows} rows a step{microbatches}{', without pads' * args.padding_free}",
        "steps": f"{plan.total_steps:,} ({plan.steps_per_epoch:,} an epoch), {plan.warmup_steps:,} of warm-up, learning rate {plan.learning_rate:g}; evaluation every {plan.eval_steps:,}",
        "saved": f"every {args.save_steps:,} steps and after each epoch" if args.save_steps else "when a signal stops the run",
        "memory": f"about {estimate_memory(setup.config, setup.weights.num_parameters, args, dp_size) / 2**30:.1f} GiB a process (an estimate)",
        "output": args.output_path + (" (model not saved)" if args.no_save else ""),
    }
    if kernels:
        lines["kernels"] = kernels
    if before:
        lines["resumed"] = f"{before.path}, {before.position.step:,} steps done"
        changes = [name for name in ("plugin", "precision", "tp_size", "pp_size") if before.state["arguments"][name] != getattr(args, name)]
        if changes:
            lines["resumed"] += f"; other {', '.join(changes)} than before: model and Adam's state are taken over"
    return "\n".join(f"  {name:<9} {value}" for name, value in lines.items())


def estimate_memory(config: OPTConfig, num_parameters: int, args: Namespace, dp_size: int) -> float:
    """Bytes on a process's device: weights, gradients and Adam's state exactly, activations roughly.

    Activations follow Korthikanti et al. (arXiv:2205.05198, table 2) without the term of the attention scores, which the
    fused attention kernels do not keep; plus the logits in the compute dtype and twice in fp32.
    """
    width = 4 if args.precision == "fp32" else 2
    own = num_parameters / (args.tp_size * args.pp_size)
    adam = 8 if args.precision == "fp32" or args.plugin.startswith("torch_ddp") else 12  # with the fp32 master copy
    if args.plugin.startswith("torch_ddp"):
        state = own * (4 + 4 + adam)
    elif args.plugin == "gemini":
        gradients = 2 if args.gradient_accumulation_steps > 1 else 0  # otherwise they take the parameters' place
        state = own * (2 + gradients + adam * (1 - args.offload_optim_frac)) / dp_size
    else:
        spread = dp_size if args.zero_stage > 0 else 1
        state = own * (width + width / (dp_size if args.zero_stage == 2 else 1) + adam / spread)
    rows = args.batch_size / (args.num_microbatches or 1)
    tokens = rows * args.max_length
    kept = (2 if args.grad_checkpoint else 34 / args.tp_size) * config.hidden_size * width / 2
    layers = config.num_hidden_layers / args.pp_size * min(args.pp_size, args.num_microbatches or 1)
    return state + tokens * (kept * layers + config.vocab_size * (width + 8) / args.tp_size)
