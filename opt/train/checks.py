"""Everything that can go wrong before training, checked.

check() runs on every process before any of them waits for another: it reaches the same verdict
everywhere, so a mistake ends all processes at once.
"""

import fcntl
import importlib.util
import math
import os
import socket
import tempfile
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import OPTConfig, PreTrainedTokenizerFast

from args import is_one_file, output_directory, resolve
from opt.colossal import low_memory
from opt.colossal.processes import Place
from opt.data import tokens
from opt.data.texts import WIKITEXT
from opt.errors import UserError
from opt.model import lora, weights
from opt.model.config import load_config, with_dropout
from opt.model.kernel_probe import has_bf16, has_fp8
from opt.model.opt import meta_model
from opt.model.sizes import PRESETS, preset_config
from opt.registry import ways_to_hold
from opt.train.export import FILES

DEFAULT_MAX_LENGTH = 512


@dataclass(frozen=True)
class Setup:
    """What check() found: enough to start without another look at the disk's directories."""

    flags: Namespace
    plan: Namespace  # the flags, with what they left open
    directory: Path  # of the model
    source: OPTConfig  # as config.json has it
    config: OPTConfig  # to train with, see --dropout
    tokenizer: PreTrainedTokenizerFast
    tokenizer_said: str  # what it lacked and was given, in words
    weights: weights.Weights


def check(flags: Namespace, here: Place) -> Setup:
    """Check flags, paths, model and tokenizer. Raises UserError."""
    flags = with_first_plugin(flags, here)
    plan = settle(flags, here)
    if plan.report_to != "none" and importlib.util.find_spec(plan.report_to) is None:
        raise UserError(
            f"--report_to {plan.report_to} needs a package that is not installed: pip install "
            f"{plan.report_to}, or leave it out"
        )
    _check_writable(plan.output_path)

    directory = weights.locate(plan.model_name_or_path, plan.model_revision)
    source = load_config(directory)
    config = with_dropout(source, plan.dropout)
    check_shape(config, plan)
    _check_beside(plan, source)
    plan = plan.but(
        max_length=plan.max_length or min(DEFAULT_MAX_LENGTH, config.max_position_embeddings)
    )
    _check_length("--max_length", plan.max_length, config)
    if WIKITEXT in plan.dataset:
        plan = plan.but(block_size=plan.block_size or plan.max_length)
    if plan.block_size:
        _check_length("--block_size", plan.block_size, config)
    of_tokenizer = directory
    if plan.tokenizer_name:
        of_tokenizer = weights.locate(plan.tokenizer_name, tokenizer_alone=True)
    tokenizer, said = load_tokenizer(of_tokenizer, config)
    _check_uses(plan, tokenizer, config)
    contents = weights.open_weights(directory, meta_model(config), plan.seed, here.device)
    plan, contents = with_adapters(plan, config, contents)
    low_memory.check_cuts(plan, contents)
    writes = not plan.no_save and not plan.eval_only
    files = weights.weight_files(directory)
    own = {place.resolve() for place in (directory, *files)}
    if writes and Path(plan.output_path).resolve() in own:
        raise UserError(
            f"--output_path {plan.output_path} is the model's own, which the new one would take "
            "the place of: choose another"
        )
    if writes and lora.is_saved_alone(plan) and not contents.base.is_transformers_own:
        raise UserError(
            f"transformers and PEFT do not read the weights in {directory} as they are "
            f"({'; '.join(contents.notes):.200}), and an adapter is of no use without them: give "
            "--merge_lora, which saves the whole model, or write them anew first"
        )
    if plan.lora_r and not files:
        raise UserError(
            f"{directory} has no weights, and adapters are trained beside those of a trained "
            "model: give one, or leave out --lora_r"
        )
    return Setup(flags, plan, directory, source, config, tokenizer, said, contents)


def check_benchmark(flags: Namespace, here: Place) -> tuple[Namespace, OPTConfig, weights.Weights]:
    """The same for the benchmark, which needs no data and no trained weights: its plan, and the
    model. Raises UserError."""
    plan = settle(flags, here)
    _check_results(plan)
    size = plan.model_name_or_path.removeprefix("facebook/").removeprefix("opt-")
    if size in PRESETS:
        config = with_dropout(preset_config(size), plan.dropout)
    elif Path(plan.model_name_or_path).is_dir():
        config = with_dropout(load_config(Path(plan.model_name_or_path)), plan.dropout)
    else:
        raise UserError(
            f"--model_name_or_path {plan.model_name_or_path}: neither a directory nor one of "
            f"{', '.join(PRESETS)}"
        )
    check_shape(config, plan)
    _check_length("--seq_length", plan.seq_length, config)
    contents = weights.InitialWeights(meta_model(config), plan.seed, here.device)
    plan, contents = with_adapters(plan, config, contents)
    low_memory.check_cuts(plan, contents)
    return plan, config, contents


