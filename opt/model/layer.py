"""OPT's decoder layer, with dropout, residual and norm in one pass where there are kernels for
it."""

import torch
from transformers.models.opt.modeling_opt import OPTDecoderLayer

from opt.model import residual
from opt.model.attention import PackedRows


class DecoderLayer(OPTDecoderLayer):
    """transformers' layer; its parameters and their names are the same."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: PackedRows | None = None,
        seeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor]:
        """hidden_states (batch, length, width) -> (the same shape,).

        `attention_mask`: see Attention. `seeds`: (2,), of the two dropouts, see
        residual.draw_seeds; None: transformers' own forward.
        """
        if seeds is None:
            return super().forward(hidden_states, attention_mask=attention_mask)
        is_before, x = self.do_layer_norm_before, hidden_states
        if is_before:
            x = self.self_attn_layer_norm(x)
        x, *_ = self.self_attn(hidden_states=x, attention_mask=attention_mask)
        # Matrices from here on, as in transformers' own: the compiler then keeps what comes out of
        # ReLU alone, and no mask of it
        rest, x = residual.add_norm(
            x.flatten(0, 1),
            hidden_states.flatten(0, 1),
            self.final_layer_norm if is_before else self.self_attn_layer_norm,
            seeds,
            0,
            self.dropout,
            goes_on="total" if is_before else "normed",
        )
        x = self.fc2(self.activation_fn(self.fc1(x)))
        if is_before:
            x = residual.add(x, rest, seeds, 1, self.dropout)
        else:
            norm = self.final_layer_norm
            (x,) = residual.add_norm(x, rest, norm, seeds, 1, self.dropout, goes_on="")
        return (x.view_as(hidden_states),)
