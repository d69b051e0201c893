"""config.json: read, checked, and changed by what a run asks for."""

import copy
import json
from pathlib import Path

import torch
from transformers import OPTConfig
from transformers.activations import ACT2FN

from opt.errors import UserError, in_a_line

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_config(directory: Path) -> OPTConfig:
    """The configuration in a model's directory. Raises UserError where there is none, it is not
    OPT's, or makes no model."""
    file = directory / "config.json"
    if not file.is_file() and (directory / "adapter_config.json").is_file():
        raise UserError(
            f"{directory} is an adapter alone: give its base model, and the adapter with "
            "--lora_adapter"
        )
    if not file.is_file():
        raise UserError(
            f"{directory} has no config.json: give a model's directory in Hugging Face layout"
        )
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("it is not a JSON object")
        if raw.get("model_type") != "opt":
            raise UserError(
                f"{file} describes a model of type '{raw.get('model_type')!s:.40}', not OPT: give "
                "an OPT model such as facebook/opt-350m"
            )
        config = OPTConfig.from_dict(raw)
    except UserError:
        raise
    except Exception as error:
        # Of a value that it does not expect OPTConfig says so by almost any exception
        raise UserError(
            f"{file} cannot be read ({in_a_line(error)}): download or copy it again"
        ) from error
    _check_values(config, file)
    config._attn_implementation = "sdpa"
    return config


# field of config.json -> its type, the least and the most that it may be. OPT-175b has 96 layers of
# 12,288.
_SIZES = dict.fromkeys(
    ("vocab_size", "hidden_size", "ffn_dim", "word_embed_proj_dim", "num_attention_heads"),
    (int, 1, 2**24),
)


_VALUES = _SIZES | {
    "max_position_embeddings": (int, 2, 2**24),
    "num_hidden_layers": (int, 1, 4096),
    **dict.fromkeys(("dropout", "attention_dropout"), ((int, float), 0, 1)),
    "init_std": ((int, float), 0, 1000),
    **dict.fromkeys(
        (
            "do_layer_norm_before",
            "_remove_final_layer_norm",
            "enable_bias",
            "layer_norm_elementwise_affine",
            "tie_word_embeddings",
        ),
        (bool, 0, 1),
    ),
}


def _check_values(config: OPTConfig, file: Path) -> None:
    for name, (kind, low, high) in _VALUES.items():
        value = getattr(config, name)
        if (
            not isinstance(value, kind)
            or isinstance(value, bool) != (kind is bool)
            or not low <= value <= high
        ):
            wanted = (
                "true or false"
                if kind is bool
                else f"{'a whole' if kind is int else 'a'} number from {low} to {high}"
            )
            raise UserError(f"{file}: {name} is {value!r:.60}, and must be {wanted}: correct it")
    pad = config.pad_token_id
    if type(pad) is not int or not 0 <= pad < config.vocab_size:
        raise UserError(
            f"{file}: pad_token_id is {pad!r:.60}, and must be a token of the vocabulary's "
            f"{config.vocab_size}: OPT's is 1"
        )
    if not isinstance(config.activation_function, str) or config.activation_function not in ACT2FN:
        raise UserError(
            f"{file}: activation_function is {config.activation_function!r:.60}, which "
            "transformers does not have: OPT's is relu"
        )
    ends = config.eos_token_id
    of_list = ends if isinstance(ends, list) else [ends]
    is_token = [type(end) is int and 0 <= end < config.vocab_size for end in of_list]
    if ends is not None and not (of_list and all(is_token)):
        raise UserError(
            f"{file}: eos_token_id is {ends!r:.60}, and must be a token of the vocabulary's "
            f"{config.vocab_size}, a list of them, or null: OPT's is 2"
        )
    start = config.bos_token_id
    if start is not None and not (type(start) is int and 0 <= start < config.vocab_size):
        raise UserError(
            f"{file}: bos_token_id is {start!r:.60}, and must be a token of the vocabulary's "
            f"{config.vocab_size}, or null: OPT's is 2"
        )
    if config.layerdrop:
        raise UserError(
            f"{file}: layerdrop is {config.layerdrop!r:.60}, and not supported: set it to 0"
        )
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"the model's hidden_size {config.hidden_size} is not divisible by its "
            f"{config.num_attention_heads} attention heads: correct its config.json"
        )


def with_dropout(config: OPTConfig, dropout: float | None) -> OPTConfig:
    """A copy of `config` with another dropout probability, unless that is None; with 0, attention's
    dropout is off as well."""
    config = copy.deepcopy(config)
    if dropout is not None:
        config.dropout = dropout
        if dropout == 0:
            config.attention_dropout = 0.0
    return config
