"""The OPT model: transformers' modules and names, with a forward that every plugin and pipeline stage shares.

The forward takes no attention mask. Where rows are padded, it is on the right, and attention is causal, so no real token ever sees
a pad; what the pads compute is kept out of the loss by labels of -100. So every plugin runs the causal attention kernel. Rows that
follow one another without pads have attention and positions of their own (opt/attention.py).
"""

import copy
import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from colossalai.lazy import LazyInitContext
from colossalai.shardformer.policies.opt import OPTForCausalLMPolicy
from torch import nn
from torch._functorch import config as functorch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import OPTConfig
from transformers.activations import ACT2FN
from transformers.modeling_utils import no_init_weights
from transformers.models.opt.modeling_opt import OPTAttention

from args import UserError
from opt.colossal import light_import as light_imports  # noqa: F401  before colossalai
from opt.colossal.processes import product_dtype
from opt.model.attention import Attention, PackedRows, locate, share_input
from opt.model.loss import IGNORE, fused_linear_cross_entropy, vocab_parallel_cross_entropy

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Stage:
    """The layers [start, end) that this process holds, and whether it holds the model's ends."""

    start: int
    end: int
    is_first: bool = True
    is_last: bool = True


class OPTForCausalLM(transformers.OPTForCausalLM):
    """transformers' OPTForCausalLM with a forward for training: see forward()."""

    def __init__(self, config: OPTConfig):
        super().__init__(config)
        self.tie_weights()  # transformers' own __init__ leaves it out under no_init_weights
        self.stage = Stage(0, config.num_hidden_layers)
        self.tp_group = None  # the processes that the vocabulary is split over, set by OPTPolicy
        self.recompute_activations = False
        self.fused_loss = False
        # Called before, between and behind the decoder layers with (the one that has just run or None, the one that runs next or None,
        # the hidden states between them). Backward comes by again, see Tensor.register_hook: behind the one, ahead of the other.
        self.between_layers = None
        self.longest_row = config.max_position_embeddings  # of packed rows, see forward; less makes attention faster
        for layer in self.model.decoder.layers:
            layer.self_attn.__class__ = Attention

    @property
    def own_layers(self) -> nn.ModuleList:
        """The decoder layers of this process's pipeline stage."""
        return self.model.decoder.layers[self.stage.start : self.stage.end]

    def forward(self, input_ids=None, labels=None, hidden_states=None, cu_seqlens=None) -> dict[str, torch.Tensor]:
        """One pass over rows padded on the right, or over rows that follow one another.

        Args:
            input_ids: (batch, length), read by the first pipeline stage.
            labels: (batch, length), the same tokens, -100 where there is no loss; shifted here; read by the last stage.
            hidden_states: (batch, length, hidden), from the stage before.
            cu_seqlens: (rows + 1,) int32, if batch is 1 and holds packed rows: where each begins, and the length. None of them has
                more than `longest_row` tokens. Not with pipeline stages.

        Returns:
            {"loss": the cross-entropy summed over all target tokens, fp32 scalar}, on the last stage;
            {"hidden_states": ...} on the others. A sum, so that ranks and micro-batches with unequal numbers of tokens
            can be averaged without bias.
        """
        decoder = self.model.decoder
        rows = None
        if cu_seqlens is not None:
            head_dim = self.config.hidden_size // self.config.num_attention_heads
            rows = locate(cu_seqlens, input_ids.shape[1], self.longest_row, head_dim, product_dtype(decoder.embed_tokens.weight))
        if self.stage.is_first:
            hidden_states = decoder.embed_tokens(input_ids)
            if decoder.project_in is not None:
                hidden_states = decoder.project_in(hidden_states)
            positions = rows.position if rows else torch.arange(input_ids.shape[1], device=input_ids.device)
            hidden_states = hidden_states + decoder.embed_positions(None, position_ids=positions.unsqueeze(0))

        hidden_states = hidden_states.as_subclass(torch.Tensor)  # Gemini's embedding gives a ColoTensor, which no kernel takes for one
        before = None
        for layer in self.own_layers:
            if self.between_layers:
                self.between_layers(before, layer, hidden_states)
            hidden_states = run_layer(layer, self.recompute_activations and self.training, hidden_states, rows)
            before = layer
        if self.between_layers:
            self.between_layers(before, None, hidden_states)

        if not self.stage.is_last:
            return {"hidden_states": hidden_states}
        if decoder.final_layer_norm is not None:
            hidden_states = decoder.final_layer_norm(hidden_states)
        if decoder.project_out is not None:
            hidden_states = decoder.project_out(hidden_states)
        return {"loss": self.sum_loss(hidden_states, labels)}

    def sum_loss(self, hidden_states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The next-token cross-entropy in fp32, summed over the labels that are not -100."""
        targets = labels[:, 1:].flatten()
        hidden_states = hidden_states[:, :-1].flatten(0, 1)
        if self.fused_loss:
            return fused_linear_cross_entropy(hidden_states, self.lm_head.weight, targets)
        logits = self.lm_head(hidden_states)
        if self.tp_group is None:
            return F.cross_entropy(logits.float()[:, : self.config.vocab_size], targets, ignore_index=IGNORE, reduction="sum")
        # Each rank has as many rows of the head; the last one's logits come without the columns of padding.
        first = dist.get_rank(self.tp_group) * self.lm_head.weight.shape[0]
        return vocab_parallel_cross_entropy(logits, targets, first, self.tp_group)


def run_layer(layer: nn.Module, recompute: bool, hidden_states: torch.Tensor, rows: PackedRows | None) -> torch.Tensor:
    """A decoder layer's output; with `recompute` its activations are computed a second time in backward."""

    def run(hidden_states):
        return layer(hidden_states, attention_mask=rows)[0]

    return checkpoint(run, hidden_states, use_reentrant=False) if recompute else run(hidden_states)


class OPTPolicy(OPTForCausalLMPolicy):
    """How HybridParallelPlugin cuts our model: ColossalAI's policy for OPT, with our attention and forward.

    ColossalAI 0.5.0's policy raises KeyError for "sdpa", its ColoAttention has no kernel on a CPU, and its pipeline forward
    builds a 4-D mask, calls torch.cuda and reduces the loss in the model's dtype.
    """

    def module_policy(self):
        config = self.model.config
        config._attn_implementation = "eager"
        try:
            policy = super().module_policy()
        finally:
            config._attn_implementation = "sdpa"
        for base, ours in ((OPTAttention, Attention), (transformers.OPTForCausalLM, OPTForCausalLM)):
            if base in policy:
                policy[ours] = policy.pop(base)
                policy[ours].method_replacement = None
        return policy

    def set_pipeline_forward(self, model_cls, new_forward, policy):
        """Our forward knows stages by itself: see postprocess."""

    def postprocess(self):
        model = super().postprocess()
        if self.shard_config.enable_tensor_parallelism:
            model.tp_group = self.shard_config.tensor_parallel_process_group
        stages = self.pipeline_stage_manager
        if stages is not None:
            start, end = stages.get_stage_index(stages.distribute_layers(model.config.num_hidden_layers))
            model.stage = Stage(start, end, stages.is_first_stage(), stages.is_last_stage())
        if model.tp_group is not None:
            for layer in model.own_layers:
                share_input(layer.self_attn, model.tp_group)
        return model


def expect_varying_lengths() -> None:
    """Keep cuDNN out of attention, for batches whose length changes from step to step.

    PyTorch prefers cuDNN's kernels on Hopper (seen in 2.11), which plan anew for every shape: with short rows on an H100, 3 ms
    a layer of the host's time, where the GPU computes for 0.05 ms.
    """
    if torch.cuda.is_available():
        torch.backends.cuda.enable_cudnn_sdp(False)


def load_config(directory: Path) -> OPTConfig:
    """The configuration in a model's directory. Raises UserError where there is none, it is not OPT's, or makes no model."""
    file = directory / "config.json"
    if not file.is_file():
        raise UserError(f"{directory} has no config.json: give a model's directory in Hugging Face layout")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("it is not a JSON object")
        if raw.get("model_type") != "opt":
            raise UserError(
                f"{file} describes a model of type '{raw.get('model_type')!s:.40}', not OPT: give an OPT model such as facebook/opt-350m"
            )
        config = OPTConfig.from_dict(raw)
    except UserError:
        raise
    except Exception as error:  # of a value that it does not expect OPTConfig says so by almost any exception
        reason = " ".join(str(error).split())
        raise UserError(f"{file} cannot be read ({type(error).__name__}: {reason:.200}): download or copy it again") from error
    _check_values(config, file)
    config._attn_implementation = "sdpa"
    return config


# field of config.json -> its type, the least and the most that it may be. OPT-175b has 96 layers of 12,288.
_SIZES = dict.fromkeys(("vocab_size", "hidden_size", "ffn_dim", "word_embed_proj_dim", "num_attention_heads"), (int, 1, 2**24))
_VALUES = _SIZES | {
    "max_position_embeddings": (int, 2, 2**24),
    "num_hidden_layers": (int, 1, 4096),
    **dict.fromkeys(("dropout", "attention_dropout"), ((int, float), 0, 1)),
    "init_std": ((int, float), 0, 1000),
    **dict.fromkeys(("do_layer_norm_before", "_remove_final_layer_norm", "enable_bias", "layer_norm_elementwise_affine"), (bool, 0, 1)),
}


def _check_values(config: OPTConfig, file: Path) -> None:
    for name, (kind, low, high) in _VALUES.items():
        value = getattr(config, name)
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool) or not low <= value <= high:
            wanted = "true or false" if kind is bool else f"{'a whole' if kind is int else 'a'} number from {low} to {high}"
            raise UserError(f"{file}: {name} is {value!r:.60}, and must be {wanted}: correct it")
    pad = config.pad_token_id
    if type(pad) is not int or not 0 <= pad < config.vocab_size:
        raise UserError(f"{file}: pad_token_id is {pad!r:.60}, and must be a token of the vocabulary's {config.vocab_size}: OPT's is 1")
    if not isinstance(config.activation_function, str) or config.activation_function not in ACT2FN:
        raise UserError(
            f"{file}: activation_function is {config.activation_function!r:.60}, which transformers does not have: OPT's is relu"
        )
    if config.tie_word_embeddings is not True:
        raise UserError(
            f"{file}: tie_word_embeddings is {config.tie_word_embeddings!r:.60}: an output projection (lm_head) of its own, beside the "
            "embedding, is not supported"
        )
    if config.layerdrop:
        raise UserError(f"{file}: layerdrop is {config.layerdrop!r:.60}, and not supported: set it to 0")
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"the model's hidden_size {config.hidden_size} is not divisible by its {config.num_attention_heads} attention heads: correct its config.json"
        )


