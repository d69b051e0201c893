"""Everything that can go wrong before training, checked; and what is about to happen, printed.

check() runs on every process before any of them waits for another: it reaches the same verdict everywhere, so a mistake
ends all processes at once.
"""

import fcntl
import importlib.util
import math
import os
import socket
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import OPTConfig, PreTrainedTokenizerFast

from args import UserError, resolve
from opt.colossal.processes import Place, has_bf16, has_fp8
from opt.data import tokens as data
from opt.model import kernel_probe, weights
from opt.model import opt as modeling
from opt.model.sizes import PRESETS, preset_config
from opt.train.export import is_one_file, output_directory

DEFAULT_MAX_LENGTH = 512


@dataclass
class Setup:
    """What check() found: enough to start without another look at the disk's directories."""

    directory: Path  # of the model
    source: OPTConfig  # as config.json has it
    config: OPTConfig  # to train with, see --dropout
    tokenizer: PreTrainedTokenizerFast
    weights: weights.Weights


def check(args: Namespace, here: Place) -> Setup:
    """Check arguments, paths, model and tokenizer; fill in what `args` left open. Raises UserError."""
    _check_processes(args, here)
    if args.report_to != "none" and importlib.util.find_spec(args.report_to) is None:
        raise UserError(
            f"--report_to {args.report_to} needs a package that is not installed: pip install {args.report_to}, or leave it out"
        )
    _check_writable(args.output_path)

    directory = weights.locate(args.model_name_or_path)
    source = modeling.load_config(directory)
    config = modeling.with_dropout(source, args.dropout)
    _check_shape(config, args)
    if args.max_length is None:
        args.max_length = min(DEFAULT_MAX_LENGTH, config.max_position_embeddings)
    _check_length("--max_length", args.max_length, config)
    tokenizer = data.load_tokenizer(directory)
    _check_tokenizer(tokenizer, config, directory)
    contents = weights.open_weights(directory, modeling.meta_model(config), args.seed, here.device)
    return Setup(directory, source, config, tokenizer, contents)


def check_benchmark(args: Namespace, here: Place) -> tuple[OPTConfig, weights.Weights]:
    """The same for the benchmark, which needs no data and no trained weights. Raises UserError."""
    _check_processes(args, here)
    size = args.model_name_or_path.removeprefix("facebook/").removeprefix("opt-")
    if size in PRESETS:
        config = modeling.with_dropout(preset_config(size), args.dropout)
    elif Path(args.model_name_or_path).is_dir():
        config = modeling.with_dropout(modeling.load_config(Path(args.model_name_or_path)), args.dropout)
    else:
        raise UserError(f"--model_name_or_path {args.model_name_or_path}: neither a directory nor one of {', '.join(PRESETS)}")
    _check_shape(config, args)
    _check_length("--seq_length", args.seq_length, config)
    return config, weights.InitialWeights(modeling.meta_model(config), args.seed, here.device)


def check_first_loss(loss: float, setup: Setup) -> None:
    """Refuse to train a model whose first loss no model has whose weights are in place. Raises UserError.

    Without any knowledge of the text the loss is ln(vocabulary); half as much again takes wrong weights.
    """
    bound = 1.5 * math.log(setup.config.vocab_size)
    if not loss <= bound:  # nan too
        raise UserError(
            f"the first loss is {loss:.3f}, over {bound:.3f} (1.5 x ln {setup.config.vocab_size}): the weights in {setup.directory} "
            "did not load, are damaged, or belong to another model or tokenizer; download or copy it again"
        )


def _check_processes(args: Namespace, here: Place) -> None:
    if args.fp8 and not has_fp8(here.device):
        raise UserError("--fp8 needs a GPU of compute capability 8.9 (Ada, Hopper) or later: leave it out")
    resolve(args, here.device.type, has_bf16(here.device))
    if here.device.type == "cuda" and here.local_rank >= torch.cuda.device_count():
        raise UserError(f"this node has {torch.cuda.device_count()} GPUs, fewer than its processes: lower --nproc_per_node")
    model_ranks = args.tp_size * args.pp_size
    if args.cuda_graph and here.world_size > 1 and (args.zero_stage == 0 or model_ranks > 1):
        raise UserError(
            f"--cuda_graph on {here.world_size} processes is for --plugin low_level_zero, where they talk to one another outside of what "
            "is recorded: choose that, or leave it out"
        )
    if here.world_size % model_ranks:
        raise UserError(
            f"{here.world_size} processes are not divisible by tp_size {args.tp_size} x pp_size {args.pp_size}: start a multiple of {model_ranks} (--nproc_per_node), or change the sizes"
        )


def _check_shape(config: OPTConfig, args: Namespace) -> None:
    for what, number in (("attention heads", config.num_attention_heads), ("ffn_dim", config.ffn_dim)):
        if number % args.tp_size:
            raise UserError(f"the model's {number} {what} are not divisible by --tp_size {args.tp_size}: choose another")
    if config.num_hidden_layers < args.pp_size:
        raise UserError(f"the model's {config.num_hidden_layers} layers are fewer than --pp_size {args.pp_size}")


