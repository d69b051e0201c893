"""--plugin hybrid_parallel: tensor and pipeline parallelism, with or without ZeRO over the
data-parallel ranks."""

import os
from contextlib import nullcontext
from functools import partial
from unittest.mock import patch

import torch
import torch.distributed as dist
import transformers
from colossalai.booster.plugin import HybridParallelPlugin, hybrid_parallel_plugin
from colossalai.cluster import ProcessGroupMesh
from colossalai.shardformer.layer import Linear1D_Col, Linear1D_Row
from colossalai.shardformer.layer._operation import reduce_backward, reduce_forward
from colossalai.shardformer.policies.base_policy import SubModuleReplacementDescription
from colossalai.shardformer.policies.opt import OPTForCausalLMPolicy
from colossalai.tensor.d_tensor.api import is_distributed_tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.nn import functional as F
from transformers.models.opt.modeling_opt import OPTAttention, OPTDecoderLayer

from opt.colossal.copies import Copies
from opt.colossal.pipeline import Schedule, layers_per_stage
from opt.colossal.plain import Plain
from opt.colossal.plugin import Plugin
from opt.colossal.processes import Spread
from opt.colossal.reduction import LayerwiseDDP
from opt.colossal.sharded import Sharded
from opt.model import operations
from opt.model.attention import Attention
from opt.model.config import DTYPES
from opt.model.halves import Halves
from opt.model.layer import DecoderLayer
from opt.model.linear import Linear, each, plain, sum_over_tokens
from opt.model.opt import OPTForCausalLM, Stage


