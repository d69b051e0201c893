"""What the keys of a checkpoint are called in OPTForCausalLM, whoever wrote it.

Base models lack the `model.` in front; a wrapper (DataParallel, torch.compile, FSDP, a trainer's
class) or a merged adapter leaves a prefix; other heads and old versions leave tensors that a
language model has no use for.
"""

import re
from collections.abc import Iterable
from fnmatch import fnmatch

from opt.errors import UserError

# What wrappers put between the parts of a name, wherever the wrapped module is.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Tensors that transformers leaves out as well: versions and masks of old releases, heads of
# classifiers, of question answering and of reward models.
_NO_USE = (
    "*decoder.version",
    "*._float_tensor",
    "*.self_attn.bias",
    "*.self_attn.masked_bias",
    "*rotary_emb.inv_freq",
    "*position_ids",
    "score.*",
    "classifier.*",
    "qa_outputs.*",
    "v_head.*",
    "value_head.*",
)
# Of an adapter beside the weights that it adapts
_ADAPTER = re.compile(r"(^|\.)(lora_[\w]+|base_layer|ia3_l|modules_to_save)(\.|$)")
_DECODER = re.compile(r"(?:.*\.)?(?=decoder\.(?:embed_tokens|embed_positions|layers)\.)")


def full_names(keys: Iterable[str], place: str) -> tuple[dict[str, str], list[str]]:
    """{name in OPTForCausalLM: key}, without those of no use; and what was done for it, in words.

    Raises UserError for keys of several models, or of an adapter that is not merged; `place` says
    where they are.
    """
    keys, notes = list(keys), []
    if adapter := next((key for key in keys if _ADAPTER.search(key)), None):
        raise UserError(
            f"{place}: {adapter} is of an adapter that is not merged: merge it (PEFT's "
            "merge_and_unload), and give that"
        )
    short = {key: ".".join(p for p in key.split(".") if p not in _WRAPPERS) for key in keys}
    too_much = {w: sum(w in key.split(".") for key in keys) for w in _WRAPPERS}
    prefixes = {match[0] for name in short.values() if (match := _DECODER.match(name))}
    outer = {prefix.removesuffix("model.") for prefix in prefixes}
    if len(outer) > 1:
        first, second = sorted(outer)[:2]
        raise UserError(
            f"{place} holds several models, under {first!r:.60} and {second!r:.60}: save the one "
            "to be trained alone"
        )
    prefix = outer.pop() if outer else ""
    if prefix:
        too_much[prefix.rstrip(".")] = sum(name.startswith(prefix) for name in short.values())
    for what, number in too_much.items():
        if number:
            notes.append(f"{number} names have {what}. too much, which is left out")

    names, no_use = {}, []
    for key, name in short.items():
        name = name.removeprefix(prefix)
        name = f"model.{name}" if name.startswith("decoder.") else name
        if any(fnmatch(name, pattern) for pattern in _NO_USE):
            no_use.append(key)
        elif name in names:
            raise UserError(f"{place} has two tensors for {name}, {names[name]} and {key}")
        else:
            names[name] = key
    if no_use:
        notes.append(
            f"{', '.join(no_use[:3])}{' ...' * (len(no_use) > 3)} left out: a language model has "
            "no use for it"
        )
    return names, notes