def _check_tokenizer(tokenizer: PreTrainedTokenizerFast, config: OPTConfig, directory: Path) -> None:
    tokens = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))
    if tokens > config.vocab_size:
        raise UserError(
            f"the tokenizer in {directory} has {tokens} tokens, its config.json's vocabulary {config.vocab_size}: they do not belong together"
        )
    if tokenizer.eos_token_id != config.eos_token_id:
        raise UserError(
            f"the tokenizer in {directory} ends a text with token {tokenizer.eos_token_id}, its config.json's eos_token_id is "
            f"{config.eos_token_id!r:.60}: they do not belong together"
        )


def _check_length(flag: str, length: int, config: OPTConfig) -> None:
    if length > config.max_position_embeddings:
        raise UserError(
            f"{flag} {length} is over the model's {config.max_position_embeddings} positions: use {config.max_position_embeddings} or less"
        )


def _check_writable(output_path: str) -> None:
    """Write and remove a file where the results will go, or in the nearest folder above that exists."""
    if not output_path:
        raise UserError("--output_path is empty: name a directory")
    target = output_directory(output_path)
    if is_one_file(output_path) and os.path.isdir(output_path):
        raise UserError(f"--output_path {output_path} is a directory, its name one file's: choose another name")
    nearest = target
    try:
        nearest = next(p for p in (target, *target.absolute().parents) if p.exists())
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:  # of exists() too: a name too long, a folder that this user may not look into
        raise UserError(f"--output_path {output_path} cannot be written ({error.strerror}: {nearest}): choose another place") from error


def lock_output(output_path: str) -> None:
    """Keep other runs out of the output directory until this process ends. To be called by one process of a run.

    Raises UserError if another run is there. The kernel releases the lock with the process, however that ends; the file stays.
    """
    file = output_directory(output_path) / ".opt_train.lock"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = open(file, "a+")
    except OSError as error:
        raise UserError(f"--output_path {output_path} cannot be written ({error.strerror}: {file}): choose another place") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise UserError(
            f"--output_path {output_path} is in use by another run ({lock.read().strip()}): choose another, or end that run"
        ) from None
    except OSError as error:  # a network file system without locks
        print(f"{file} cannot be locked ({error.strerror}): take care that no other run writes there", flush=True)
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    _locks.append(lock)


_locks: list = []  # open files: closing one would release it


def is_padding_free(args: Namespace, here: Place, dataset: data.Dataset) -> bool:
    """What --padding_free says, or else whether it pays: where a tenth or more would be pads.

    On a CPU attention needs a rectangle as long as the longest row of all (see attention.attend); padded batches are as long as
    their own, which is better where few rows are much longer than the rest.
    """
    if args.padding_free is not None:
        return args.padding_free
    fill = float(dataset.train.lengths.mean()) / dataset.longest
    return args.pp_size == 1 and fill < 0.9 and (fill > 0.4 or here.device.type == "cuda")


@dataclass
class Schedule:
    """The run in optimizer steps."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    eval_steps: int
    learning_rate: float


def schedule(args: Namespace, rows: int, dp_size: int, start: data.Position) -> Schedule:
    """Rows to steps: the batches of an epoch in groups of gradient_accumulation_steps, the last group may be smaller.

    `start`: where the run starts; if steps were larger or smaller until there, the total is what they were and what is left.
    """

    def steps_for(number):
        return -(-data.batches_an_epoch(number, args.batch_size, dp_size) // args.gradient_accumulation_steps)

    steps = steps_for(rows)
    left = steps * (args.num_epoch - start.epoch - 1) + steps_for(rows - start.rows) if start.epoch < args.num_epoch else 0
    total = max(start.step, min(start.step + left, args.max_train_steps or start.step + left))
    rate = args.learning_rate * (dp_size if args.scale_lr else 1)
    return Schedule(steps, total, round(total * args.warmup_ratio), args.eval_steps or steps, rate)


def missing_kernels(args: Namespace, here: Place, config: OPTConfig, longest: int | None) -> str | None:
    """What the plan says of our own GPU kernels that this run would use and that cannot be built here; None if nothing is missing.

    `longest`: tokens of the longest row where batches are packed, else None.
    """
    return kernel_probe.missing_kernels(here.device, _kernels(args, here, config, longest)) if here.device.type == "cuda" else None


def _kernels(args: Namespace, here: Place, config: OPTConfig, longest: int | None) -> Iterator[tuple]:
    """The kernels of opt/kernels.py that training comes to, as kernel_probe knows them. What is left out here is tried when it is needed."""
    dtype, is_ddp, is_gemini = modeling.DTYPES[args.precision], args.plugin.startswith("torch_ddp"), args.plugin == "gemini"
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
    args: Namespace, here: Place, setup: Setup, dataset: data.Dataset, plan: Schedule, dp_size: int, before, kernels: str | None
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
