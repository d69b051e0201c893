"""The trained model, out of any plugin and any parallel sizes, into a directory that transformers
loads; or its adapters, into one that PEFT loads."""

import json
import math
import os
import shutil
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import OPTConfig

from args import is_one_file, output_directory
from opt.colossal.plugin import Plugin
from opt.model import lora, weights

SHARD_BYTES = 5 * 10**9  # transformers' own limit for one weights file


GENERATION = "generation_config.json"
CARD = "README.md"
CARD_MARK = (
    "<!-- written by opt_train_demo.py: changes are lost with the next run into this folder -->"
)
# What loaders start from in a model that is written here
_HEADS = (*weights.FILES[:2], lora.CONFIG_FILE)
_SHARDS = ("model-*-of-*.safetensors", "pytorch_model-*-of-*.bin")
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja"),
)
# All that a run may write for others to read
FILES = (
    *("config.json", GENERATION, CARD, "metrics.jsonl", "loss.png", *_HEADS),
    *(lora.TENSORS_FILES[0], _SHARDS[0], *_TOKENIZER),
)
# Of a model that was there before: loaders would take it, or parts of it, for the new one's.
_WEIGHTS = (lora.CONFIG_FILE, *weights.FILES, *lora.TENSORS_FILES, *_SHARDS)
OLD = (*_WEIGHTS, GENERATION, *_TOKENIZER)


def replaced(plan: Namespace) -> list[str]:
    """Names of what there is of a model where this run's will be, which goes then."""
    if plan.no_save or plan.eval_only:
        return []
    target = Path(plan.output_path)
    if is_one_file(plan.output_path):
        return [target.name] if target.is_file() else []
    patterns = (*_WEIGHTS, *(["config.json"] if lora.is_saved_alone(plan) else []))
    return sorted(file.name for pattern in patterns for file in target.glob(pattern))