class HybridPlugin(Plugin, HybridParallelPlugin):
    """ColossalAI's, with our policy, attention and forward."""

    is_lazy = True

    def __init__(self, plan, device, num_parameters):
        if self.halves_from(plan) is not None:
            # [C36] For the groups that are made from here on
            os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
        super().__init__(
            tp_size=plan.tp_size,
            pp_size=plan.pp_size,
            precision=plan.precision,
            zero_stage=plan.zero_stage,
            num_microbatches=plan.num_microbatches,
            max_norm=plan.max_norm,
            overlap_communication=device.type == "cuda",
            custom_policy=OPTPolicy(),
            # The vocabulary is padded to a multiple of this times tp_size
            make_vocab_size_divisible_by=1,
        )
        stages = self.stage_manager
        spread = Spread(
            dp_rank=dist.get_rank(self.dp_group),
            dp_size=dist.get_world_size(self.dp_group),
            tp_rank=dist.get_rank(self.tp_group),
            tp_size=plan.tp_size,
            tp_group=self.tp_group,
            pp_rank=int(stages.stage) if stages else 0,
            pp_size=plan.pp_size,
            is_last_stage=stages is None or stages.is_last_stage(),
        )
        self._begin(plan, device, spread)
        if stages:
            self.scheduler = Schedule(stages, plan.num_microbatches)
        # A recorded batch adds up its own part of the tied embedding's gradient.
        self.can_defer_sync = plan.zero_stage < 2 and not (plan.cuda_graph and stages)
        self._ddp: LayerwiseDDP | None = None
        # By weight, where its gradient is added up over micro-batches, if their products do it
        self.totals: dict[torch.Tensor, torch.Tensor] = {}
        # For the collectives of fc1 and fc2
        self._mlp_group = self.tp_group

    def __del__(self):
        """[F57] ColossalAI 0.5.0's destroys its process groups, whenever the garbage collector
        comes to it: CUDA graphs that have them may be there, see F37. processes.stop() does it."""

    # ---- before there are processes

    @staticmethod
    def describe(plan, dp_size):
        """The sizes."""
        return f"tp {plan.tp_size} x pp {plan.pp_size} x dp {dp_size}, ZeRO stage {plan.zero_stage}"

    @staticmethod
    def state_bytes(plan, parameters, dp_size):
        """This stage's and rank's part of weights, gradients and Adam's state, which ZeRO
        spreads."""
        width, adam = (4, 8) if plan.precision == "fp32" else (2, 12)
        gradients = width / (dp_size if plan.zero_stage == 2 else 1)
        own = parameters / (plan.tp_size * plan.pp_size)
        adam /= dp_size if plan.zero_stage > 0 else 1
        return own * width, own * gradients, own * adam

    @staticmethod
    def frozen_bytes(plan, parameters, dp_size):
        """This stage's and rank's part."""
        return Plugin.frozen_bytes(plan, parameters, dp_size) / (plan.tp_size * plan.pp_size)

    @staticmethod
    def waiting_bytes(plan):
        """Of stages that put off products; of maps that are cut by columns none are."""
        if not _adds_up_in_products(plan):
            return 0
        # Inputs and gradients of all six maps; of those that are cut by rows
        return 2 * (7 + 9 if plan.tp_size == 1 else 5 / plan.tp_size + 2)

    @staticmethod
    def halves_from(plan) -> int | None:
        """From how many tokens on a batch goes through the layers in halves, see halves.Halves;
        None: never. With twice as many kernels, only where they are recorded."""
        splits = (
            plan.tp_size > 1
            and plan.pp_size == 1
            and plan.cuda_graph
            and plan.compile
            and not plan.lora_r
        )
        return 16_384 if splits else None

    # ---- hold

    def new_model(self, config):
        """See Plugin. On GPUs stages are as many layers as make them as fast as one another."""
        if self.stage_manager and self.device.type == "cuda":
            self.stage_manager.num_layers_per_stage = layers_per_stage(config, self.plan.pp_size)
        return super().new_model(config)

    # ---- plugin, travel, form

    def configure(self, model, optimizer=None, criterion=None, dataloader=None, lr_scheduler=None):
        """Booster.boost calls this."""

        def average(module, process_group=None, **_):
            """[C14] In DistributedDataParallel's place, where there is something to average."""
            if self.spread.dp_size > 1:
                self._ddp = LayerwiseDDP(module, process_group)
            return module

        with patch.object(hybrid_parallel_plugin, "DDP", average):
            model, optimizer, *rest = super().configure(
                model, optimizer, criterion, dataloader, lr_scheduler
            )
        model.use_ddp = False
        if self.plan.zero_stage > 0:
            self.form = Sharded(
                model, optimizer, self.spread.dp_size, recorded=self.plan.cuda_graph
            )
        else:
            self.form = (Plain if self.plan.precision == "fp32" else Copies)(model, optimizer)
        if self.knows_grad_norm:
            optimizer.optim.find_norm = optimizer.get_grad_norm
        inner = model.unwrap()
        if self.spread.pp_size > 1:
            self.scheduler.width = inner.config.hidden_size
            self.scheduler.dtype = DTYPES[self.plan.precision]
            if self.plan.zero_stage == 0:
                self.scheduler.vectors = [
                    p for p in inner.parameters() if p.requires_grad and p.ndim == 1
                ]
            model.sync_shared_params = partial(_add_up_tied, model)
        if inner.tp_group is not None:
            least = self.halves_from(self.plan)
            if least is not None:
                # Of wider layers fewer tokens are as much work
                inner.halves = Halves(min(least, 2**25 // inner.config.hidden_size))
                # A group's collectives follow one another in the order of their launch, a layer of
                # one half and then of the other: in a single group the second half's behind its
                # attention would wait for the first half's behind fc2
                mesh = ProcessGroupMesh(*self.pg_mesh.shape)
                self._mlp_group = mesh.create_group_along_axis(self.tp_axis)
            self._mlp = {m for layer in inner.own_layers for m in (layer.fc1, layer.fc2)}
            self._share_input(inner)
            if self.adapters:
                self._add_up_summands(inner, optimizer)
        self._finish_layers(inner, self._cut)
        if self.adds_up_in_products:
            self._add_up_in_products(inner)
        return model, optimizer, *rest

    @property
    def adds_up_in_products(self) -> bool:
        """Whether a micro-batch adds its weights' gradients to those before within the products. In
        compiled layers: there products are the plain ones."""
        return self.device.type == "cuda" and _adds_up_in_products(self.plan)

    @property
    def products_wait(self) -> bool:
        """Whether this stage's schedule puts off products: of the first no other waits for
        gradients."""
        return self.adds_up_in_products and self.spread.pp_rank > 0

    def _add_up_in_products(self, model: OPTForCausalLM) -> None:
        """[C27] Left to autograd, adding them up takes a twelfth of the work of a stage of OPT-1.3b
        (micro-batches of 2 rows of 1,024 tokens, two H100)."""
        for part in model.own_layers.modules():
            if isinstance(part, Linear) and part.product is plain:
                self.totals[part.weight] = part.total = torch.zeros_like(part.weight)
        self.scheduler.totals = list(self.totals.values())
        self.scheduler.lag = self.spread.pp_rank

    def _share_input(self, model: OPTForCausalLM) -> None:
        """Add up the gradient of the input of q, k and v over the tensor-parallel ranks once.
        [C13] ColossalAI 0.5.0 does it for each of the three: six all-reduces a layer instead of
        four, which take half of a step of OPT-1.3b (tp 2, two H200)."""
        enter = (
            partial(_each, group=self.tp_group)
            if self.adapters
            else partial(_columns, group=self.tp_group.group_name)
        )
        for layer in model.own_layers:
            layer.self_attn.enter = enter
        self._inputs_shared = {
            m
            for layer in model.own_layers
            for m in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        }

    def _add_up_summands(self, model: OPTForCausalLM, optimizer) -> None:
        """Of an adapter one matrix is cut, as its map is: B by rows or A by columns. The other one
        is the same on all tensor-parallel ranks, and each computes a summand of its gradient, of
        r numbers for one of the map's width. Added up once a step, or, for ZeRO, which takes each
        gradient at once, as soon as backward has it."""
        whole = [
            parameter
            for layer in model.own_layers
            for parameter in layer.adapters.parameters()
            if not is_distributed_tensor(parameter)
        ]
        # What stays with the optimizer holds no plugin: ColossalAI's takes its process groups with
        # it when it goes
        group = self.tp_group

        def add_up(grad):
            grad = grad.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(grad, group=group)
            return grad

        if self.plan.zero_stage > 0:
            for parameter in whole:
                parameter.register_hook(add_up)
            return
        step = optimizer.step

        def add_up_and_step(*args, **kwargs):
            grads = [parameter.grad for parameter in whole if parameter.grad is not None]
            if grads:
                flat = torch.cat([grad.flatten() for grad in grads])
                dist.all_reduce(flat, group=group)
                summed = flat.split([grad.numel() for grad in grads])
                summed = [s.view_as(grad) for s, grad in zip(summed, grads, strict=True)]
                torch._foreach_copy_(grads, summed)
            return step(*args, **kwargs)

        optimizer.step = add_up_and_step

    def _cut(self, module) -> dict | None:
        """What linear.Linear is to do with a map that the policy has cut."""
        if not isinstance(module, Linear1D_Row | Linear1D_Col):
            return None
        group = self._mlp_group if module in self._mlp else self.tp_group
        if isinstance(module, Linear1D_Row):
            return {"leave": partial(_add_up, group=group)}
        if not self.adapters:
            return {"product": partial(_column, group=group.group_name)}
        # With the adapter's; and there is no weight's gradient to go beside
        if module in self._inputs_shared:
            return {}
        return {"enter": partial(_add_up_gradient, group=group)}

    def accumulate(self, model, optimizer, is_last_batch):
        """See Plugin."""
        if self._ddp is not None and not is_last_batch:
            return self._ddp.no_sync()
        return super().accumulate(model, optimizer, is_last_batch)

    def execute_pipeline(
        self, data_iter, model, criterion, optimizer=None, return_loss=True, return_outputs=False
    ):
        """See ColossalAI's. [F30] In 0.5.0 it reduces the tied weights' gradients even where there
        are none, but for no_sync."""
        if optimizer is not None and self.totals:
            # Those of a step's first batch
            new = [weight for weight in self.totals if weight.grad is None]
            if new:
                torch._foreach_zero_([self.totals[weight] for weight in new])
            for weight in new:
                weight.grad = self.totals[weight]
        with model.no_sync() if optimizer is None else nullcontext():
            return super().execute_pipeline(
                data_iter, model, criterion, optimizer, return_loss, return_outputs
            )


def _adds_up_in_products(plan) -> bool:
    """Of a run on GPUs, see HybridPlugin.adds_up_in_products."""
    return (
        plan.pp_size > 1
        and plan.compile
        and plan.precision == "bf16"
        and plan.zero_stage == 0
        and not (plan.fp8 or plan.lora_r)
    )


def _add_up_tied(model) -> None:
    """The gradient of the tied embedding, over the first stage and the last: HybridParallelModule's
    sync_shared_params. [C26] In ColossalAI 0.5.0 the host waits for all processes behind it."""
    for holders, group in zip(model.shared_params, model.shared_param_process_groups, strict=True):
        if model.stage_manager.stage in holders:
            dist.all_reduce(holders[model.stage_manager.stage].grad, group=group)


def _columns(maps, x, group: str) -> list[torch.Tensor]:
    """What maps that are cut by columns make of x (..., in)."""
    parts = [m.weight for m in maps] + [m.bias for m in maps]
    return [out.view(*x.shape[:-1], -1) for out in _Columns.apply(x.flatten(0, -2), group, *parts)]


def _column(x, weight, bias, group: str) -> torch.Tensor:
    """_columns of one map, as linear.Linear calls its product."""
    return _Columns.apply(x.flatten(0, -2), group, weight, bias)[0].view(*x.shape[:-1], -1)


def _each(maps, x, group) -> list[torch.Tensor]:
    """_columns of maps that are more than products."""
    return each(maps, _add_up_gradient(x, group))


class _Columns(torch.autograd.Function):
    """Products of one input, whose gradient is added up over the tensor-parallel ranks beside the
    weights' products."""

    @staticmethod
    def forward(ctx, x, group, *parts):
        weights, biases = parts[: len(parts) // 2], parts[len(parts) // 2 :]
        ctx.save_for_backward(x, *weights)
        ctx.group = group
        return tuple(F.linear(x, *map_) for map_ in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx, *grads):
        x, *weights = ctx.saved_tensors
        grads = [grad.contiguous() for grad in grads]
        of_x, *of_weights = torch.ops.opt.columns_backward(grads, x, weights, ctx.group)
        # Galactica's maps have no bias
        has_bias = ctx.needs_input_grad[-len(grads) :]
        of_biases = [
            sum_over_tokens(g) if has else None for g, has in zip(grads, has_bias, strict=True)
        ]
        return of_x, None, *of_weights, *of_biases


def _columns_backward(
    grads: list[torch.Tensor], x: torch.Tensor, weights: list[torch.Tensor], group: str
) -> list[torch.Tensor]:
    """The gradients of x, all processes', and of the weights."""
    of_x = grads[0] @ weights[0]
    for grad, weight in zip(grads[1:], weights[1:], strict=True):
        of_x.addmm_(grad, weight)
    work = dist.all_reduce(of_x, group=_resolve_process_group(group), async_op=True)
    of_weights = [grad.t() @ x for grad in grads]
    work.wait()
    return [of_x, *of_weights]


# An operation of its own, or the compiler would cut the layer at the exchange, and choose what goes
# beside it
operations.define(
    "columns_backward(Tensor[] grads, Tensor x, Tensor[] weights, str group) -> Tensor[]",
    _columns_backward,
    lambda grads, x, weights, group: [torch.empty_like(x), *map(torch.empty_like, weights)],
    cost=lambda grads, x, weights, group: sum(4 * x[0] * out * inner for out, inner in weights),
)


def _add_up(x, group):
    """Over the tensor-parallel ranks, forward."""
    return reduce_forward(x, group)


def _add_up_gradient(x, group):
    """Over the tensor-parallel ranks, backward."""
    return reduce_backward(x, group)


class OPTPolicy(OPTForCausalLMPolicy):
    """How HybridParallelPlugin cuts our model: ColossalAI's policy for OPT, with our attention and
    forward.

    [F26] ColossalAI 0.5.0's policy raises KeyError for "sdpa", [F27] its ColoAttention has no
    kernel on a CPU, and [F28] its pipeline forward builds a 4-D mask and calls torch.cuda.
    """

    def module_policy(self):
        config = self.model.config
        config._attn_implementation = "eager"
        try:
            policy = super().module_policy()
        finally:
            config._attn_implementation = "sdpa"
        for base, ours in (
            (OPTAttention, Attention),
            (OPTDecoderLayer, DecoderLayer),
            (transformers.OPTForCausalLM, OPTForCausalLM),
        ):
            if base in policy:
                policy[ours] = policy.pop(base)
                policy[ours].method_replacement = None
        if self.shard_config.enable_tensor_parallelism:
            # As the maps that they are added to: B by rows of q, k, v and fc1, A by columns
            adapters = [
                SubModuleReplacementDescription(
                    f"adapters.{target}.{matrix}", module, ignore_if_not_exist=True
                )
                for matrix, module, targets in (
                    ("lora_B", Linear1D_Col, ("q_proj", "k_proj", "v_proj", "fc1")),
                    ("lora_A", Linear1D_Row, ("out_proj", "fc2")),
                )
                for target in targets
            ]
            self.append_or_create_submodule_replacement(adapters, policy, DecoderLayer)
        return policy

    def get_shared_params(self):
        """The tied embedding, whose gradients ColossalAI adds up; [F53] a frozen one has none."""
        is_frozen = not self.model.lm_head.weight.requires_grad
        return [] if is_frozen else super().get_shared_params()

    def set_pipeline_forward(self, model_cls, new_forward, policy):
        """Our forward knows stages by itself: see postprocess."""

    def postprocess(self):
        # [F54] ColossalAI's makes the embedding the head, even of a model with a head of its own
        model = super().postprocess() if self.tie_weight else self.model
        if self.shard_config.enable_tensor_parallelism:
            model.tp_group = self.shard_config.tensor_parallel_process_group
        stages = self.pipeline_stage_manager
        if stages is not None:
            start, end = stages.get_stage_index(
                stages.distribute_layers(model.config.num_hidden_layers)
            )
            model.stage = Stage(start, end, stages.is_first_stage(), stages.is_last_stage())
        return model
