"""ColossalAI's HybridAdam with an update that needs no compiler, and its parameter groups."""

import math
from collections.abc import Callable, Iterator

import torch
from colossalai.accelerator import get_accelerator
from colossalai.interface import OptimizerWrapper
from colossalai.kernel.kernel_loader import CPUAdamLoader, FusedOptimizerLoader
from colossalai.nn import optimizer as colossalai_optimizer
from colossalai.zero.gemini import gemini_optimizer

from opt.model.formats import Held
from opt.model.kernel_probe import has_kernel


class _NoKernel:
    """[F14] What ColossalAI's KernelLoader finds instead of its own kernels, which want a compiler
    and which HybridAdam asks for when it is made: ours updates by update()."""

    name = "none"
    priority = 100
    multi_tensor_adam = None

    def is_available(self):
        return True

    def assert_compatible(self):
        pass

    def load(self):
        return self

    def CPUAdamOptimizer(self, *args):
        pass


def update(
    grads,
    params,
    exp_avgs,
    exp_avg_sqs,
    outputs,
    divisor,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    step,
    rates=None,
) -> None:
    """One step of AdamW in place; on a GPU in one kernel for all tensors.

    Args:
        grads: tensors in any floating-point dtype, all the same.
        params, exp_avgs, exp_avg_sqs: fp32 tensors with as many elements each.
        outputs: 16-bit tensors that take the updated `params` as well, or None.
        divisor: fp32 scalar tensor that the gradients are divided by, or None. If it is not finite,
            nothing changes.
        step: the number of this update, from 1.
        rates: rates_of() them, on the parameters' device, if they are there already.
    """
    device = params[0].device
    if has_kernel("update", device, grads[0].dtype, outputs[0].dtype if outputs else None):
        from opt.model.kernels import adamw

        divisor = torch.ones((), device=device) if divisor is None else divisor
        on_device = rates_of(lr, beta1, beta2, step).to(device) if rates is None else rates
        adamw(
            grads,
            params,
            exp_avgs,
            exp_avg_sqs,
            outputs,
            divisor,
            on_device,
            beta1,
            beta2,
            eps,
            weight_decay,
        )
        return
    # The kernel reads the step after it was counted up, as a tensor, on the parameters' device.
    counted = torch.full((), float(step), device=device)
    found_inf = None if divisor is None else (~divisor.isfinite()).float()
    lists = [params, grads, exp_avgs, exp_avg_sqs, *([outputs] if outputs else [])]
    widens = device.type == "cpu" and grads[0].dtype != params[0].dtype
    for params_, grads_, exp_avgs_, exp_avg_sqs_, *outputs_ in (
        _pieces(lists) if widens else [lists]
    ):
        torch._fused_adamw_(
            params_,
            [g.to(p.dtype).view_as(p) for g, p in zip(grads_, params_, strict=True)],
            exp_avgs_,
            exp_avg_sqs_,
            [],
            [counted] * len(params_),
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
            grad_scale=divisor,
            found_inf=found_inf,
        )
        if outputs_:
            torch._foreach_copy_(
                *outputs_, [p.view_as(output) for p, output in zip(params_, *outputs_, strict=True)]
            )


def rates_of(lr: float, beta1: float, beta2: float, step: int) -> torch.Tensor:
    """What kernels.adamw and adamw_low read: fp32 (4,), on the host. Learning rate, 1 -
    beta1**step, sqrt(1 - beta2**step), and `step`, the number of this update."""
    return torch.tensor([lr, 1 - beta1**step, (1 - beta2**step) ** 0.5, step])


PIECE = 2**20  # elements: 4 MiB in fp32, which the cores' caches hold between them


def _pieces(lists: list[list[torch.Tensor]]) -> Iterator[list[list[torch.Tensor]]]:
    """`lists`, about PIECE elements of each at a time, of one tensor or of several small ones:
    16-bit gradients in host memory are widened where they are used, with fewer passes over memory
    than one after the other, and no fp32 copy of them all."""
    some, elements = [], 0
    for tensors in zip(*lists, strict=True):
        for pieces in zip(*(tensor.view(-1).split(PIECE) for tensor in tensors), strict=True):
            if some and elements + len(pieces[0]) > PIECE:
                yield list(map(list, zip(*some, strict=True)))
                some, elements = [], 0
            some.append(pieces)
            elements += len(pieces[0])
    if some:
        yield list(map(list, zip(*some, strict=True)))


