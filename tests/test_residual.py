"""Dropout, residual and norm in one pass: what the kernels compute, in Triton's interpreter and on a
GPU, against PyTorch's own operations on the mask that they have drawn."""

import os
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch

from opt.model import residual

from .conftest import REPO, losses, train
from .test_kernels import TRITONS, triton_on_path

gpu = pytest.mark.gpu
FORMS = "total", "normed", ""  # what goes on as the residual


def differences(rows, columns, dtype, p, goes_on, device="cpu", trained=True) -> list[float]:
    """Of outputs and gradients, each to the largest of its reference's elements. `trained`: whether
    the norm is."""
    shape = {"size": (*rows, columns), "dtype": dtype, "device": device}
    x, rest = (torch.randn(**shape, requires_grad=True) for _ in range(2))
    norm = torch.nn.LayerNorm(columns, device=device, dtype=dtype).requires_grad_(trained)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    seeds = torch.empty(2, dtype=torch.int64, device=device).random_()
    found = residual.add_norm(x, rest, norm, seeds, 1, p, goes_on)
    kept = torch.ones_like(x)
    if p:
        kept = residual.add(kept, torch.zeros_like(x), seeds, 1, p).detach() != 0

    wide = [t.detach().float().requires_grad_() for t in (x, rest, *norm.parameters())]
    total = wide[1] + wide[0] * kept * scale(p)
    normed = torch.nn.functional.layer_norm(total, (columns,), *wide[2:], norm.eps)
    expected = {"total": (total, normed), "normed": (normed, normed), "": (normed,)}[goes_on]
    grads = [torch.randn_like(out) for out in found]
    inputs = [t for t in (x, rest, *norm.parameters()) if t.requires_grad]
    ours = *found, *torch.autograd.grad(found, inputs, grads)
    grads = [grad.float() for grad in grads]
    theirs = *expected, *torch.autograd.grad(expected, wide[: len(inputs)], grads)
    return [
        ((a.float() - b).abs().max() / b.abs().max()).item()
        for a, b in zip(ours, theirs, strict=True)
    ]


def scale(p: float) -> float:
    """Of what is kept, where p is as near as 16 bits let it be."""
    return 65536 / (65536 - round(65536 * p))


def gradients(is_before, p, fused, again=False, device="cpu") -> list[torch.Tensor]:
    """Of the parameters of two layers, in fp32, by the kernels or by transformers' own forward;
    with `again` layers are computed a second time in backward."""
    from transformers import OPTConfig

    from opt.model.opt import OPTForCausalLM

    sizes = {"hidden_size": 64, "ffn_dim": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    flags = {"do_layer_norm_before": is_before, "dropout": p, "attention_dropout": 0.0}
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(vocab_size=64, word_embed_proj_dim=64, **sizes, **flags))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.to(device).train().recompute_every = int(again)
    torch.manual_seed(1)
    tokens = torch.arange(10, device=device).view(2, 5)
    with patch.object(residual, "are_fused", lambda *_: fused):
        model(input_ids=tokens, labels=tokens)["loss"].backward()
    return [parameter.grad for parameter in model.parameters()]


def check_layers(device: str) -> None:
    """Layers of both kinds without dropout are transformers' own; with it they drop the same when
    they are computed again."""

    def equal(ours, theirs):
        # A bias of k moves no attention: two gradients may be zeros
        assert len(ours) == len(theirs) <= sum(grad.abs().max() > 0 for grad in theirs) + 2
        pairs = zip(ours, theirs, strict=True)
        return all(torch.allclose(*pair, rtol=1e-4, atol=1e-5) for pair in pairs)

    for is_before in (True, False):
        plain = gradients(is_before, 0.0, False, device=device)
        assert equal(gradients(is_before, 0.0, True, device=device), plain)
        dropped = gradients(is_before, 0.5, True, device=device)
        assert equal(gradients(is_before, 0.5, True, again=True, device=device), dropped)
        assert not equal(dropped, plain)


