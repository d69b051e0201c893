"""The OPT model: transformers' modules and names, with a forward that every plugin and pipeline
stage shares.

The forward takes no attention mask. Where rows are padded, it is on the right, and attention is
causal, so no real token ever sees a pad; what the pads compute is kept out of the loss by labels of
-100. So every plugin runs the causal attention kernel. Rows that follow one another without pads
have attention and positions of their own (opt/model/attention.py).
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch._functorch import config as functorch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import OPTConfig
from transformers.modeling_utils import no_init_weights

from opt.model import residual
from opt.model.attention import Attention, PackedRows, locate
from opt.model.halves import WHOLE
from opt.model.layer import DecoderLayer
from opt.model.linear import product_dtype
from opt.model.loss import (
    IGNORE,
    Split,
    fused_linear_cross_entropy,
    vocab_parallel_cross_entropy,
)


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
        self.tie_weights()  # [F40] transformers' own __init__ leaves it out under no_init_weights
        self.stage = Stage(0, config.num_hidden_layers)
        self.tp_group = None  # the processes that the vocabulary is split over, set by OPTPolicy
        self.recompute_every = 0  # see recomputes
        self.fused_loss = False
        self.halves = WHOLE  # how rows that are trained on go through the layers; a plugin says so
        # Called before, between and behind the decoder layers with (the one that has just run or
        # None, the one that runs next or None, the hidden states between them). Backward comes by
        # again, see Tensor.register_hook: behind the one, ahead of the other.
        self.between_layers = None
        # Tokens of the longest packed row, see forward and expect_rows
        self.longest_row = config.max_position_embeddings
        for layer in self.model.decoder.layers:
            layer.__class__ = DecoderLayer
            layer.self_attn.__class__ = Attention

    @property
    def own_layers(self) -> nn.ModuleList:
        """The decoder layers of this process's pipeline stage."""
        return self.model.decoder.layers[self.stage.start : self.stage.end]

    def expect_rows(self, shortest: int, longest: int) -> None:
        """Make ready for rows of `shortest` to `longest` tokens: attention of short ones is faster.

        [C18] PyTorch prefers cuDNN's kernels on Hopper (seen in 2.11), which plan anew for every
        shape: with short rows on an H100, 3 ms a layer of the host's time, where the GPU computes
        for 0.05 ms. They are kept out of batches whose length changes from step to step.
        """
        self.longest_row = longest
        if shortest < longest and torch.cuda.is_available():
            torch.backends.cuda.enable_cudnn_sdp(False)

    def forward(
        self, input_ids=None, labels=None, hidden_states=None, cu_seqlens=None
    ) -> dict[str, torch.Tensor]:
        """One pass over rows padded on the right, or over rows that follow one another.

        Args:
            input_ids: (batch, length), read by the first pipeline stage.
            labels: (batch, length), the same tokens, -100 where there is no loss; shifted here;
                read by the last stage.
            hidden_states: (batch, length, hidden), from the stage before.
            cu_seqlens: (rows + 1,) or (1, rows + 1) int32, if batch is 1 and holds packed rows:
                where each begins, and the length. None of them has more than `longest_row` tokens.

        Returns:
            {"loss": the cross-entropy summed over all target tokens, fp32 scalar}, on the last
            stage; {"hidden_states": ...} on the others. A sum, so that ranks and micro-batches with
            unequal numbers of tokens can be averaged without bias.
        """
        decoder = self.model.decoder
        if self.stage.is_first:
            hidden_states = decoder.embed_tokens(input_ids)
            if decoder.project_in is not None:
                hidden_states = decoder.project_in(hidden_states)
        rows = None
        if cu_seqlens is not None:
            head_dim = self.config.hidden_size // self.config.num_attention_heads
            rows = locate(
                cu_seqlens.view(-1),
                input_ids.shape[1],
                self.longest_row,
                head_dim,
                product_dtype(hidden_states),
            )
        if self.stage.is_first:
            positions = (
                rows.position if rows else torch.arange(input_ids.shape[1], device=input_ids.device)
            )
            hidden_states = hidden_states + decoder.embed_positions(
                None, position_ids=positions.unsqueeze(0)
            )

        # [F22] Gemini's embedding gives a ColoTensor, which no kernel takes for one
        hidden_states = self._run_layers(hidden_states.as_subclass(torch.Tensor), rows)
        if not self.stage.is_last:
            return {"hidden_states": hidden_states}
        if decoder.final_layer_norm is not None:
            hidden_states = decoder.final_layer_norm(hidden_states)
        if decoder.project_out is not None:
            hidden_states = decoder.project_out(hidden_states)
        return {"loss": self.sum_loss(hidden_states, labels)}

    def _run_layers(self, hidden_states: torch.Tensor, rows) -> torch.Tensor:
        """This stage's layers, of hidden states (batch, length, hidden): in halves where that is
        asked for, some computed again in backward, with a hook before, between and behind them."""
        halves = self.halves if self.training and rows is None else WHOLE
        seeds = None
        if self.training:
            seeds = residual.draw_seeds(self.own_layers, halves.most, hidden_states)
        parts = halves.split(hidden_states, seeds)
        before = None
        for number, layer in enumerate(self.own_layers, self.stage.start):
            if self.between_layers:
                # Of halves backward comes by the first one last
                self.between_layers(before, layer, parts[0])
            recompute = self.training and recomputes(number, self.recompute_every)
            run = partial(run_layer, layer, recompute, rows)
            own_seeds = [None] * len(parts) if seeds is None else seeds[number - self.stage.start]
            parts = halves.each(run, list(zip(parts, own_seeds, strict=False)))
            before = layer
        hidden_states = halves.join(parts)
        if self.between_layers:
            self.between_layers(before, None, hidden_states)
        return hidden_states

    def sum_loss(self, hidden_states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The next-token cross-entropy in fp32, summed over the labels that are not -100."""
        targets = labels[:, 1:].flatten()
        hidden_states = hidden_states[:, :-1].flatten(0, 1)
        split = self._split
        if self.fused_loss:
            return fused_linear_cross_entropy(hidden_states, self.lm_head.weight, targets, split)
        logits = self.lm_head(hidden_states)
        if split is None:
            return F.cross_entropy(
                logits.float()[:, : self.config.vocab_size],
                targets,
                ignore_index=IGNORE,
                reduction="sum",
            )
        # The last process's logits come without the columns of padding.
        return vocab_parallel_cross_entropy(logits, targets, split.first, split.group)

    @property
    def _split(self) -> Split | None:
        """The part of the head that this process has, if others have parts too: each as many rows,
        the last ones padding."""
        if self.tp_group is None:
            return None
        rows = self.lm_head.weight.shape[0]
        first = dist.get_rank(self.tp_group) * rows
        return Split(self.tp_group, first, min(rows, self.config.vocab_size - first))


def recomputes(number: int, every: int) -> bool:
    """Whether the layer `number` (from 0) recomputes its activations in backward: every `every`-th
    does, with 0 none."""
    return every > 0 and number % every == 0


def run_layer(
    layer: nn.Module,
    recompute: bool,
    rows: PackedRows | None,
    hidden_states: torch.Tensor,
    seeds: torch.Tensor | None,
) -> torch.Tensor:
    """A decoder layer's output; with `recompute` its activations are computed a second time in
    backward."""

    def run(hidden_states):
        return layer(hidden_states, attention_mask=rows, seeds=seeds)[0]

    return checkpoint(run, hidden_states, use_reentrant=False) if recompute else run(hidden_states)


def meta_model(config: OPTConfig) -> OPTForCausalLM:
    """The model without memory for its weights: names, shapes, parameter counts."""
    with torch.device("meta"), no_init_weights():
        return OPTForCausalLM(config)


def compile_layers(
    model: OPTForCausalLM,
    saves_memory: bool,
    budget: float | None = None,
    products_wait: bool = False,
) -> None:
    """Compile the decoder layers of this process, in place; they share one compilation.

    `budget`: the share of what backward needs that is kept, the rest is computed again. None: with
    `saves_memory` backward recomputes some of what is cheap to recompute instead of keeping
    it. At 0.9 of the memory that would be kept otherwise, OPT-1.3b needs 3 GiB less at 16 x 1024
    tokens and takes as long (H100, bf16 weights); at 0.8 it needs 6 GiB less and takes 3 % longer.
    Under autocast, with fp32 weights, 0.9 is 8 GiB less and 5 % longer, 0.98 3 GiB less and 2 %
    longer.

    `products_wait`: backward is to leave alone what it has handed to linear.put_off. Nothing is
    written into a tensor that it has had its last use of; its memory is let go of all the same.
    """
    weight = next(model.parameters())
    if budget is None:
        budget = 1.0
        if saves_memory:
            budget = 0.98 if weight.dtype == torch.float32 else 0.9
            if residual.are_fused(model.own_layers, weight.device, weight.dtype):
                trains_all = all(p.requires_grad for p in model.own_layers.parameters())
                budget = residual.budget(model.config.do_layer_norm_before, trains_all)
    functorch.activation_memory_budget = budget
    options = {"allow_buffer_reuse": False, "inplace_buffers": False} if products_wait else None
    for layer in model.own_layers:
        layer.compile(options=options)
