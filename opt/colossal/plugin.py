"""What this project asks of a ColossalAI plugin, one question after the other. The answers are in
ddp, zero, gemini and hybrid.

| when          | where                          | what                                            |
|---------------|--------------------------------|-------------------------------------------------|
| no processes  | describe, state_bytes, ...,    | what a run will be like, from the plan alone    |
| yet           | update_kernels                 |                                                 |
| plugin        | __init__                       | ColossalAI's plugin and precision               |
| hold          | new_model                      | each parameter: lazy, or in memory at once      |
| plugin, form, | configure, which Booster.boost | what has to be mended; in which of four forms   |
| travel        | calls                          | the optimizer's state lies (plain, copies,      |
|               |                                | sharded, chunks); when gradients and weights go |
|               |                                | from process to process                         |
| place         | place                          | how weights come to this process's share        |
"""

from argparse import Namespace
from collections.abc import Iterable
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
import torch.distributed as dist
from colossalai.lazy import LazyInitContext
from transformers import OPTConfig
from transformers.modeling_utils import no_init_weights

from opt.colossal import low_memory
from opt.colossal.adam import innermost
from opt.colossal.pieces import Form
from opt.colossal.processes import Spread, seed_everything
from opt.model import four_bits, linear, lora
from opt.model.config import DTYPES
from opt.model.opt import OPTForCausalLM, compile_layers
from opt.model.weights import Weights


