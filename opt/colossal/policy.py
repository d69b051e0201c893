"""How HybridParallelPlugin cuts our model."""

import torch
import torch.distributed as dist
import transformers
from colossalai.shardformer.layer import Linear1D_Col
from colossalai.shardformer.policies.opt import OPTForCausalLMPolicy
from torch.nn import functional as F
from transformers.models.opt.modeling_opt import OPTAttention

from opt.model.attention import Attention
from opt.model.opt import OPTForCausalLM, Stage


class _ColumnOfSharedInput(Linear1D_Col):
    """A split linear map that leaves its input's gradient as it is: a part, to be added up over the processes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


def share_input(attention: Attention, tp_group: dist.ProcessGroup) -> None:
    """Add up the gradient of the input of q, k and v over `tp_group` once, in place. ColossalAI 0.5.0 does it for each of the three:
    six all-reduces a layer instead of four, which take half of a step of OPT-1.3b (tp 2, two H200)."""
    attention.tp_group = tp_group
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection.__class__ = _ColumnOfSharedInput


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
