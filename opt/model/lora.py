"""LoRA: frozen weights, and beside each matrix two small ones that are trained, W x + scale B A x
(Hu et al., arXiv:2106.09685). Names, meaning and files are PEFT's, which is not needed for any of
it: an adapter is a folder with adapter_config.json and adapter_model.safetensors.
"""

import hashlib
import json
import math
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import OPTConfig

from opt.errors import UserError, in_a_line
from opt.model.weights import CheckpointWeights, Weights, generator_of

# The matrices of a decoder layer by PEFT's name of them -> where they are in the layer
TARGETS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "out_proj": "self_attn.out_proj",
    "fc1": "fc1",
    "fc2": "fc2",
}
CONFIG_FILE, TENSORS_FILES = (
    "adapter_config.json",
    ("adapter_model.safetensors", "adapter_model.bin"),
)
_PART = ".adapter."  # of a parameter's name here, "." in PEFT's
_PEFT = "base_model.model."  # in front of PEFT's names


@dataclass(frozen=True)
class Lora:
    """What an adapter is like."""

    r: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]  # of TARGETS
    use_rslora: bool

    @classmethod
    def of(cls, plan: Namespace) -> "Lora | None":
        """What the flags ask for; None where all parameters are trained."""
        if not plan.lora_r:
            return None
        return cls(
            plan.lora_r,
            plan.lora_alpha,
            plan.lora_dropout,
            tuple(plan.lora_target_modules),
            plan.use_rslora,
        )

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) (rank-stabilized, Kalajdzievski, arXiv:2312.03732)."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def shapes(self, config: OPTConfig) -> dict[str, tuple[int, int]]:
        """Names and shapes of all that is trained of a model."""
        found = {}
        for layer in range(config.num_hidden_layers):
            for target in self.targets:
                inputs, outputs = matrix_size(target, config)
                place = f"model.decoder.layers.{layer}.{TARGETS[target]}{_PART}"
                found[f"{place}lora_A.weight"] = (self.r, inputs)
                found[f"{place}lora_B.weight"] = (outputs, self.r)
        return found


def matrix_size(target: str, config: OPTConfig) -> tuple[int, int]:
    """(in, out) of one of TARGETS."""
    hidden, wide = config.hidden_size, config.ffn_dim
    return {"fc1": (hidden, wide), "fc2": (wide, hidden)}.get(target, (hidden, hidden))


class Adapter(nn.Module):
    """What is added to a linear map's output: see forward()."""

    def __init__(self, inputs: int, outputs: int, lora: Lora):
        super().__init__()
        self.lora_A = nn.Linear(inputs, lora.r, bias=False)
        self.lora_B = nn.Linear(lora.r, outputs, bias=False)
        self.scale, self.dropout = lora.scale, lora.dropout

    @property
    def drops(self) -> bool:
        """Whether it drops anything now."""
        return self.training and self.dropout > 0

    def forward(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """x (..., in), out (..., out) -> out + scale * B A dropout(x).

        Of weights that tensor parallelism has cut a process computes its part: of B's rows, or, of
        A's columns, a summand.
        """
        inner = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.weight)
        return out + F.linear(inner * self.scale, self.lora_B.weight)


