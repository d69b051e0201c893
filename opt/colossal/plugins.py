"""--plugin to Booster: the only place that knows ColossalAI's plugin classes."""

from argparse import Namespace
from contextlib import nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.distributed as dist
from colossalai.booster import Booster
from colossalai.booster.mixed_precision.mixed_precision_base import MixedPrecision
from colossalai.booster.plugin import (
    GeminiPlugin,
    HybridParallelPlugin,
    LowLevelZeroPlugin,
    TorchDDPPlugin,
    hybrid_parallel_plugin,
    torch_ddp_plugin,
)
from colossalai.interface import ModelWrapper, OptimizerWrapper

from opt.colossal.policy import OPTPolicy
from opt.colossal.reduction import LayerwiseDDP
from opt.model.config import DTYPES
from opt.train.graphs import GraphedBackward


@dataclass
class Parallel:
    """A Booster, and how its plugin spreads the work over the processes."""

    booster: Booster
    dp_rank: int
    dp_size: int
    tp_rank: int
    tp_size: int
    tp_group: dist.ProcessGroup | None
    pp_rank: int
    pp_size: int
    is_last_stage: bool
    can_defer_sync: bool  # whether gradients of several batches may be reduced once, at the last
    clips_in_step: bool = False  # whether the optimizer's step() takes max_norm and returns the gradient's norm
    # Whether optimizer.get_grad_norm() is the gradient's norm: in fp16 it still has the loss scale in it.
    knows_grad_norm: bool = False
    graphed: GraphedBackward | None = None  # replays forward and backward, with --cuda_graph
    _shape: torch.Size | None = None  # see expect_shape
    _ddp: LayerwiseDDP | None = None  # see boost

    @property
    def counts_loss(self) -> bool:
        """Whether this process speaks for its data-parallel rank when losses are added up over all processes."""
        return self.is_last_stage and self.tp_rank == 0

    def expect_shape(self, shape: torch.Size | None) -> None:
        """Before a batch goes through the pipeline: let a stage tell the next about micro-batches of this shape once, with the first,
        or with each if `shape` is None, for micro-batches that may differ.

        ColossalAI's stages tell it once in a run, or with each micro-batch, and then the host waits for the GPU each time. Our batches
        are as long as their longest row.
        """
        schedule = self.booster.plugin.scheduler
        if shape is None or shape != self._shape:
            schedule.send_tensor_metadata = schedule.send_grad_metadata = True
            schedule.tensor_metadata_recv = schedule.grad_metadata_recv = None
        schedule.enable_metadata_cache = shape is not None
        self._shape = shape

    def accumulate(self, model, optimizer, is_last_batch: bool):
        """The context for the backward of one of several batches per step."""
        if is_last_batch or not self.can_defer_sync:
            return nullcontext()
        return self._ddp.no_sync() if self._ddp else self.booster.no_sync(model, optimizer)

    def boost(self, model, optimizer):
        """Booster.boost, with LayerwiseDDP in DistributedDataParallel's place, or with neither where there is nothing to reduce."""

        def wrap(module, process_group=None, **_):
            if self.dp_size > 1:
                self._ddp = LayerwiseDDP(module, process_group)
            return module

        with (
            patch.object(torch_ddp_plugin, "TorchDDPModel", lambda module, **_: ModelWrapper(wrap(module))),
            patch.object(hybrid_parallel_plugin, "DDP", wrap),
        ):
            model, optimizer, *_ = self.booster.boost(model, optimizer)
        model.use_ddp = False
        return model, optimizer