def sums_of_squares(grads: list[torch.Tensor]) -> torch.Tensor:
    """fp32 (len(grads),): of each tensor all elements' squares, added up in fp32; in bf16 the sum
    would be good to two digits."""
    return torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32)).square()


MOMENTS = ("exp_avg", "exp_avg_sq")


def innermost(optimizer: torch.optim.Optimizer) -> "HybridAdam":
    """Of a boosted optimizer, the one that was boosted."""
    while isinstance(optimizer, OptimizerWrapper):
        optimizer = optimizer.optim
    return optimizer


def divisor_on(device: torch.device, divisor: torch.Tensor | float) -> torch.Tensor | None:
    """What gradients are divided by, as update() takes it; None where that is 1."""
    if isinstance(divisor, torch.Tensor):
        return divisor
    return None if divisor == 1.0 else torch.full((), divisor, device=device)


class HybridAdam(colossalai_optimizer.HybridAdam):
    """ColossalAI's HybridAdam, which updates by update() and takes no step along a gradient that is
    not finite.

    Whether it is finite a GPU knows after the host has gone on. So a step is, in time: the host
    counts it (count), for bias correction follows from the count; the GPU updates or leaves all as
    it is (update_group); the norm that it decided by is on its way to the host (counted_by); the
    next step, or a checkpoint, reads it and takes back what was counted for nothing (settle).

    [F16] In 0.5.0 the update of bf16 gradients in host memory, which Gemini offloads, is a dozen
    passes over it, without `div_scale`.
    """

    # What its state has of each parameter, and of how many elements a number of it is
    moments: dict[str, int] = dict.fromkeys(MOMENTS, 1)
    dtype = torch.float32  # of the weights that it updates, and of moments that are no codes

    # Gives the gradient's norm where a plugin's optimizer has computed it on the host just before
    # it calls step().
    find_norm: Callable[[], float] | None = None
    # Has parameters in it whose state is in host memory, and which it updates later: a
    # host_adam.HostAdam
    host_adam = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # By parameter group and device
        self._rates: dict[tuple[int, torch.device], torch.Tensor] = {}
        # The last update's gradient norm, and when it is there
        self._norm: torch.Tensor | None = None
        self._norm_came = None

    def grad_norm(self) -> torch.Tensor:
        """The L2 norm of all gradients of this process, a scalar on the device."""
        return sums_of_squares(self._gradients()).sum().sqrt()

    @torch.no_grad()
    def step(
        self,
        closure=None,
        div_scale: float = -1,
        grad_norm: torch.Tensor | None = None,
        max_norm: float = math.inf,
    ):
        """One update, of gradients divided by `div_scale`, if that is over 0, and scaled down from
        `grad_norm` to `max_norm`; none if `grad_norm`, or what find_norm gives, is not finite."""
        self.settle()
        norm = self.find_norm() if self.find_norm else grad_norm
        divisor = div_scale if div_scale > 0 else 1.0
        if isinstance(norm, torch.Tensor) and norm.is_cuda:
            # update() decides: the host does not wait for the norm
            divisor = ((norm + 1e-6) / max_norm).clamp(min=1.0) * divisor
        elif norm is not None:
            if not math.isfinite(norm):
                return
            divisor *= max(1.0, (float(norm) + 1e-6) / max_norm)
        for group in self.param_groups:
            here, later = [], []
            for parameter in group["params"]:
                if parameter.grad is not None:
                    is_later = self.host_adam is not None and parameter in self.host_adam
                    (later if is_later else here).append(parameter)
            if here:
                self.count(group, here)
                self.update_group(group, here, [p.grad for p in here], None, divisor)
            if later:
                self.count(group, later)
                self.host_adam.update_later(group, later, divisor)
        if isinstance(norm, torch.Tensor):
            self.counted_by(norm)

    def count(self, group: dict, params: list) -> None:
        """Before an update of parameters of `group`, on one device: one more for each, and the
        rates that follow from it."""
        for param in params:
            state = adam_state(self, param, param.shape)
            state["step"] += 1
        device = params[0].device
        if device.type == "cuda":
            if (id(group), device) not in self._rates:
                self._rates[id(group), device] = torch.empty(4, device=device)
            self._rates[id(group), device].copy_(
                rates_of(group["lr"], *group["betas"], state["step"]), non_blocking=True
            )

    def counted_by(self, norm: torch.Tensor) -> None:
        """After an update that changes nothing if the gradient's `norm`, on its device, is not
        finite: settle() will take that into account, and need not wait for this update then."""
        if norm.is_cuda:
            if self._norm_came is None:
                self._pinned = torch.empty((), pin_memory=True)
                self._norm_came = get_accelerator().Event()
            self._norm = self._pinned.copy_(norm, non_blocking=True)
            self._norm_came.record()
        else:
            self._norm = norm

    def settle(self) -> None:
        """Take the last update out of the count if it has changed nothing, as torch.optim.AdamW's
        fused one does. To be called before the count is used."""
        if self._norm is None:
            return
        if self._norm_came:
            self._norm_came.synchronize()
        if not math.isfinite(self._norm):
            for state in self.state.values():
                state["step"] -= 1
        self._norm = None

    def update_group(
        self,
        group: dict,
        params: list,
        grads: list,
        outputs: list | None,
        divisor: torch.Tensor | float,
    ) -> None:
        """update() of parameters of `group`, on one device, that have been counted, and of their
        state."""
        states = [adam_state(self, param, param.shape) for param in params]
        moments = ([state[name] for state in states] for name in self.moments)
        divisor = divisor_on(params[0].device, divisor)
        numbers = (
            group["lr"],
            *group["betas"],
            group["eps"],
            group["weight_decay"],
            states[0]["step"],
        )
        update(
            grads,
            params,
            *moments,
            outputs,
            divisor,
            *numbers,
            rates=self._rates.get((id(group), params[0].device)),
        )

    def held(self, param: torch.Tensor) -> Held:
        """A parameter that has been counted and its state; its gradient is still to be put in."""
        state = adam_state(self, param, param.shape)
        moments = (state[name].view(-1) for name in MOMENTS)
        return Held(None, param.data.view(-1), *moments, None, None, seed=0, start=0)

    def update_held(self, held: list[Held], divisor: float, numbers: tuple[float, ...]) -> None:
        """One step, in host memory, of what has the same `numbers`: lr, beta1, beta2, eps,
        weight_decay, step. The updated weights, in 16 bits, take the place of the gradients."""
        grads = [one.grad for one in held]
        state = ([getattr(one, name) for one in held] for name in ("weight", *MOMENTS))
        update(*(grads, *state, grads), divisor_on(grads[0].device, divisor), *numbers)

    def new_moments(self, key: torch.Tensor, shape: torch.Size | tuple) -> dict[str, torch.Tensor]:
        """Ahead of the first update of the parameter `key`, of `shape`."""
        return {name: torch.zeros(shape, device=key.device) for name in self.moments}

    def _gradients(self) -> list[torch.Tensor]:
        return [
            p.grad for group in self.param_groups for p in group["params"] if p.grad is not None
        ]


# [F15] Gemini asks for one of these very classes, not for a subclass
gemini_optimizer._AVAIL_OPTIM_LIST |= {HybridAdam}
for _loader in (FusedOptimizerLoader, CPUAdamLoader):
    # [F14] Alone: beside ColossalAI's own it warns about every choice that it has to make
    _loader.REGISTRY = [_NoKernel]


def adam_state(adam: HybridAdam, key: torch.Tensor, shape: torch.Size | tuple) -> dict:
    """HybridAdam's state of the parameter `key`, of `shape`; made if the first update, which would
    make it, has not come yet."""
    state = adam.state[key]
    if not state:
        state |= {"step": 0, **adam.new_moments(key, shape)}
    return state


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups for a torch optimizer: decay on matrices alone, not on biases and layer
    norms; nothing of frozen parameters."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