def with_dropout(config: OPTConfig, dropout: float | None) -> OPTConfig:
    """A copy of `config` with another dropout probability, unless that is None; with 0, attention's dropout is off as well."""
    config = copy.deepcopy(config)
    if dropout is not None:
        config.dropout = dropout
        if dropout == 0:
            config.attention_dropout = 0.0
    return config


def meta_model(config: OPTConfig) -> OPTForCausalLM:
    """The model without memory for its weights: names, shapes, parameter counts."""
    with torch.device("meta"), no_init_weights():
        return OPTForCausalLM(config)


def build_model(
    config: OPTConfig,
    plugin: str,
    dtype: torch.dtype,
    device: torch.device,
    grad_checkpoint: bool = False,
    fused_loss: bool = False,
) -> OPTForCausalLM:
    """A model ready for Booster.boost, its weights still to be placed (weights.place).

    Under gemini and hybrid_parallel the parameters get memory only when the plugin has cut them to this process's share;
    the others need the whole model on each device, which they get at once, in `dtype`.
    """
    lazy = plugin in ("gemini", "hybrid_parallel")
    with LazyInitContext(default_device=device) if lazy else nullcontext(), no_init_weights():
        if lazy:
            model = OPTForCausalLM(config)
        else:
            with torch.device(device):
                model = OPTForCausalLM(config).to(dtype)
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    model.recompute_activations = grad_checkpoint
    model.fused_loss = fused_loss
    return model


def compile_layers(model: OPTForCausalLM, saves_memory: bool) -> None:
    """Compile the decoder layers of this process, in place; they share one compilation.

    With `saves_memory` backward recomputes some of what is cheap to recompute instead of keeping it. At 0.9 of the memory that
    would be kept otherwise, OPT-1.3b needs 3 GiB less at 16 x 1024 tokens and takes as long (H100, bf16 weights); at 0.8 it needs
    6 GiB less and takes 3 % longer. Under autocast, with fp32 weights, 0.9 is 8 GiB less and 5 % longer, 0.98 3 GiB less and 2 %
    longer.
    """
    is_autocast = next(model.parameters()).dtype == torch.float32
    functorch.activation_memory_budget = (0.98 if is_autocast else 0.9) if saves_memory else 1.0
    for layer in model.own_layers:
        layer.compile()