def build_booster(args: Namespace, device: torch.device, num_parameters: int) -> Parallel:
    """The Booster that `args` (resolved, see args.resolve) ask for a model of `num_parameters`. Needs the process group."""
    max_norm = getattr(args, "max_norm", 0.0)
    on_gpu = device.type == "cuda"
    knows_grad_norm = max_norm > 0 and args.precision != "fp16"
    # All but hybrid_parallel are data parallel alone.
    world = {"dp_rank": dist.get_rank(), "dp_size": dist.get_world_size(), "tp_rank": 0, "tp_size": 1, "tp_group": None}
    world |= {"pp_rank": 0, "pp_size": 1, "is_last_stage": True}

    if args.plugin in ("torch_ddp", "torch_ddp_fp16"):
        precision = AutocastPrecision(DTYPES[args.precision], device.type)
        booster = Booster(plugin=TorchDDPPlugin(), mixed_precision=precision)
        return Parallel(booster, **world, can_defer_sync=world["dp_size"] > 1, clips_in_step=True)

    if args.plugin == "low_level_zero":
        plugin = LowLevelZeroPlugin(
            stage=args.zero_stage,
            precision=args.precision,
            initial_scale=2**16,
            max_norm=max_norm,
            overlap_communication=on_gpu,  # by a stream of its own
        )
        return Parallel(Booster(plugin=plugin), **world, can_defer_sync=args.zero_stage == 1, knows_grad_norm=knows_grad_norm)

    if args.plugin == "gemini":
        alone = world["dp_size"] == 1 and args.offload_optim_frac == 0
        plugin = GeminiPlugin(
            precision=args.precision,
            placement_policy="static",
            offload_optim_frac=args.offload_optim_frac,
            enable_gradient_accumulation=args.gradient_accumulation_steps > 1,
            # A model of fewer parameters than a chunk holds is kept whole: one process saves nothing by letting go of parameters
            # that it will gather from itself (see gemini.speed_up). Of several processes the chunks must be smaller than any model
            # (the default is 32 Mi), or ColossalAI 0.5.0 adds up accumulated gradients world_size times (tests/test_training.py,
            # gemini with accumulation).
            min_chunk_size_m=num_parameters / 2**20 + 1 if alone else min(32, num_parameters / 2**20 / 4),
            # Pinned memory and a reduction stream exist beside a GPU only.
            enable_async_reduce=on_gpu and world["dp_size"] > 1,
            max_prefetch=3 if world["dp_size"] > 1 else 0,  # chunks of 32 Mi elements or more; a layer of OPT-1.3b has 48 Mi
            pin_memory=on_gpu,
            initial_scale=2**16,
            max_norm=max_norm,
        )
        return Parallel(Booster(plugin=plugin), **world, can_defer_sync=False, knows_grad_norm=knows_grad_norm)

    plugin = HybridParallelPlugin(
        tp_size=args.tp_size,
        pp_size=args.pp_size,
        precision=args.precision,
        zero_stage=args.zero_stage,
        num_microbatches=args.num_microbatches,
        max_norm=max_norm,
        overlap_communication=on_gpu,
        custom_policy=OPTPolicy(),
        # The vocabulary is padded to a multiple of this times tp_size.
        make_vocab_size_divisible_by=1,
    )
    stages = plugin.stage_manager
    return Parallel(
        Booster(plugin=plugin),
        dp_rank=dist.get_rank(plugin.dp_group),
        dp_size=dist.get_world_size(plugin.dp_group),
        tp_rank=dist.get_rank(plugin.tp_group),
        tp_size=args.tp_size,
        tp_group=plugin.tp_group,
        pp_rank=int(stages.stage) if stages else 0,
        pp_size=args.pp_size,
        is_last_stage=stages is None or stages.is_last_stage(),
        can_defer_sync=args.zero_stage < 2,
        knows_grad_norm=knows_grad_norm,
    )


class AutocastPrecision(MixedPrecision):
    """fp32 weights, forward under autocast to `dtype`, gradients clipped by the update; with a loss scaler for fp16.

    Booster's own 'bf16' is an empty class in ColossalAI 0.5.0, and its 'fp16' scales on CUDA only.
    """

    def __init__(self, dtype: torch.dtype, device_type: str):
        self.dtype, self.device_type = dtype, device_type

    def configure(self, model, optimizer=None, criterion=None):
        if self.dtype != torch.float32:
            inner = model.unwrap()
            inner.forward = torch.autocast(self.device_type, dtype=self.dtype)(inner.forward)
        if optimizer is not None:
            scaler = torch.amp.GradScaler(self.device_type, init_scale=2.0**16, enabled=self.dtype == torch.float16)
            optimizer = _ClippingOptimizer(optimizer.optim, scaler)
        return model, optimizer, criterion


class _ClippingOptimizer(OptimizerWrapper):
    """HybridAdam behind a loss scaler, which passes everything on if it is not enabled."""

    def __init__(self, optim, scaler: torch.amp.GradScaler):
        super().__init__(optim)
        self.scaler = scaler

    def backward(self, loss, inputs=None, retain_graph=False, **kwargs):
        self.scaler.scale(loss).backward(inputs=inputs, retain_graph=retain_graph, **kwargs)

    def step(self, max_norm: float = 0.0) -> torch.Tensor | None:
        """One update, of gradients scaled down to `max_norm` if that is over 0; then returns their norm before that."""
        norm = None
        if max_norm > 0:
            self.scaler.unscale_(self.optim)
            norm = self.optim.grad_norm()
        self.scaler.step(self.optim, grad_norm=norm, max_norm=max_norm)  # in fp16 it skips by what unscale_ has found
        self.scaler.update()
        return norm
