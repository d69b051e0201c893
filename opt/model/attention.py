"""OPT's causal attention, for rows of a rectangle and for rows that follow one another without
pads."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.opt.modeling_opt import OPTSdpaAttention

from opt.model import linear
from opt.model.kernel_probe import has_bf16, has_short_attention, padded


class PackedRows(NamedTuple):
    """Where rows lie that follow one another."""

    # (rows + 1,) int32: where each row begins, and the number of tokens of all
    cu_seqlens: torch.Tensor
    longest: int  # no row has more tokens than this
    position: torch.Tensor  # (tokens,) a token's place in its row
    cell: torch.Tensor  # (tokens,) its place among the cells of a rectangle, rows x longest
    # (rows x longest,) the token in each cell of that rectangle, or the number of tokens for none
    token: torch.Tensor
    has_flash: bool  # whether the GPU is one that FlashAttention runs on
    # Whether kernels.py has one there for rows of this length and heads of this width
    has_kernel: bool


def locate(
    cu_seqlens: torch.Tensor, tokens: int, longest: int, head_dim: int, dtype: torch.dtype
) -> PackedRows:
    """The rows between `cu_seqlens`, without asking the device for a value. `head_dim`, `dtype`: of
    the queries that will attend in them."""
    every = torch.arange(tokens, device=cu_seqlens.device)
    row = torch.bucketize(every, cu_seqlens[1:].long(), right=True)
    position = every - cu_seqlens[row]
    cell = row * longest + position
    token = every.new_full(((len(cu_seqlens) - 1) * longest,), tokens).index_copy(0, cell, every)
    device = cu_seqlens.device
    has_flash = has_bf16(device)  # from the same generation of GPUs on
    return PackedRows(
        cu_seqlens,
        longest,
        position,
        cell,
        token,
        has_flash,
        has_short_attention(device, dtype, head_dim, longest),
    )


class Attention(OPTSdpaAttention):
    """transformers' attention, which also takes packed rows; its parameters and their names are the
    same."""

    # What q, k and v are where heads are split over processes: of [q_proj, k_proj, v_proj] and
    # their input (..., in), (..., out) each
    enter: Callable[[list[nn.Module], torch.Tensor], list[torch.Tensor]] | None = None

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: PackedRows | None = None, **kwargs
    ):
        """hidden_states (batch, length, width) -> (the same shape, None, None).

        attention_mask: the name by which transformers' decoder layer hands something on. None: each
        row of the batch is a text. Otherwise the batch is one row, and the texts follow one another
        in it.
        """
        maps, dropout = [self.q_proj, self.k_proj, self.v_proj], self.dropout * self.training
        if attention_mask is None:
            q, k, v = (
                out.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                for out in (self.enter or linear.each)(maps, hidden_states)
            )
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
            return self.out_proj(out.transpose(1, 2).flatten(2)), None, None
        if self.enter is None:
            qkv = linear.side_by_side(maps, hidden_states.squeeze(0))
        else:
            qkv = torch.cat(self.enter(maps, hidden_states.squeeze(0)), dim=-1)
        out = attend(qkv.unflatten(-1, (3, -1, self.head_dim)), attention_mask, dropout)
        return self.out_proj(out.flatten(1).unsqueeze(0)), None, None


def attend(qkv: torch.Tensor, rows: PackedRows, dropout: float) -> torch.Tensor:
    """Causal attention within each row: queries, keys and values (tokens, 3, heads, head_dim) ->
    (tokens, heads, head_dim)."""
    head_dim = qkv.shape[-1]
    if rows.has_flash and qkv.dtype in (torch.float16, torch.bfloat16):
        if rows.has_kernel and dropout == 0:
            from opt.model.kernels import ShortAttention

            return ShortAttention.apply(qkv, rows.cu_seqlens, padded(rows.longest))
        if head_dim % 8 == 0 and head_dim <= 256:  # what FlashAttention takes
            ends = (rows.cu_seqlens, rows.cu_seqlens, rows.longest, rows.longest)
            return torch.ops.aten._flash_attention_forward(
                *qkv.unbind(1), *ends, dropout, True, False
            )[0]
    rectangle = len(rows.cu_seqlens) - 1, rows.longest
    q, k, v = _Take.apply(qkv, rows.token, rows.cell).unflatten(0, rectangle).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    return _Take.apply(out.transpose(1, 2).flatten(0, 1), rows.cell, rows.token)


class _Take(torch.autograd.Function):
    """x[index], zeros where an index is past the end; `inverse` takes the gradients back, without
    adding any up."""

    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.save_for_backward(index, inverse)
        return _take(x, index)

    @staticmethod
    def backward(ctx, grad):
        index, inverse = ctx.saved_tensors
        return _take(grad, inverse), None, None


def _take(x, index):
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])]).index_select(0, index)