class Plugin:
    """The part of the plugins that is the same for all; comes before one of ColossalAI's among the
    bases."""

    # Whether parameters get memory only when the plugin has cut them to this process's share
    is_lazy = False
    mixed_precision = None  # for Booster, where the plugin leaves precision to it
    # Whether gradients of several batches may be reduced once, with the last
    can_defer_sync = False
    products_wait = False  # whether backward puts some off, see linear.put_off
    form: Form  # of the optimizer's state; set by configure

    plan: Namespace
    device: torch.device
    spread: Spread

    def _begin(self, plan: Namespace, device: torch.device, spread: Spread | None = None) -> None:
        self.plan, self.device = plan, device
        self.spread = spread or Spread(dist.get_rank(), dist.get_world_size())
        # [F12] In fp16 the norm that ColossalAI's optimizers know still has the loss scale in it.
        self.knows_grad_norm = plan.max_norm > 0 and plan.precision != "fp16"

    # ---- before there are processes, from the plan alone

    @staticmethod
    def describe(plan: Namespace, dp_size: int) -> str:
        """A line about it, behind its name; "" for nothing."""
        return ""

    @staticmethod
    def state_bytes(plan: Namespace, parameters: int, dp_size: int) -> tuple[float, float, float]:
        """On a process's device, in bytes: weights, gradients, and what the optimizer keeps beside
        them (Adam's moments, fp32 copies)."""
        raise NotImplementedError

    @staticmethod
    def host_bytes(plan: Namespace, parameters: int, dp_size: int) -> float:
        """Of the state of what is trained, what a process has in host memory, in bytes."""
        return 0

    @staticmethod
    def frozen_bytes(plan: Namespace, parameters: int, dp_size: int) -> float:
        """With LoRA: the weights on a process's device that are not trained, in bytes; state_bytes
        is then of the adapters."""
        return (4 if plan.precision == "fp32" else 2) * parameters

    @staticmethod
    def buffer_bytes(plan: Namespace, parameters: int, dp_size: int) -> float:
        """On a process's device, in bytes: what only passes by, such as weights of other
        processes."""
        return 0

    @staticmethod
    def is_autocast(plan: Namespace) -> bool:
        """Whether weights are in fp32 and products in 16 bits."""
        return False

    @staticmethod
    def kept_bytes(plan: Namespace, fused_budget: float | None) -> float:
        """Of activations that a layer keeps for backward, a token and a unit of width, in 16 bits.

        34 in Korthikanti et al., arXiv:2205.05198, table 2, without the attention scores, which the
        kernels do not keep; ReLU's input its output is enough for. Fitted to measured peaks, see
        tests/test_memory.py. `fused_budget`: the compiler's, where dropout's masks are not kept
        either (residual), else None.
        """
        if fused_budget is None:
            kept = kept_within(plan, 0.9, {0.8: 18.2, 0.9: 22.3, 1.0: 26.0})
        else:
            kept = kept_within(plan, fused_budget, {0.8: 18.2, 0.9: 18.2, 0.92: 22.3, 1.0: 24.3})
        # Inputs of products in fp8 are kept so, but where adapters read them too.
        return kept - (0.7 if plan.compile and plan.fp8 and not plan.lora_r else 0)

    @staticmethod
    def waiting_bytes(plan: Namespace) -> float:
        """Of what a layer hands to products that wait behind its backward, on GPUs, a token and a
        unit of width."""
        return 0

    @staticmethod
    def update_kernels(plan: Namespace) -> Iterable[tuple]:
        """Those of opt/model/kernels.py that an update comes to, as kernel_probe knows them. In
        bf16 it is ours, of both; otherwise ColossalAI widens gradients before it."""
        if low_memory.is_low(plan):
            yield from low_memory.update_kernels(plan)
        elif plan.precision == "bf16":
            yield "update", torch.bfloat16, torch.bfloat16
        else:
            yield "update", torch.float32, None

    # ---- hold

    def new_model(self, config: OPTConfig) -> OPTForCausalLM:
        """A model ready for Booster.boost, its weights still to be placed. Lazy, or in memory at
        once as it will be trained."""
        # The ranks of a tensor-parallel group must drop the same of activations that each holds
        # whole; all others differ. Of those that are cut they drop the same places of each part.
        seed_everything(
            self.plan.seed + self.spread.dp_rank * self.spread.pp_size + self.spread.pp_rank
        )
        with (
            LazyInitContext(default_device=self.device) if self.is_lazy else nullcontext(),
            no_init_weights(),
        ):
            if self.adapters:
                model = self._new_frozen_model(config)
            elif self.is_lazy:
                model = OPTForCausalLM(config)
            else:
                with torch.device(self.device):
                    model = OPTForCausalLM(config).to(self.weights_dtype)
        is_tied = model.lm_head.weight is model.model.decoder.embed_tokens.weight
        assert is_tied == config.tie_word_embeddings
        model.recompute_every, model.fused_loss = (
            self.plan.grad_checkpoint,
            self.plan.fused_loss,
        )
        return model

    def _new_frozen_model(self, config: OPTConfig) -> OPTForCausalLM:
        """With LoRA: frozen weights are in the precision of the products from the start, the
        adapters in that of weights that are trained."""
        dtype, packs = DTYPES[self.plan.precision], self.plan.load_in_4bit
        device = nullcontext() if self.is_lazy else torch.device(self.device)
        # Of matrices that will be packed nothing else ever takes memory
        with torch.device("meta") if packs and not self.is_lazy else device, _default_dtype(dtype):
            model = OPTForCausalLM(config)
            if packs:
                four_bits.prepare(model, dtype, self.plan.grad_checkpoint)
        if packs and not self.is_lazy:
            model.to_empty(device=self.device).tie_weights()
        with device, _default_dtype(self.weights_dtype):
            lora.add_adapters(model, self.adapters)
        return model

    @property
    def adapters(self) -> lora.Lora | None:
        """What is trained, if that is not all."""
        return lora.Lora.of(self.plan)

    @property
    def weights_dtype(self) -> torch.dtype:
        """Of the weights that forward and backward work with, and that are trained."""
        return DTYPES[self.plan.precision]

    # ---- plugin

    def _know_pieces(self, optimizer) -> None:
        """In configure(), behind the form: with --optim what rounds has to know where its pieces
        lie."""
        if low_memory.is_low(self.plan):
            innermost(optimizer).know(self.form.pieces(), self.plan.seed)

    def _finish_layers(self, model: OPTForCausalLM, cut=lambda module: None) -> None:
        """The last thing in configure(): linear maps of the layers that are here, put together of
        their parts, and compiled."""
        few_tokens = self.device.type == "cuda" and not self.plan.compile
        linear.attach(
            model.own_layers,
            linear.fp8 if self.plan.fp8 else linear.few_tokens if few_tokens else linear.plain,
            cut,
        )
        if self.plan.compile:
            budget = self.plan.activation_memory_budget
            compile_layers(model, saves_memory(self.plan), budget, self.products_wait)

    def accumulate(self, model, optimizer, is_last_batch: bool):
        """The context for the backward of one of several batches of a step."""
        return (
            nullcontext()
            if is_last_batch or not self.can_defer_sync
            else self.no_sync(model, optimizer)
        )

    def grad_norm(self, optimizer) -> torch.Tensor | float | None:
        """The gradient's L2 norm before clipping, of the step that was just taken; None where it is
        not known."""
        return optimizer.get_grad_norm() if self.knows_grad_norm else None

    # ---- place

    def place(self, model, weights: Weights) -> None:
        """Fill the boosted `model` from `weights`, a tensor at a time, see that they have arrived,
        and make it ready to train."""
        self.form.place(weights, self.spread)
        self.form.check(weights, self.spread)
        model.train()


def saves_memory(plan: Namespace) -> bool:
    """Whether compiled layers compute again what is cheap to compute: not where steps are recorded,
    which are short ones, nor in fp8, where attention would be the cheapest, 1.3b 251 ms a step
    instead of 225 (16 x 1024 tokens, one H100), nor what has crossed processes."""
    return not (plan.cuda_graph or plan.fp8 or plan.tp_size > 1)


def kept_within(plan: Namespace, default: float, measured: dict[float, float]) -> float:
    """What Plugin.kept_bytes is by the budget that compile_layers is given, or takes by `default`:
    between those that were `measured`, and the layer's input alone, which 0 leaves."""
    budget = plan.activation_memory_budget if plan.compile else 1.0
    if budget is None:
        budget = default if saves_memory(plan) else 1.0
    return float(np.interp(budget, [0.0, *measured], [2.0, *measured.values()]))


@contextmanager
def _default_dtype(dtype: torch.dtype):
    """In which new tensors are, where none is named."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