def with_adapters(
    plan: Namespace, config: OPTConfig, contents: weights.Weights
) -> tuple[Namespace, weights.Weights]:
    """With LoRA: the plan with what --lora_adapter says, and weights with those of the adapters."""
    folder = getattr(plan, "lora_adapter", None)
    if folder:
        settings, adapter = lora.read_adapter(Path(folder), config)
        plan = plan.but(
            lora_r=settings.r,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout if plan.lora_dropout is None else plan.lora_dropout,
            lora_target_modules=list(settings.targets),
            use_rslora=settings.use_rslora,
        )
    elif plan.lora_r:
        adapter = lora.InitialAdapter(lora.Lora.of(plan), config, plan.seed)
    else:
        return plan, contents
    if plan.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "--load_in_4bit needs a package that is not installed: pip install bitsandbytes, or "
            "leave it out"
        )
    return plan, lora.Adapted(contents, adapter)


def warning_of_first_loss(loss: float, setup: Setup) -> str | None:
    """What is to be said of a first loss that is hardly any model's on a text of its kind.

    Without any knowledge of the text it is ln(vocabulary). That the weights are those of the file
    has been checked by then (pieces.Form.check); whether they belong to this tokenizer and these
    texts cannot be.
    """
    bound = 1.5 * math.log(setup.config.vocab_size)
    if loss <= bound:
        return None
    return (  # nan too
        f"warning: the first loss is {loss:.3f}, over {bound:.3f} "
        f"(1.5 x ln {setup.config.vocab_size}), worse than guessing: the weights are as "
        f"{setup.directory} has them; are the tokenizer and the texts what they were trained with?"
    )


def with_first_plugin(flags: Namespace, here: Place) -> Namespace:
    """With --auto and no --plugin: the flags with the fastest, which further flags may be for. What
    fits is settled later, by what there is (opt/train/fit.py)."""
    if here.device.type != "cuda" or not flags.auto or "plugin" in flags.auto:
        return flags
    plugin, more, _ = next(ways_to_hold(here.world_size, has_bf16(here.device)))
    return flags.but(plugin=plugin, **more)


