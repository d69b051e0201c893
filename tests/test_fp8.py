"""--fp8: the three products of a linear map, and where the flag is refused. Its loss curves are in
test_gpu.py."""

import math

import pytest
import torch
from torch import nn

from args import resolve, train_parser
from opt.colossal.processes import Place
from opt.errors import UserError
from opt.model.linear import Linear, attach, fp8
from opt.train.checks import settle

TOKENS, IN, OUT = 64, 96, 160  # no two alike: a product of the wrong side would not fit


def fp8_is_missing() -> bool:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, one = (
        torch.ones(16, 16, device=device).to(torch.float8_e4m3fn),
        torch.ones((), device=device),
    )
    try:
        torch._scaled_mm(a, a.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    except RuntimeError:  # NotImplementedError is one
        return True
    return False


needs_fp8 = pytest.mark.skipif(
    fp8_is_missing(),
    reason="torch._scaled_mm does not run here: PyTorch 2.11's runs on a CPU, 2.5's on a GPU of "
    "compute capability 8.9",
)


def linear(size_in=IN, size_out=OUT, bias=True, dtype=torch.bfloat16) -> Linear:
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Sequential(nn.Linear(size_in, size_out, bias, dtype=dtype))])
    attach(layers, fp8)
    return layers[0][0].to("cuda" if torch.cuda.is_available() else "cpu")


def products(module, x, grad, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """The output of a linear map, and what `grad` at its output gives at its input and
    parameters."""
    x = x.to(dtype).requires_grad_()
    out = module(x)
    grads = torch.autograd.grad(out, (x, *module.parameters()), grad.to(out.dtype))
    return dict(zip(("output", "input", "weight", "bias"), (out.detach(), *grads), strict=False))


def inputs(module, *shape) -> torch.Tensor:
    return torch.randn(*shape, device=module.weight.device).to(module.weight.dtype).float()


@needs_fp8
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("x_scale, grad_scale", [(1, 1), (1000, 1e-3), (1e-3, 1000)])
def test_products_are_those_of_fp32(dtype, x_scale, grad_scale):
    """Whatever the factors' sizes: rounding to 3 bits (e4m3) makes an error of 2.6 % of a factor's
    norm, to 2 bits (e5m2) of 5.3 %."""
    module = linear(dtype=dtype)
    module.bias.data *= x_scale  # the output is not to be the bias alone
    x, grad = (
        inputs(module, 4, TOKENS // 4, IN) * x_scale,
        inputs(module, 4, TOKENS // 4, OUT) * grad_scale,
    )
    exact = nn.Linear(IN, OUT, device=x.device)
    exact.load_state_dict(module.state_dict())
    found, expected = products(module, x, grad, dtype), products(exact, x, grad)
    for name, bound in {"output": 0.05, "input": 0.08, "weight": 0.08, "bias": 0.01}.items():
        assert found[name].dtype == dtype and found[name].shape == expected[name].shape
        error = torch.linalg.vector_norm(found[name] - expected[name]) / torch.linalg.vector_norm(
            expected[name]
        )
        assert error < bound, name
        assert error > 0.01 or name == "bias", f"{name} is too exact for fp8"


@needs_fp8
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_the_output(dtype):
    module = linear(dtype=torch.float32)
    with torch.autocast(module.weight.device.type, dtype=dtype):
        found = products(module, inputs(module, TOKENS, IN), inputs(module, TOKENS, OUT))
    assert found["output"].dtype == dtype
    assert found["input"].dtype == found["weight"].dtype == found["bias"].dtype == torch.float32


@needs_fp8
def test_a_frozen_weight_gives_the_same():
    """As LoRA has them: quantized again in backward, not kept."""
    module = linear()
    x, grad = inputs(module, TOKENS, IN), inputs(module, TOKENS, OUT)
    expected = products(module, x, grad, torch.bfloat16)
    x = x.bfloat16().requires_grad_()
    module.requires_grad_(False)
    out = module(x)
    assert torch.equal(out, expected["output"])
    (found,) = torch.autograd.grad(out, x, grad.bfloat16())
    assert torch.equal(found, expected["input"])


@needs_fp8
def test_without_a_bias():
    module = linear(bias=False)
    assert products(
        module, inputs(module, TOKENS, IN), inputs(module, TOKENS, OUT), torch.bfloat16
    ).keys() == {"output", "input", "weight"}


@needs_fp8
@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_stays_so(poison):
    """The loss scale of fp16 and the skipping of bad steps ask for it."""
    module = linear()
    grad = inputs(module, TOKENS, OUT)
    grad[3, 5] = poison
    found = products(module, inputs(module, TOKENS, IN), grad, torch.bfloat16)
    assert not any(found[name].isfinite().all() for name in ("input", "weight", "bias"))


@needs_fp8
def test_a_large_gradient_leaves_the_small_ones():
    """As real ones are, tokens' gradients are of very different sizes: e4m3 would lose the small
    ones."""
    module = linear()
    x, grad = inputs(module, TOKENS, IN), inputs(module, TOKENS, OUT)
    grad[0] *= 1e6
    found = products(module, x, grad, torch.bfloat16)["input"][1:]
    expected = (grad @ module.weight.float())[1:]
    assert torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected) < 0.08


@needs_fp8
def test_zeros_give_zeros():
    module = linear(bias=False)
    found = products(
        module, inputs(module, TOKENS, IN) * 0, inputs(module, TOKENS, OUT) * 0, torch.bfloat16
    )
    assert not any(tensor.any() for tensor in found.values())


def test_odd_sizes_are_multiplied_as_before():
    """Without fp8's rounding, bit for bit: 72 tokens, or a width of 104 or 168."""
    for size_in, size_out, tokens in ((IN, OUT, 24), (IN + 8, OUT, TOKENS), (IN, OUT + 8, TOKENS)):
        module = linear(size_in, size_out)
        plain = nn.Linear(size_in, size_out, dtype=torch.bfloat16, device=module.weight.device)
        plain.load_state_dict(module.state_dict())
        x = inputs(module, 3, tokens, size_in).bfloat16()
        assert torch.equal(module(x), plain(x))


@pytest.mark.parametrize(
    "flags, says",
    [("--precision fp32", "bf16"), ("--plugin hybrid_parallel --tp_size 2", "--tp_size 1")],
)
def test_what_fp8_does_not_go_with(flags, says):
    """As on a GPU: only the argument check looks at these."""
    with pytest.raises(UserError, match=says):
        resolve(train_parser().parse_args(["--fp8", *flags.split()]), "cuda", True)


@pytest.mark.parametrize("capability", [None, (8, 6), (8, 9), (9, 0)])
def test_fp8_needs_a_gpu_that_has_it(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    here = Place(0, 1, 0, torch.device("cuda", 0) if capability else torch.device("cpu"))
    args = train_parser().parse_args(["--fp8"])
    if capability and capability >= (8, 9):
        assert settle(args, here).precision == "bf16"
    else:
        with pytest.raises(UserError, match="8.9"):
            settle(args, here)