INTERPRETED = """
import torch
from triton.runtime import interpreter
from tests.test_residual import FORMS, check_layers, differences

patch = interpreter._patch_lang_tensor
def patch_for_numpy_2(tensor, scope):
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())
interpreter._patch_lang_tensor = patch_for_numpy_2

torch.manual_seed(0)
for goes_on, columns, p in zip(FORMS, (64, 192, 192), (0.1, 0.5, 0.0)):
    found = differences((2, 3), columns, torch.float32, p, goes_on)
    assert max(found) < 1e-5, (goes_on, columns, p, found)
assert max(differences((1, 3), 128, torch.bfloat16, 0.1, "total", trained=False)) < 2e-2
check_layers("cpu")
print("all")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels themselves")
def test_numbers_without_a_gpu(request):
    """Outputs and all gradients; widths that are no power of 2; norms that are frozen; whole
    layers."""
    env = triton_on_path(TRITONS[-1], request.config.cache)
    env |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", INTERPRETED]
    streams = {"capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, cwd=REPO, env=os.environ | env, **streams)
    assert done.stdout.split() == ["all"], done.stderr[-2000:]


@gpu
def test_layers():
    """In fp32, of which the kernels know as well."""
    check_layers("cuda")


@gpu
@pytest.mark.parametrize("columns", [64, 1024, 2560, 4096, 7168])
@pytest.mark.parametrize("goes_on", FORMS)
def test_numbers(columns, goes_on):
    """Within the rounding of bf16; tokens that the programs have unequal numbers of."""
    torch.manual_seed(0)
    for p in (0.0, 0.1):
        found = differences((3, 401), columns, torch.bfloat16, p, goes_on, "cuda")
        assert max(found) < 1e-2, found
    assert max(differences((1, 1), columns, torch.bfloat16, 0.1, goes_on, "cuda", False)) < 1e-2
    assert max(differences((2, 8), columns, torch.float32, 0.1, goes_on, "cuda")) < 1e-5


@gpu
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_mask(p):
    """As many are dropped as was asked for, in each column; another one by each seed and place; the
    same in backward; what is kept is scaled."""
    torch.manual_seed(0)
    rows, columns = 4096, 2560
    zeros = torch.zeros(rows, columns, device="cuda")
    x = torch.ones(rows, columns, device="cuda", requires_grad=True)

    def kept(seeds, place):
        out = residual.add(x, zeros, seeds, place, p)
        (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
        assert torch.equal(grad, out) and out.unique().tolist() == pytest.approx([0, scale(p)])
        return (out > 0).float()

    seeds = torch.empty(2, dtype=torch.int64, device="cuda").random_()
    first, second = kept(seeds, 0), kept(seeds, 1)
    assert torch.equal(first, kept(seeds, 0))
    deviation = (p * (1 - p)) ** 0.5
    for mask in (first, second):
        assert abs(mask.mean().item() - (1 - p)) < 5 * deviation / (rows * columns) ** 0.5
        assert (mask.mean(0) - (1 - p)).abs().max() < 6 * deviation / rows**0.5
        assert (mask.mean(1) - (1 - p)).abs().max() < 6 * deviation / columns**0.5
        for shifted in (mask.roll(1, 0), mask.roll(1, 1), mask.roll(8, 1)):  # no row like another
            both = (mask * shifted).mean().item()
            assert abs(both - (1 - p) ** 2) < 5 / (rows * columns) ** 0.5
    assert abs((first * second).mean().item() - (1 - p) ** 2) < 5 / (rows * columns) ** 0.5


@gpu
def test_each_replay_drops_others():
    """The seeds are drawn where the graph is replayed, from PyTorch's generator."""
    from transformers import OPTConfig

    from opt.model.opt import OPTForCausalLM

    sizes = {"hidden_size": 64, "ffn_dim": 64, "num_attention_heads": 2, "num_hidden_layers": 3}
    config = OPTConfig(vocab_size=64, word_embed_proj_dim=64, **sizes)
    layers = OPTForCausalLM(config).to("cuda", torch.bfloat16).own_layers
    hidden = torch.zeros(1, 2, 64, device="cuda", dtype=torch.bfloat16)
    residual.draw_seeds(layers, 2, hidden)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seeds = residual.draw_seeds(layers, 2, hidden)
    assert seeds.shape == (3, 2, 2)
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        for _ in range(2):
            graph.replay()
            drawn.append(seeds.flatten().tolist())
    assert drawn[:2] == drawn[2:] and len({*drawn[0], *drawn[1]}) == 24


@gpu
def test_losses_with_dropout(tmp_path):
    """A training whose layers are computed again, and a compiled one, have the losses of the plain
    one: the same is dropped in all three."""
    common = ["--plugin", "low_level_zero", "--max_train_steps", "8", "--learning_rate", "1e-3"]
    common += ["--eval_fraction", "0", "--no_save", "--dropout", "0.3"]
    found = {}
    for flag in ("", "--grad_checkpoint", "--compile"):
        done = train(tmp_path / (flag or "plain"), *common, *flag.split())
        assert "kernels  " not in done.stdout
        found[flag] = losses(tmp_path / (flag or "plain"))
    assert found["--grad_checkpoint"] == pytest.approx(found[""], abs=5e-3)
    assert found["--compile"] == pytest.approx(found[""], abs=0.03)