def settle(flags: Namespace, here: Place) -> Namespace:
    """The plan, as far as processes and devices make it. Raises UserError."""
    if flags.fp8 and not has_fp8(here.device):
        raise UserError(
            "--fp8 needs a GPU of compute capability 8.9 (Ada, Hopper) or later: leave it out"
        )
    plan = resolve(flags, here.device.type, has_bf16(here.device))
    if here.device.type == "cuda" and here.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"this node has {torch.cuda.device_count()} GPUs, fewer than its processes: lower "
            "--nproc_per_node"
        )
    model_ranks = plan.tp_size * plan.pp_size
    if plan.cuda_graph and here.world_size > 1:
        holds_one_model = here.world_size == model_ranks and plan.zero_stage == 0
        if not holds_one_model and (plan.zero_stage == 0 or model_ranks > 1):
            raise UserError(
                f"--cuda_graph on {here.world_size} processes is for --plugin low_level_zero, or "
                f"for hybrid_parallel with --tp_size x --pp_size {here.world_size} and "
                "--zero_stage 0: choose one of these, or leave it out"
            )
    if here.world_size % model_ranks:
        raise UserError(
            f"{here.world_size} processes are not divisible by tp_size {plan.tp_size} x pp_size "
            f"{plan.pp_size}: start a multiple of {model_ranks} (--nproc_per_node), or change the "
            "sizes"
        )
    return plan.but(dp_size=here.world_size // model_ranks)


def check_shape(config: OPTConfig, plan: Namespace) -> None:
    """Raise UserError for a model that cannot be cut so."""
    for what, number in (
        ("attention heads", config.num_attention_heads),
        ("ffn_dim", config.ffn_dim),
    ):
        if number % plan.tp_size:
            raise UserError(
                f"the model's {number} {what} are not divisible by --tp_size {plan.tp_size}: "
                "choose another"
            )
    if config.num_hidden_layers < plan.pp_size:
        raise UserError(
            f"the model's {config.num_hidden_layers} layers are fewer than --pp_size {plan.pp_size}"
        )


def load_tokenizer(directory: Path, config: OPTConfig) -> tuple[PreTrainedTokenizerFast, str]:
    """The tokenizer, and what it lacked and was given, in words. Raises UserError.

    Start and end token that none of its files names are config.json's: its class would add one of
    its own behind the vocabulary (GPT-2's is <|endoftext|>), or has none.
    """
    tokenizer = tokens.load_tokenizer(directory)
    ends = config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    ids = {"bos_token": config.bos_token_id, "eos_token": ends[0] if ends else None}
    named, vocabulary = tokens.special_tokens(directory), tokenizer.get_vocab()
    by_id = {number: token for token, number in vocabulary.items()}
    given = {
        name: by_id[number]
        for name, number in ids.items()
        if name not in named and number in by_id and number < config.vocab_size
    }
    said = ""
    if any(getattr(tokenizer, name) != token for name, token in given.items()):
        if "unk_token" not in named and tokenizer.unk_token and "eos_token" in given:
            given["unk_token"] = given["eos_token"]  # as OPT's own has it
        if not tokenizer.pad_token and config.pad_token_id in by_id:
            given["pad_token"] = by_id[config.pad_token_id]
        said = ", ".join(
            f"{name} {token} ({ids[name]})" for name, token in given.items() if name in ids
        )
        said = f"its files name no {said}: it is config.json's"
        tokenizer = tokens.load_tokenizer(directory, **given)
    size = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))
    if size > config.vocab_size:
        raise UserError(
            f"the tokenizer in {directory} has {size} tokens, its config.json's vocabulary "
            f"{config.vocab_size}: they do not belong together"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer in {directory} has no end token, and config.json names none: put "
            "eos_token into its special_tokens_map.json"
        )
    if ends and tokenizer.eos_token_id not in ends:
        raise UserError(
            f"the tokenizer in {directory} ends a text with token {tokenizer.eos_token_id}, its "
            "config.json's eos_token_id is "
            f"{config.eos_token_id!r:.60}: they do not belong together"
        )
    return tokenizer, said


def _check_uses(plan: Namespace, tokenizer: PreTrainedTokenizerFast, config: OPTConfig) -> None:
    """Of what is done with the trained model, --prompt and --push_to_hub: that it will be a folder,
    and that the prompts fit into its positions."""
    for flag, given in (("--prompt", plan.prompt), ("--push_to_hub", plan.push_to_hub)):
        if given and is_one_file(plan.output_path):
            raise UserError(
                f"{flag} needs the model's folder, and --output_path {plan.output_path} is one "
                "file: name a directory"
            )
    for prompt in plan.prompt or []:
        # And the start token, and one to write
        number = len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) + 2
        if number > config.max_position_embeddings:
            raise UserError(
                f"--prompt {prompt:.40} ... takes {number} positions, the model has "
                f"{config.max_position_embeddings}: shorten it"
            )


def _check_length(flag: str, length: int, config: OPTConfig) -> None:
    if length > config.max_position_embeddings:
        raise UserError(
            f"{flag} {length} is over the model's {config.max_position_embeddings} positions: use "
            f"{config.max_position_embeddings} or less"
        )


def _check_results(plan: Namespace) -> None:
    """Of the benchmark: that what it writes at the end can be written."""
    places = {
        "--json": (plan.json, os.path.isdir, "it is a folder"),
        "--profile": (getattr(plan, "profile", None), os.path.isfile, "it is a file"),
    }
    for flag, (place, is_other, what) in places.items():
        if place:
            _check_folder(f"{flag} {place}", Path(place).parent)
        if place and is_other(place):
            raise UserError(f"{flag} {place} cannot be written ({what}): choose another place")


def _check_folder(given: str, folder: Path) -> None:
    """Write and remove a file in it, or in the nearest folder above that exists; `given`: the flag
    that it is of."""
    nearest = folder
    try:
        nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        # Of exists() too: a name too long, a folder that this user may not look into
        raise UserError(
            f"{given} cannot be written ({error.strerror}: {nearest}): choose another place"
        ) from error


