"""The model as each plugin wants it before boost."""

from contextlib import nullcontext

import torch
from colossalai.lazy import LazyInitContext
from transformers import OPTConfig
from transformers.modeling_utils import no_init_weights

from opt.model.opt import OPTForCausalLM


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
