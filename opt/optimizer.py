"""HybridAdam without a compiler, parameter groups, the learning-rate schedule."""

import math
from collections.abc import Callable

import torch
from . import light_imports  # noqa: F401  before colossalai
from colossalai.kernel.kernel_loader import CPUAdamLoader, FusedOptimizerLoader
from colossalai.nn import optimizer as colossalai_optimizer
from colossalai.zero.gemini import gemini_optimizer
from torch.optim.lr_scheduler import LambdaLR

from .launch import has_triton


class _TorchExtension:
    """A kernel in the form that ColossalAI's KernelLoader registers; chosen over its own, which want a compiler."""

    name = "torch_fused_adamw"
    priority = 100

    def is_available(self):
        return True

    def assert_compatible(self):
        pass

    def load(self):
        return self


class _MultiTensorAdam(_TorchExtension):
    """FusedOptimizerLoader's kernel: one step of Adam(W) on lists of CUDA tensors."""

    @staticmethod
    def multi_tensor_adam(chunk_size, noop, tensor_lists, lr, beta1, beta2, eps, step, mode, bias_correction, weight_decay, div_scale=-1):
        """Update in place. `tensor_lists`: [grads, params, exp_avgs, exp_avg_sqs]; grads may be bf16 or fp16 beside fp32
        params (Gemini) and are divided by `noop` if that is a float tensor (see HybridAdam.step; ColossalAI's own is an int), or
        by `div_scale` where that is over 0. `mode` 1 is AdamW, 0 is L2 in the gradient."""
        _check_bias_correction(bias_correction)
        is_divisor = noop is not None and noop.is_floating_point()
        divisor = noop if is_divisor else _divisor(div_scale, tensor_lists[1][0].device)
        update(*tensor_lists, None, divisor, lr, beta1, beta2, eps, weight_decay, step, mode == 1)


class _CpuAdam(_TorchExtension):
    """CPUAdamLoader's kernel: one step of Adam(W) on one tensor in host memory."""

    def CPUAdamOptimizer(self, lr, beta1, beta2, eps, weight_decay, adamw_mode):
        self.adamw_mode = adamw_mode
        return self

    def step(self, step, lr, beta1, beta2, eps, weight_decay, bias_correction, param, grad, exp_avg, exp_avg_sq, div_scale):
        _check_bias_correction(bias_correction)
        lists = [grad], [param], [exp_avg], [exp_avg_sq]
        update(*lists, None, _divisor(div_scale, param.device), lr, beta1, beta2, eps, weight_decay, step, self.adamw_mode)


def _check_bias_correction(asked_for) -> None:
    if not asked_for:
        raise NotImplementedError("the bias is always corrected: use --adam_kernel colossalai")


def _divisor(div_scale: float, device: torch.device) -> torch.Tensor | None:
    return torch.full((), float(div_scale), device=device) if div_scale > 0 else None


def update(grads, params, exp_avgs, exp_avg_sqs, outputs, divisor, lr, beta1, beta2, eps, weight_decay, step, decoupled=True) -> None:
    """One step of AdamW in place; on a GPU in one kernel for all tensors.

    Args:
        grads: tensors in any floating-point dtype, all the same.
        params, exp_avgs, exp_avg_sqs: fp32 tensors with as many elements each.
        outputs: 16-bit tensors that take the updated `params` as well, or None.
        divisor: fp32 scalar tensor that the gradients are divided by, or None. If it is not finite, nothing changes.
        step: the number of this update, from 1. `decoupled`: AdamW's weight decay; False adds it to the gradient, as Adam does.
    """
    device = params[0].device
    if device.type == "cuda" and has_triton(device):
        from .kernels import adamw

        divisor = torch.ones((), device=device) if divisor is None else divisor
        adamw(grads, params, exp_avgs, exp_avg_sqs, outputs, divisor, lr, beta1, beta2, eps, weight_decay, step, decoupled)
        return
    torch_update = torch._fused_adamw_ if decoupled else torch._fused_adam_
    torch_update(
        params,
        [g.to(p.dtype).view_as(p) for g, p in zip(grads, params, strict=True)],
        exp_avgs,
        exp_avg_sqs,
        [],
        # The kernel reads the step after it was counted up, as a tensor per parameter, on the parameters' device.
        [torch.full((), float(step), device=device)] * len(params),
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=divisor,
        found_inf=None if divisor is None else (~divisor.isfinite()).float(),
    )
    for output, param in zip(outputs or [], params, strict=bool(outputs)):
        output.copy_(param.view_as(output))