def _check_writable(output_path: str) -> None:
    """Raise UserError where the results cannot go."""
    target = output_directory(output_path)
    if is_one_file(output_path) and os.path.isdir(output_path):
        raise UserError(
            f"--output_path {output_path} is a directory, its name one file's: choose another name"
        )
    if is_one_file(output_path) and not Path(output_path).suffix:
        raise UserError(f"--output_path {output_path} is a suffix alone: name the file")
    _check_folder(f"--output_path {output_path}", target)
    files = (*FILES, ".opt_train.lock")
    if folder := next((target / name for name in files if (target / name).is_dir()), None):
        raise UserError(f"--output_path {output_path}: {folder} is a folder, a file belongs there")
    if (target / "checkpoints").is_file():
        raise UserError(
            f"--output_path {output_path}: {target / 'checkpoints'} is a file, a folder belongs "
            "there"
        )


# Of config.json, what an export changes
_OF_A_FILE = ("torch_dtype", "transformers_version", "architectures", "_name_or_path")
_OF_A_FILE += ("quantization_config", "_attn_implementation_autoset")


def _check_beside(plan: Namespace, source: OPTConfig) -> None:
    """Of a one-file output: that config.json beside it, if there is one, is this model's, and that
    no loader of the folder takes other weights."""
    if plan.no_save or not is_one_file(plan.output_path):
        return
    output = Path(plan.output_path)
    before = weights.taken_before(output.name)
    names = () if before is None else (lora.CONFIG_FILE, *before)
    if hides := next((name for name in names if output.with_name(name).is_file()), None):
        raise UserError(
            f"--output_path {output}: {hides} is there, which loaders of the folder take first: "
            "choose a folder of its own"
        )
    file = output.with_name("config.json")
    if not file.is_file():
        return
    try:
        there, own = (
            {k: v for k, v in fields.items() if k not in _OF_A_FILE}
            for fields in (load_config(file.parent).to_dict(), source.to_dict())
        )
    except UserError:
        there, own = None, {}
    if there != own:
        raise UserError(
            f"--output_path {output}: {file} is of another model, and this one's belongs "
            "there: choose a folder of its own"
        )


def lock_output(output_path: str) -> None:
    """Keep other runs out of the output directory until this process ends. To be called by one
    process of a run.

    Raises UserError if another run is there. The kernel releases the lock with the process, however
    that ends; the file stays.
    """
    file = output_directory(output_path) / ".opt_train.lock"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = open(file, "a+")
    except OSError as error:
        raise UserError(
            f"--output_path {output_path} cannot be written ({error.strerror}: {file}): choose "
            "another place"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise UserError(
            f"--output_path {output_path} is in use by another run ({lock.read().strip()}): choose "
            "another, or end that run"
        ) from None
    except OSError as error:  # a network file system without locks
        print(
            f"{file} cannot be locked ({error.strerror}): take care that no other run writes there",
            flush=True,
        )
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    _locks.append(lock)


def check_shared(output_path: str, here: Place) -> None:
    """Raise UserError on all processes where --output_path is not the same folder on all nodes. To
    be called by all of them, after lock_output.

    Every process writes its part of a checkpoint there. The first process makes a file; on each
    other node one tries to make the same, which a file system that they share refuses, even one
    whose clients remember what is not there.
    """
    if not dist.is_initialized() or here.world_size == 1:
        return
    folder, name = output_directory(output_path), [f".opt_train.probe-{os.urandom(8).hex()}"]
    if here.is_main:
        (folder / name[0]).touch()
    dist.broadcast_object_list(name)
    fault = _other_folder(folder, name[0]) if here.local_rank == 0 and not here.is_main else None
    faults = [None] * here.world_size
    dist.all_gather_object(faults, (socket.gethostname(), fault))
    if here.is_main:
        (folder / name[0]).unlink()
    if wrong := {f"on {host} {fault}": None for host, fault in faults if fault}:
        raise UserError(
            f"--output_path {output_path} is not the folder that {faults[0][0]} writes to: "
            f"{'; '.join(wrong)}; choose one that the nodes share"
        )


def _other_folder(folder: Path, name: str) -> str | None:
    """Why `folder` here is not the one in which another node has made a file, in words."""
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch(exist_ok=False)
    except FileExistsError:
        return None
    except OSError as error:
        return f"it cannot be written ({error.strerror})"
    (folder / name).unlink()
    if is_new:
        folder.rmdir()
    return "it is another one"


_locks: list = []  # open files: closing one would release it
