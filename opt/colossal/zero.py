"""--plugin low_level_zero: 16-bit weights on each device, optimizer state (stage 1) and gradients
(stage 2) spread over the processes."""

from colossalai.booster.plugin import LowLevelZeroPlugin

from opt.colossal import low_memory
from opt.colossal.plugin import Plugin
from opt.colossal.sharded import Sharded


class ZeroPlugin(Plugin, LowLevelZeroPlugin):
    """ColossalAI's, whose optimizer takes a layer's gradients together."""

    def __init__(self, plan, device, num_parameters):
        super().__init__(
            stage=plan.zero_stage,
            precision=plan.precision,
            initial_scale=2**16,
            max_norm=plan.max_norm,
            master_weights=not low_memory.is_low(plan),
            overlap_communication=device.type == "cuda",  # by a stream of its own
        )
        self._begin(plan, device)
        self.can_defer_sync = plan.zero_stage == 1

    # ---- before there are processes

    @staticmethod
    def describe(plan, dp_size):
        """The stage."""
        return f"ZeRO stage {plan.zero_stage}"

    @staticmethod
    def state_bytes(plan, parameters, dp_size):
        """Weights; gradients, spread in stage 2; Adam's moments and the fp32 copies, spread."""
        width, adam = (4, 8) if plan.precision == "fp32" else (2, 12)
        if low_memory.is_low(plan):
            adam = low_memory.moment_bytes(plan)
        gradients = width / (dp_size if plan.zero_stage == 2 else 1)
        return parameters * width, parameters * gradients, parameters * adam / dp_size

    # ---- plugin, travel, form

    def configure(self, model, optimizer=None, criterion=None, dataloader=None, lr_scheduler=None):
        """Booster.boost calls this."""
        model, optimizer, *rest = super().configure(
            model, optimizer, criterion, dataloader, lr_scheduler
        )
        self.form = Sharded(model, optimizer, self.spread.dp_size, recorded=self.plan.cuda_graph)
        self._know_pieces(optimizer)
        if self.knows_grad_norm:
            optimizer.optim.find_norm = optimizer.get_grad_norm
        self._finish_layers(model.unwrap())
        return model, optimizer, *rest
