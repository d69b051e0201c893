"""--plugin torch_ddp and torch_ddp_fp16: a whole model in fp32 on each device, forward under
autocast; with an --optim of fewer bits in bf16."""

import torch
from colossalai.booster.mixed_precision.mixed_precision_base import MixedPrecision
from colossalai.booster.plugin import TorchDDPPlugin
from colossalai.interface import ModelWrapper, OptimizerWrapper

from opt.colossal import low_memory
from opt.colossal.plain import ClippingOptimizer, Plain
from opt.colossal.plugin import Plugin, kept_within
from opt.colossal.reduction import LayerwiseDDP
from opt.model.config import DTYPES


class DDPPlugin(Plugin, TorchDDPPlugin):
    """Gradients are averaged over all processes, by LayerwiseDDP in DistributedDataParallel's
    place."""

    can_defer_sync = True
    weights_dtype = torch.float32

    def __init__(self, plan, device, num_parameters):
        super().__init__()
        self._begin(plan, device)
        self.knows_grad_norm = plan.max_norm > 0  # ClippingOptimizer's has no loss scale in it
        dtype = DTYPES[plan.precision]
        if low_memory.is_low(plan):
            self.weights_dtype = dtype
        self.mixed_precision = AutocastPrecision(
            dtype, device.type, plan.max_norm, self.weights_dtype
        )
        self._ddp: LayerwiseDDP | None = None

    # ---- before there are processes

    @staticmethod
    def state_bytes(plan, parameters, dp_size):
        """fp32: weights, gradients, two moments. With --optim bf16 and what it keeps."""
        if low_memory.is_low(plan):
            return 2 * parameters, 2 * parameters, low_memory.moment_bytes(plan) * parameters
        return 4 * parameters, 4 * parameters, 8 * parameters

    @staticmethod
    def is_autocast(plan):
        """But with an --optim of fewer bits."""
        return plan.precision != "fp32" and not low_memory.is_low(plan)

    @staticmethod
    def kept_bytes(plan, fused_budget):
        """Under autocast the stream between layers is fp32, but where weights are not."""
        if plan.lora_r or low_memory.is_low(plan):
            return Plugin.kept_bytes(plan, fused_budget)
        return kept_within(plan, 0.98, {0.9: 19.0, 0.98: 25.5, 1.0: 29.5})

    @staticmethod
    def update_kernels(plan):
        """Of fp32 gradients, and no 16-bit weights."""
        if low_memory.is_low(plan):
            yield from low_memory.update_kernels(plan)
            return
        yield "update", torch.float32, None

    # ---- plugin, travel, form

    def configure(self, model, optimizer=None, criterion=None, dataloader=None, lr_scheduler=None):
        """Booster.boost calls this, and then mixed_precision.configure, which wraps the
        optimizer."""
        if self.spread.dp_size > 1:
            self._ddp = LayerwiseDDP(model, None)
        self._finish_layers(model)
        model, optimizer = ModelWrapper(model), OptimizerWrapper(optimizer)
        self.form = Plain(model, optimizer)
        self._know_pieces(optimizer)
        return model, optimizer, criterion, dataloader, lr_scheduler

    def no_sync(self, model, optimizer):
        """Gradients of this backward stay in this process."""
        return self._ddp.no_sync()

    def accumulate(self, model, optimizer, is_last_batch):
        """See Plugin."""
        return super().accumulate(model, optimizer, is_last_batch or self._ddp is None)


class AutocastPrecision(MixedPrecision):
    """Forward in `dtype`, under autocast where the weights are in another, gradients clipped by the
    update; with a loss scaler for fp16.

    [F24] Booster's own 'bf16' is an empty class in ColossalAI 0.5.0, [F25] and its 'fp16' scales on
    CUDA only.
    """

    def __init__(
        self, dtype: torch.dtype, device_type: str, max_norm: float, weights=torch.float32
    ):
        """`weights`: the dtype that they are in."""
        self.dtype, self.weights = dtype, weights
        self.device_type, self.max_norm = device_type, max_norm

    def configure(self, model, optimizer=None, criterion=None):
        """Called by Booster.boost."""
        if self.dtype != self.weights:
            inner = model.unwrap()
            inner.forward = torch.autocast(self.device_type, dtype=self.dtype)(inner.forward)
        scaler = torch.amp.GradScaler(
            self.device_type, init_scale=2.0**16, enabled=self.dtype == torch.float16
        )
        return model, ClippingOptimizer(optimizer.optim, scaler, self.max_norm), criterion