def sum_of_squares(grads: list[torch.Tensor]) -> torch.Tensor:
    """The squares of all elements of tensors of one dtype, added up in fp32: in bf16 the sum would be good to two digits."""
    if grads[0].is_cuda and has_triton(grads[0].device):
        from .kernels import sum_of_squares

        return sum_of_squares(grads)
    return torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32)).square().sum()


class HybridAdam(colossalai_optimizer.HybridAdam):
    """ColossalAI's HybridAdam, which takes no step along a gradient that is not finite, and with loss scaling and clipping
    honoured for bf16 gradients in host memory.

    In 0.5.0 `step(div_scale=...)` does not reach `torch_adam_update`, the path of Gemini's offloaded bf16 gradients.
    tests/test_optimizer.py shows it.
    """

    # Gives the gradient's norm where a plugin's optimizer has computed it on the host just before it calls step().
    find_norm: Callable[[], float] | None = None

    def grad_norm(self) -> torch.Tensor:
        """The L2 norm of all gradients of this process, a scalar on the device."""
        return sum_of_squares(self._gradients()).sqrt()

    def step(self, closure=None, div_scale: float = -1, grad_norm: torch.Tensor | None = None, max_norm: float = math.inf):
        """One update, of gradients scaled down from `grad_norm` to `max_norm`; none if `grad_norm`, or what find_norm gives, is
        not finite."""
        norm = self.find_norm() if self.find_norm else grad_norm
        if isinstance(norm, torch.Tensor) and norm.is_cuda and FusedOptimizerLoader.REGISTRY == [_MultiTensorAdam]:
            # Scaled and decided in the kernel, see update(): no pass over the gradients, and no wait for the norm.
            self._dummy_overflow_buf = ((norm.float() + 1e-6) / max_norm).clamp(min=1.0)
        elif norm is not None:
            if not math.isfinite(norm):
                return None
            if norm > max_norm:
                torch._foreach_mul_(self._gradients(), max_norm / (norm + 1e-6))
        self._div_scale = div_scale
        return super().step(closure, div_scale)

    def _gradients(self) -> list[torch.Tensor]:
        return [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]

    def torch_adam_update(self, data, grad, *args, **kwargs):
        if self._div_scale > 0:
            grad = grad.to(data.dtype) / self._div_scale
        super().torch_adam_update(data, grad, *args, **kwargs)


gemini_optimizer._AVAIL_OPTIM_LIST.add(HybridAdam)  # Gemini asks for one of these very classes, not for a subclass


_COLOSSALAI_KERNELS = {loader: loader.REGISTRY for loader in (FusedOptimizerLoader, CPUAdamLoader)}


def use_adam_kernel(name: str) -> None:
    """Whose arithmetic the next HybridAdam has: "torch", PyTorch's fused AdamW or its equal (see update), or "colossalai".

    ColossalAI 0.5.0 compiles its own kernels at first use: minutes, and an error without nvcc of torch's CUDA version.
    The others go in at its extension point, the loaders' registries.
    """
    for loader, kernel in ((FusedOptimizerLoader, _MultiTensorAdam), (CPUAdamLoader, _CpuAdam)):
        # Alone, not beside ColossalAI's kernels: the loader warns about every choice that it has to make.
        loader.REGISTRY = [kernel] if name == "torch" else _COLOSSALAI_KERNELS[loader]


MOMENTS = ("exp_avg", "exp_avg_sq")


def adam_state(adam: torch.optim.Optimizer, key: torch.Tensor, shape: torch.Size | tuple) -> dict:
    """HybridAdam's state of the parameter `key`, of `shape`; made if the first update, which would make it, has not come yet."""
    state = adam.state[key]
    if not state:
        state |= {"step": 0, **{name: torch.zeros(shape, device=key.device) for name in MOMENTS}}
    return state


def build_optimizer(model: torch.nn.Module, learning_rate: float, weight_decay: float, adam_kernel: str = "torch") -> HybridAdam:
    """HybridAdam over `model`'s parameters, in decay_groups."""
    use_adam_kernel(adam_kernel)
    return HybridAdam(decay_groups(model, weight_decay), lr=learning_rate)


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups for a torch optimizer: decay on matrices alone, not on biases and layer norms."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def build_schedule(optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int) -> LambdaLR:
    """Linear rise over `warmup_steps`, then linear fall to 0 at `total_steps`.

    The same as transformers.get_linear_schedule_with_warmup, but for the first step, whose rate there is 0: it learns.
    """

    def factor(step):
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))

    return LambdaLR(optimizer, factor)


def set_step(schedule: LambdaLR, step: int) -> None:
    """Put a schedule where it is after `step` steps; its own way there, step(), warns that no update came before."""
    rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule.load_state_dict(schedule.state_dict() | {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates})