def add_adapters(model: nn.Module, lora: Lora) -> None:
    """Freeze an OPTForCausalLM, and give each layer the adapters of its matrices, by their names,
    in `layer.adapters`: from there linear.attach takes them once a plugin has cut the model."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in model.model.decoder.layers:
        layer.adapters = nn.ModuleDict()
        for target in lora.targets:
            linear = layer.get_submodule(TARGETS[target])
            layer.adapters[target] = Adapter(linear.in_features, linear.out_features, lora)


# ---- weights


class Adapted(Weights):
    """A model's weights with those of an adapter, which alone are trained."""

    def __init__(self, base: Weights, adapter: Weights):
        super().__init__({name: base for name in base} | {name: adapter for name in adapter})
        self.base, self._adapter, self.notes = base, adapter, base.notes

    def __getitem__(self, name):
        return self._names.get(name, self.base)[name]

    def shape(self, name):
        return self._names.get(name, self.base).shape(name)

    def sample(self, name):
        """See Weights."""
        return self._names.get(name, self.base).sample(name)

    @property
    def reading_bytes(self):
        """See Weights."""
        return self.base.reading_bytes

    @property
    def frozen_checksum(self) -> str:
        """See Weights."""
        digest = hashlib.sha256()
        for name in sorted(self.base):
            _, values = self.base.sample(name)
            digest.update(name.encode() + values.cpu().float().numpy().tobytes())
        return digest.hexdigest()

    @property
    def trained(self) -> Weights:
        """The adapter's."""
        return self._adapter

    def taken_up(self, saved: Weights) -> "Adapted":
        """The same frozen weights, with another adapter's."""
        return Adapted(self.base, saved)


class InitialAdapter(Weights):
    """A as PEFT initialises it, uniform within 1 / sqrt(in) (kaiming_uniform_ with a = sqrt(5));
    B zero, so that training starts from the model as it is. Seeded by `seed` and name, as
    weights.InitialWeights."""

    def __init__(self, lora: Lora, config: OPTConfig, seed: int):
        shapes = lora.shapes(config)
        super().__init__({name: name for name in shapes})
        self._shapes, self._seed = shapes, seed

    def _read(self, name):
        shape = self._shapes[name]
        if name.endswith("lora_B.weight"):
            return torch.zeros(shape)
        generator = generator_of(name, self._seed)
        bound = 1 / math.sqrt(shape[1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    def shape(self, name):
        return self._shapes[name]


class SavedAdapter(CheckpointWeights):
    """The tensors of an adapter's folder, by our names."""

    def __init__(self, folder: Path):
        file = next((folder / name for name in TENSORS_FILES if (folder / name).is_file()), None)
        if file is None:
            raise UserError(f"{folder} has no {TENSORS_FILES[0]}: it is not an adapter of PEFT's")
        self._open, self._said = {}, []
        Weights.__init__(self, {_own_name(key): (file, key) for key in self._file(file).keys()})


def _own_name(key: str) -> str:
    name = key.removeprefix(_PEFT)
    name = f"model.{name}" if name.startswith("decoder.") else name
    for matrix in (".lora_A.weight", ".lora_B.weight"):
        if name.endswith(matrix):
            return name.removesuffix(matrix) + _PART + matrix[1:]
    return key


def peft_name(name: str) -> str:
    """PEFT's name of an adapter's parameter."""
    return _PEFT + name.replace(_PART, ".")


# ---- PEFT's folder

# field of adapter_config.json -> the values of it that mean what we do. What is not here, or says
# how an adapter was made and not what it is, does not matter.
_UNDERSTOOD = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM"),
    "bias": (None, "none"),
    # By the others the base model is changed as well
    "init_lora_weights": (None, True, False, "gaussian"),
    **dict.fromkeys(
        (
            "use_dora",
            "modules_to_save",
            "rank_pattern",
            "alpha_pattern",
            "layers_to_transform",
            "layer_replication",
            "fan_in_fan_out",
            "lora_bias",
            "trainable_token_indices",
            "target_parameters",
            "use_qalora",
            "alora_invocation_tokens",
            "arrow_config",
        ),
        (None, False, [], {}),
    ),
}


def read_adapter(folder: Path, config: OPTConfig) -> tuple[Lora, SavedAdapter]:
    """What PEFT, or an earlier run, has saved in `folder`, an adapter of a model of `config`.

    Raises UserError for what is not there, cannot be read, or is more than LoRA of the decoder
    layers' matrices.
    """
    file = folder / CONFIG_FILE
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        for field, understood in _UNDERSTOOD.items():
            if raw.get(field) not in understood:
                raise UserError(
                    f"{file}: {field} is {json.dumps(raw[field])[:60]}, which is not supported: "
                    "give an adapter without it"
                )
        r, alpha = raw["r"], raw["lora_alpha"]
        dropout, use_rslora = raw.get("lora_dropout", 0.0), raw.get("use_rslora", False)
        is_right = (
            type(r) is int
            and r >= 1
            and isinstance(alpha, (int, float))
            and math.isfinite(alpha)
            and alpha != 0
            and isinstance(dropout, (int, float))
            and 0 <= dropout <= 1
            and type(use_rslora) is bool
        )
        if not is_right:
            raise ValueError("r, lora_alpha, lora_dropout or use_rslora is no value of theirs")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} cannot be read as an adapter's configuration ({in_a_line(error)}): give a "
            "folder that PEFT, or --output_path of a run with --lora_r, has made"
        ) from error
    saved = SavedAdapter(folder)
    targets = tuple(
        target
        for target, place in TARGETS.items()
        if any(f".{place}{_PART}" in name for name in saved)
    )
    lora = Lora(r, alpha, float(dropout), targets, use_rslora)
    expected = lora.shapes(config)
    for name in sorted({*expected, *saved}):
        if name not in saved:
            raise UserError(
                f"{folder} lacks {peft_name(name)}: an adapter has to be of the same matrices in "
                "every layer, and of this model"
            )
        if name not in expected:
            raise UserError(
                f"{folder} has {name}, which is no adapter of a matrix in this model's layers: "
                "it is of another model, or not supported"
            )
        if saved.shape(name) != expected[name]:
            raise UserError(
                f"{folder}: {peft_name(name)} is {saved.shape(name)}, and in this model "
                f"{expected[name]}: it is of another model"
            )
    return lora, saved


