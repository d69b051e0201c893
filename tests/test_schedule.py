"""Learning rates by transformers' names and shapes."""

import math

import pytest
import torch
from transformers import get_scheduler

from args import Settings, train_parser
from opt.data.batches import Position
from opt.errors import UserError
from opt.train.schedule import count_steps, new_schedule, set_step

TOTAL, PEAK = 20, 1e-3  # 20 rows, a row a step
SHAPES = [
    ("linear", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.5}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("polynomial", {"power": 2.0, "lr_end": 1e-5}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("inverse_sqrt", {}),
    ("warmup_stable_decay", {"num_decay_steps": 5}),
]


def settled(name, kwargs, warm_up):
    flags = train_parser().parse_args(["--batch_size", "1", "--num_epoch", "1"])
    given = {"lr_scheduler_type": name, "lr_scheduler_kwargs": kwargs, "warmup_steps": warm_up}
    given |= {"learning_rate": PEAK, "dp_size": 1, "warmup_ratio": 0.1}
    return count_steps(Settings(**vars(flags)).but(**given), TOTAL, Position())


def optimizer():
    return torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=PEAK)


def rates(adam, schedule) -> list[float]:
    found = []
    for _ in range(TOTAL):
        found.append(adam.param_groups[0]["lr"])
        adam.step()
        schedule.step()
    return found


@pytest.mark.parametrize("warm_up", [0, 1, 6, TOTAL])
@pytest.mark.parametrize("name, kwargs", SHAPES)
def test_rates_are_those_of_transformers_but_that_the_first_step_learns(name, kwargs, warm_up):
    if name == "constant" and warm_up or "num_decay_steps" in kwargs and warm_up == TOTAL:
        return
    adam = optimizer()
    found = rates(adam, new_schedule(adam, settled(name, kwargs, warm_up)))
    if warm_up < TOTAL:  # else transformers' polynomial divides by 0
        theirs = optimizer()
        wanted = rates(theirs, get_scheduler(name, theirs, warm_up, TOTAL, kwargs))
        assert found[warm_up:] == pytest.approx(wanted[warm_up:], rel=1e-12)
    rise = [PEAK * (step + 1) / warm_up for step in range(warm_up)]
    assert found[:warm_up] == pytest.approx(rise, rel=1e-12)
    assert found[0] > 0

    # And what set_step finds for a run that goes on is what was there
    later = optimizer()
    schedule = new_schedule(later, settled(name, kwargs, warm_up))
    set_step(schedule, 9)
    assert later.param_groups[0]["lr"] == found[9]
    later.step()
    schedule.step()
    assert later.param_groups[0]["lr"] == found[10]


@pytest.mark.parametrize(
    "name, kwargs, said",
    [
        ("cosine", {"cycles": 2}, "unexpected keyword argument 'cycles'"),
        ("cosine", {"num_cycles": "two"}, "cannot be"),
        ("cosine", {"last_epoch": 5}, "cannot be"),
        ("cosine_with_min_lr", {}, "min_lr_rate"),
        ("warmup_stable_decay", {}, "num_decay_steps"),
        ("warmup_stable_decay", {"num_decay_steps": 19}, "more than the 20 steps"),
        ("polynomial", {"lr_end": 1}, "lr_end"),
        ("polynomial", {"power": math.nan}, "not always a number"),
        ("linear", {"power": 2}, "unexpected keyword argument 'power'"),
    ],
)
def test_what_no_schedule_takes_is_refused(name, kwargs, said):
    with pytest.raises(UserError, match=said):
        settled(name, kwargs, 4)