def export_model(
    plugin: Plugin,
    source: Path,
    config: OPTConfig,
    tokenizer,
    output_path: str,
    shard_bytes: int = SHARD_BYTES,
    card: str | None = None,
) -> None:
    """Write a boosted model in Hugging Face layout; with LoRA its adapters alone in PEFT's, or with
    --merge_lora the whole model that they make. To be called by all processes. `source`: the
    directory that it came from, `config` what its config.json says; `card` its README.md.

    With pipeline stages each stage writes its own shards, so on several nodes output_path must be a
    folder that they share. Everything is written aside and moved into place at the end, the file
    that makes it loadable last: a reader finds the whole model or none.

    Shards are cut here and not by huggingface_hub.split_torch_state_dict_into_shards: that asks for
    the tensors of all stages at once, which is more memory than a shard, and cuts elsewhere, over
    the stages' ends and where a tensor is larger than `shard_bytes`.
    """
    target = output_directory(output_path)
    aside = target / ".model.writing"
    is_main = dist.get_rank() == 0
    if is_main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    is_adapter = bool(plugin.adapters) and not plugin.plan.merge_lora
    one_file = is_one_file(output_path)
    shards, dtype = _write_shards(plugin, aside, is_adapter, math.inf if one_file else shard_bytes)
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, shards)
    if is_main:
        suffix = ".safetensors" if is_adapter else Path(output_path).suffix
        shards = [shard for own in everyones for shard in own]
        _assemble(shards, aside, one_file or is_adapter, suffix)
        if is_adapter:
            (aside / "one_file.safetensors").rename(aside / lora.TENSORS_FILES[0])
            fields = lora.peft_config(plugin.adapters, plugin.plan)
            (aside / lora.CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n")
            (target / "config.json").unlink(missing_ok=True)  # of a whole model that was there
        else:
            _save_config(config, dtype, aside)
            if (source / GENERATION).is_file():
                shutil.copyfile(source / GENERATION, aside / GENERATION)
        tokenizer.save_pretrained(aside)
        _add_card(card, aside, target)
        if one_file:
            _publish_file(aside, output_path)
        else:
            _publish(aside, target)
        shutil.rmtree(aside)
    dist.barrier()


def _write_shards(
    plugin: Plugin, aside: Path, is_adapter: bool, shard_bytes: float
) -> tuple[list[tuple[str, dict[str, int]]], torch.dtype | None]:
    """This process's part of the weights, into `aside`: of each file its name and what is in it,
    {name: bytes}; and their dtype. To be called by all processes: all go through all weights, which
    takes them all."""
    spread = plugin.spread
    writes = spread.dp_rank == 0 and spread.tp_rank == 0
    tensors = (found for found in plugin.form.whole_weights(is_adapter) if writes)
    if is_adapter:
        tensors = ((lora.peft_name(name), tensor) for name, tensor in tensors)
    elif plugin.adapters:
        tensors = lora.merged(tensors, plugin.adapters)
    shards, dtype = [], None
    block, size = {}, 0
    for name, tensor in tensors:
        dtype = dtype or tensor.dtype
        nbytes = tensor.numel() * tensor.element_size()
        if block and size + nbytes > shard_bytes:
            shards.append(_write_shard(aside, spread.pp_rank, len(shards), block))
            block, size = {}, 0
        block[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += nbytes
    if block:
        shards.append(_write_shard(aside, spread.pp_rank, len(shards), block))
    return shards, dtype


def _save_config(config: OPTConfig, dtype: torch.dtype, directory: Path) -> None:
    """config.json, as the model came with it."""
    fields = config.to_dict() | {
        "torch_dtype": str(dtype).removeprefix("torch."),
        "architectures": ["OPTForCausalLM"],
    }
    # [F41] transformers 4.51 writes down that an attention was chosen, but not which: who loads
    # that gets the slow eager one.
    fields.pop("_attn_implementation_autoset", None)
    # Of weights that are not quantized: who loads them would take them for such
    fields.pop("quantization_config", None)
    OPTConfig.from_dict(fields).save_pretrained(directory)


def _add_card(card: str | None, aside: Path, target: Path) -> None:
    """Unless the README.md that is there was written by somebody else."""
    if card is None:
        return
    before = target / CARD
    if before.is_file() and CARD_MARK not in before.read_text(encoding="utf-8", errors="replace"):
        print(f"{before} was not written by this script: it is left as it is", flush=True)
        return
    (aside / CARD).write_text(card, encoding="utf-8")


def _put_beside(files: list[Path], target: Path) -> None:
    """Move what belongs to a weights file beside it; what is there and of another model stays."""
    for file in files:
        there = target / file.name
        if there.exists() and file.name != CARD and there.read_bytes() != file.read_bytes():
            print(f"{there} is another than this model's: it is left as it is", flush=True)
        else:
            file.rename(there)


def _write_shard(
    directory: Path, stage: int, number: int, tensors: dict
) -> tuple[str, dict[str, int]]:
    file = f"stage{stage:03d}-{number:05d}.safetensors"
    _save(tensors, directory / file)
    return file, {name: t.numel() * t.element_size() for name, t in tensors.items()}


def _save(tensors: dict, file: Path) -> None:
    """Write tensors to disk, for good, in the format that the file's name says."""
    file.touch()
    if file.suffix == ".bin":
        try:
            with open(file, "wb") as f:
                torch.save(tensors, f)
        except RuntimeError as error:
            # [F59] What the disk refuses is behind an exception of torch.save's own
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
    else:
        mode = file.stat().st_mode
        save_file(tensors, file, metadata={"format": "pt"})
        # [F43] safetensors makes files that nobody else may read, whatever the umask
        file.chmod(mode)
    flush_to_disk(file)


def _assemble(shards: list, directory: Path, one_file: bool, suffix: str) -> None:
    """Give the shards of all stages transformers' names, or join them into one file."""
    if one_file:
        from safetensors.torch import load_file

        tensors = {}
        for file, _ in shards:
            tensors |= load_file(directory / file)
        _save(tensors, directory / f"one_file{suffix}")
        for file, _ in shards:
            (directory / file).unlink()
        return
    if len(shards) == 1:
        (directory / shards[0][0]).rename(directory / "model.safetensors")
        return
    weight_map, total = {}, 0
    for i, (file, sizes) in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        (directory / file).rename(directory / name)
        weight_map |= dict.fromkeys(sizes, name)
        total += sum(sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _publish_file(aside: Path, output_path: str) -> None:
    """Move the one weights file into place, behind what belongs to it."""
    target, whole = output_directory(output_path), next(aside.glob("one_file*"))
    _put_beside([file for file in sorted(aside.iterdir()) if file != whole], target)
    os.replace(whole, output_path)
    flush_to_disk(target)


def _publish(aside: Path, target: Path) -> None:
    """Move the files into place; the one that a loader starts from leaves first and arrives
    last."""
    for pattern in OLD:  # its heads first
        for old in target.glob(pattern):
            old.unlink()
    for file in sorted(aside.iterdir(), key=lambda f: f.name in _HEADS):
        file.rename(target / file.name)
    flush_to_disk(target)


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
