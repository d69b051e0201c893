"""HybridAdam without a compiler is torch.optim.AdamW; the groups and the schedule are what they
say."""

import math
import time

import pytest
import torch
from torch import nn

from opt.colossal import adam
from opt.colossal.adam import HybridAdam, decay_groups, update
from opt.model.config import load_config
from opt.model.opt import meta_model
from opt.train.schedule import Steps, new_schedule

from .conftest import SAMPLE_MODEL

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SCALE = 2.0**10


def small_network(device) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(19, 33), nn.LayerNorm(33), nn.Linear(33, 7)).to(device)


def gradients(network, dtype, steps):
    """Of each step one for each parameter, in magnitudes from 1e-4 to 10: Adam is far from linear
    in them."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        size = 10.0 ** (step % 6 - 4)
        yield [
            (torch.randn(p.shape, generator=generator) * size).to(p.device, dtype)
            for p in network.parameters()
        ]


def set_grad(parameter, grad) -> None:
    """Give it a gradient of whatever dtype, as Gemini does: PyTorch checks the dtype only when the
    gradient is set."""
    data = parameter.data
    parameter.data = data.to(grad.dtype)
    parameter.grad = grad
    parameter.data = data


@pytest.mark.parametrize("div_scale", [-1, SCALE], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("device", DEVICES)
def test_updates_are_those_of_adamw(device, grad_dtype, div_scale):
    """Over 20 steps, with decay in one group and none in the other, under a changing learning
    rate."""
    ours, theirs = small_network(device), small_network(device)
    hybrid = HybridAdam(decay_groups(ours, 0.1), lr=1e-2)
    parameters = list(theirs.parameters())
    groups = [
        {"params": [parameters[i] for i in (0, 4)], "weight_decay": 0.1},
        {"params": [parameters[i] for i in (1, 2, 3, 5)], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-2)
    schedules = [new_schedule(o, Steps(25, 25, 5, 25, 1e-2)) for o in (hybrid, adamw)]
    for grads in gradients(ours, grad_dtype, 20):
        for mine, reference, grad in zip(
            ours.parameters(), theirs.parameters(), grads, strict=True
        ):
            set_grad(mine, grad)
            reference.grad = grad.float() / div_scale if div_scale > 0 else grad.float()
        hybrid.step(div_scale=div_scale)
        adamw.step()
        for schedule in schedules:
            schedule.step()
        for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, reference, rtol=0, atol=1e-6)
    start = small_network(device)
    assert all(
        (p - q).abs().max() > 0.01
        for p, q in zip(ours.parameters(), start.parameters(), strict=True)
    )


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_that_changes_nothing_is_none(device):
    """Gradients that are not finite come among the others: the rest are AdamW's, which has never
    seen them."""
    ours, theirs = small_network(device), small_network(device)
    hybrid = HybridAdam(decay_groups(ours, 0), lr=1e-2)
    adamw = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0)
    for step, grads in enumerate(gradients(ours, torch.float32, 12)):
        is_bad = step in (2, 3, 9)
        for mine, reference, grad in zip(
            ours.parameters(), theirs.parameters(), grads, strict=True
        ):
            mine.grad, reference.grad = grad * (math.nan if is_bad else 1), grad
        hybrid.step(grad_norm=hybrid.grad_norm())
        if not is_bad:
            adamw.step()
        for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, reference, rtol=0, atol=1e-6)
    hybrid.settle()
    assert {state["step"] for state in hybrid.state.values()} == {9}


@pytest.mark.parametrize("device", DEVICES)
def test_16_bit_weights_follow_and_a_divisor_that_is_not_finite_stops_all(monkeypatch, device):
    monkeypatch.setattr(adam, "PIECE", 4096)  # the largest tensor is cut into three
    torch.manual_seed(0)
    sizes = (5, 4096, 10000)
    reference = [torch.randn(n, device=device) for n in sizes]
    params = [r.clone() for r in reference]
    exp_avgs, exp_avg_sqs = ([torch.zeros_like(r) for r in reference] for _ in range(2))
    outputs = [torch.empty(n, dtype=torch.bfloat16, device=device) for n in sizes]
    grads = [torch.randn(n, device=device).bfloat16() for n in sizes]
    numbers = {
        "lr": 1e-2,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "step": 1,
    }
    update(
        grads,
        params,
        exp_avgs,
        exp_avg_sqs,
        None,
        torch.tensor(float("nan"), device=device),
        **numbers,
    )
    assert all(torch.equal(p, r) for p, r in zip(params, reference, strict=True))
    assert not any(t.any() for t in (*exp_avgs, *exp_avg_sqs))

    leaves = [r.requires_grad_() for r in reference]
    for leaf, grad in zip(leaves, grads, strict=True):
        leaf.grad = grad.float() / 4
    update(
        grads, params, exp_avgs, exp_avg_sqs, outputs, torch.tensor(4.0, device=device), **numbers
    )
    torch.optim.AdamW(leaves, lr=1e-2, weight_decay=0.1).step()
    for param, leaf, output in zip(params, leaves, outputs, strict=True):
        torch.testing.assert_close(param, leaf.detach(), rtol=0, atol=2e-6)
        assert torch.equal(output, param.bfloat16())


@pytest.mark.parametrize("device", DEVICES)
def test_starts_at_once(device):
    """ColossalAI's own HybridAdam compiles for two minutes, or raises without the CUDA toolkit."""
    network = small_network(device)
    start = time.perf_counter()
    hybrid = HybridAdam(decay_groups(network, 0.0), lr=1e-3)
    set_grad(next(network.parameters()), torch.ones(33, 19, device=device))
    hybrid.step()
    assert time.perf_counter() - start < 2


def test_no_decay_on_biases_and_norms():
    model = meta_model(load_config(SAMPLE_MODEL))
    names = {id(p): name for name, p in model.named_parameters()}
    decay = {
        names[id(p)]: g["weight_decay"]
        for g in HybridAdam(decay_groups(model, 0.1), lr=1e-3).param_groups
        for p in g["params"]
    }
    assert decay.keys() == set(names.values())
    for name, value in decay.items():
        assert value == (0.0 if name.endswith("bias") or "norm" in name else 0.1), name


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (3, 10), (1, 1), (4, 4), (10, 10), (0, 1)])
def test_schedule(warmup, total):
    """Step n of 1..total has peak x n / warmup, then peak x (total - n + 1) / (total - warmup): up
    to the peak, down to 0."""
    adamw = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = new_schedule(adamw, Steps(total, total, warmup, total, 0.5))
    for n in range(1, total + 1):
        wanted = 0.5 * (n / warmup if n <= warmup else (total - n + 1) / (total - warmup))
        assert math.isclose(adamw.param_groups[0]["lr"], wanted), n
        adamw.step()
        schedule.step()
    assert adamw.param_groups[0]["lr"] == 0
