"""A run in optimizer steps, and the learning rate of each."""

import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.optim.lr_scheduler import LambdaLR

from opt.data.batches import Position, batches_an_epoch
from opt.errors import UserError


@dataclass(frozen=True)
class Steps:
    """The run in optimizer steps."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    eval_steps: int
    learning_rate: float
    scheduler_type: str = "linear"  # see --lr_scheduler_type
    scheduler_kwargs: dict = field(default_factory=dict)

    @classmethod
    def of_benchmark(cls, learning_rate: float) -> "Steps":
        """Without warm-up, and without an end."""
        return cls(10**9, 10**9, 0, 10**9, learning_rate)


def count_steps(plan: Namespace, rows: int, start: Position) -> Steps:
    """Rows to steps: the batches of an epoch in groups of gradient_accumulation_steps, the last
    group may be smaller.

    `start`: where the run starts; if steps were larger or smaller until there, the total is what
    they were and what is left. Raises UserError for a schedule that cannot be.
    """

    def steps_for(number):
        return -(
            -batches_an_epoch(number, plan.batch_size, plan.dp_size)
            // plan.gradient_accumulation_steps
        )

    steps = steps_for(rows)
    left = (
        steps * (plan.num_epoch - start.epoch - 1) + steps_for(rows - start.rows)
        if start.epoch < plan.num_epoch
        else 0
    )
    total = max(start.step, min(start.step + left, plan.max_train_steps or start.step + left))
    rate = plan.learning_rate * (plan.dp_size if plan.scale_lr else 1)
    warm_up = plan.warmup_steps
    if warm_up is None:
        warm_up = math.ceil(total * plan.warmup_ratio)
    how = plan.lr_scheduler_type, plan.lr_scheduler_kwargs
    counted = Steps(steps, total, warm_up, plan.eval_steps or steps, rate, *how)
    _check(counted)
    return counted


def new_schedule(optimizer: torch.optim.Optimizer, steps: Steps) -> LambdaLR:
    """The learning rate of each step, as transformers' schedule of that name has it after the
    warm-up. That one's first step has the rate 0; here it learns, and the warm-up's last step is
    the first at the peak."""
    return LambdaLR(optimizer, _factor(steps))


def _factor(steps: Steps) -> Callable[[int], float]:
    """Steps done -> what the peak learning rate is multiplied by in the next."""
    warm_up, total = steps.warmup_steps, steps.total_steps
    if steps.scheduler_type == "linear" and not steps.scheduler_kwargs:

        def factor(step):
            if step < warm_up:
                return (step + 1) / warm_up
            return max(0.0, (total - step) / max(1, total - warm_up))

        return factor
    shape = _of_transformers(steps)

    def factor(step):
        if step < warm_up:
            return 1.0 if step + 1 == warm_up else shape(step + 1)
        # After the last step it is asked for once more, where some divide by the steps left: 0.
        return shape(min(step, total - 1)) if warm_up < total else 1.0

    return factor


def _of_transformers(steps: Steps) -> Callable[[int], float]:
    # It takes a second, which the default does without
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    numbers = {"num_warmup_steps": steps.warmup_steps, "num_training_steps": steps.total_steps}
    if steps.scheduler_type == "constant":
        numbers = {}
    elif steps.scheduler_type in ("constant_with_warmup", "inverse_sqrt"):
        del numbers["num_training_steps"]
    # They read the peak from an optimizer
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=steps.learning_rate)
    new = TYPE_TO_SCHEDULER_FUNCTION[steps.scheduler_type]
    return new(optimizer, **numbers, **steps.scheduler_kwargs).lr_lambdas[0]


# What transformers has no default for
_NEEDED = {
    "cosine_with_min_lr": '{"min_lr_rate": 0.1}',
    "warmup_stable_decay": '{"num_decay_steps": N}',
}


def _check(steps: Steps) -> None:
    """Raise UserError for a schedule that transformers does not take, or that is not a number of
    at least 0 at a thousand places of the run."""
    name, given = f"--lr_scheduler_type {steps.scheduler_type}", steps.scheduler_kwargs
    if steps.scheduler_type in _NEEDED and not given:
        raise UserError(f"{name} needs --lr_scheduler_kwargs '{_NEEDED[steps.scheduler_type]}'")
    name += f" with --lr_scheduler_kwargs {given}" * bool(given)
    places = {i * steps.total_steps // 1000 for i in range(1000)}
    warm_up, last = steps.warmup_steps, steps.total_steps - 1
    try:
        factor = _factor(steps)
        values = [factor(step) for step in sorted(places | {max(0, min(warm_up, last))})]
        if steps.total_steps and not all(math.isfinite(v) and v >= 0 for v in values):
            raise ValueError("it is not always a number of at least 0")
        if warm_up + given.get("num_decay_steps", 0) > max(steps.total_steps, warm_up):
            raise ValueError(f"warm-up and decay take more than the {steps.total_steps} steps")
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise UserError(f"{name} cannot be: {error!s:.200}") from error


def set_step(schedule: LambdaLR, step: int) -> None:
    """Put a schedule where it is after `step` steps; its own way there, step(), warns that no
    update came before."""
    rates = [
        base * factor(step)
        for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule.load_state_dict(
        schedule.state_dict() | {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
    )