def is_saved_alone(plan: Namespace) -> bool:
    """Whether a run saves an adapter, and not the whole model."""
    return bool(plan.lora_r) and not plan.merge_lora


def peft_config(lora: Lora, plan: Namespace) -> dict:
    """adapter_config.json of adapters beside the model that `plan` names."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": plan.model_name_or_path,
        "revision": plan.model_revision,
        "inference_mode": True,
        "r": lora.r,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.targets),
        "use_rslora": lora.use_rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


# ---- merged


def merged(
    tensors: Iterable[tuple[str, torch.Tensor]], lora: Lora
) -> Iterator[tuple[str, torch.Tensor]]:
    """A model's names and tensors without its adapters, W + scale B A in W's place, added up in
    fp32; of an adapter come W, A and B, in this order, and other tensors may be between them."""
    waiting = {}
    for name, tensor in tensors:
        place, part, matrix = name.partition(_PART)
        if part:
            waiting[place][matrix] = tensor
        elif name.endswith(".weight") and name.split(".")[-2] in lora.targets:
            place = name.removesuffix(".weight")
            waiting[place] = {"weight": tensor}
        else:
            yield name, tensor
        if len(waiting.get(place, ())) == 3:
            found = waiting.pop(place)
            base, a, b = found["weight"], found["lora_A.weight"], found["lora_B.weight"]
            whole = base.float() + lora.scale * (b.float() @ a.float()).to(base.device)
            yield f"{place}.weight", whole.to(base.dtype)
    if waiting:
        raise RuntimeError(f"adapters without their weights, or weights without: {list(waiting)}")


@torch.no_grad()
def add_to(model: nn.Module, folder: Path) -> None:
    """Add a saved adapter to the weights of transformers' model, in place."""
    settings, saved = read_adapter(folder, model.config)
    for name in saved:
        place, _, matrix = name.partition(_PART)
        if matrix == "lora_A.weight":
            a, b = saved[name].float(), saved[f"{place}{_PART}lora_B.weight"].float()
            model.get_submodule(place).weight += settings.scale * (b @ a)
