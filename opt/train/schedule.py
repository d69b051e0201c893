"""A run in optimizer steps, and the learning rate of each."""

from argparse import Namespace
from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LambdaLR

from opt.data.batches import Position, batches_an_epoch


@dataclass(frozen=True)
class Steps:
    """The run in optimizer steps."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    eval_steps: int
    learning_rate: float

    @classmethod
    def of_benchmark(cls, learning_rate: float) -> "Steps":
        """Without warm-up, and without an end."""
        return cls(10**9, 10**9, 0, 10**9, learning_rate)


def count_steps(plan: Namespace, rows: int, start: Position) -> Steps:
    """Rows to steps: the batches of an epoch in groups of gradient_accumulation_steps, the last
    group may be smaller.

    `start`: where the run starts; if steps were larger or smaller until there, the total is what
    they were and what is left.
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
    return Steps(steps, total, round(total * plan.warmup_ratio), plan.eval_steps or steps, rate)


def linear(optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int) -> LambdaLR:
    """Linear rise over `warmup_steps`, then linear fall to 0 at `total_steps`.

    The same as transformers.get_linear_schedule_with_warmup, but for the first step, whose rate
    there is 0: it learns.
    """

    def factor(step):
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))

    return LambdaLR(optimizer, factor)


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
