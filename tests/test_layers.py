"""The parts of a decoder layer that are this project's own, against PyTorch's: packed attention and
linear maps; and how layers are dealt to pipeline stages."""

from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F
from transformers import OPTConfig

from opt.colossal.pipeline import layers_per_stage
from opt.model import linear, sizes
from opt.model.attention import attend, locate
from opt.model.opt import OPTForCausalLM, compile_layers

LENGTHS = [31, 5, 40, 1, 0, 22, 63, 14]


def attention_row_by_row(q, k, v, lengths):
    """PyTorch's attention of one row after the other."""
    rows = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v)), strict=True)
    outs = [
        F.scaled_dot_product_attention(*(x.unsqueeze(0) for x in row), is_causal=True)[0]
        for row in rows
        if row[0].shape[1]
    ]
    return torch.cat(outs, dim=1).transpose(0, 1)


def with_gradients(function, tensors, grad):
    tensors = [t.clone().requires_grad_() for t in tensors]
    out = function(*tensors)
    out.backward(grad.to(out))
    return [out.detach().float().cpu(), *(t.grad.float().cpu() for t in tensors)]


def gpu(*parameters):
    return pytest.param(*parameters, marks=pytest.mark.gpu)


@pytest.mark.parametrize(
    "device, dtype, head_dim, longest, near",
    [
        ("cpu", torch.float32, 16, 63, 1e-6),
        ("cpu", torch.float32, 20, 90, 1e-6),
        gpu("cuda", torch.float32, 64, 63, 1e-3),  # tf32
        gpu("cuda", torch.bfloat16, 64, 64, 8e-3),  # each row one program
        gpu("cuda", torch.float16, 64, 128, 1e-3),
        gpu("cuda", torch.float16, 16, 63, 1e-3),
        gpu("cuda", torch.bfloat16, 128, 64, 8e-3),
        # FlashAttention: longer rows, or heads of another width
        gpu("cuda", torch.bfloat16, 64, 300, 8e-3),
        gpu("cuda", torch.float16, 80, 64, 1e-3),
        gpu("cuda", torch.float16, 20, 64, 1e-3),  # neither
    ],
)
def test_attention_of_packed_rows_is_that_of_each_row_alone(device, dtype, head_dim, longest, near):
    """Output and gradients; `longest` may be more than any row has."""
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(sum(LENGTHS), 3, head_dim) for _ in range(4))
    cu_seqlens = torch.tensor(
        [0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32, device=device
    )
    rows = locate(cu_seqlens, sum(LENGTHS), longest, head_dim, dtype)
    expected = with_gradients(lambda *qkv: attention_row_by_row(*qkv, LENGTHS), (q, k, v), grad)
    found = with_gradients(
        lambda *qkv: attend(torch.stack(qkv, 1), rows, 0.0),
        [x.to(device, dtype) for x in (q, k, v)],
        grad,
    )
    for a, b in zip(found, expected, strict=True):
        assert torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b) < near


@pytest.mark.gpu
@pytest.mark.parametrize("longest, head_dim", [(64, 64), (300, 64)])
def test_attention_drops_what_it_is_told_to(longest, head_dim):
    """Of a row whose values are all 1, each output is a sum of weights, some dropped and the others
    scaled up."""
    x = torch.ones(400, 3, 8, head_dim, device="cuda", dtype=torch.bfloat16)
    rows = locate(
        torch.arange(0, 401, 50, device="cuda", dtype=torch.int32),
        400,
        longest,
        head_dim,
        torch.bfloat16,
    )
    out = attend(x, rows, 0.25).float()
    assert out.mean().item() == pytest.approx(1, abs=0.05) and out.std() > 0.05


@pytest.mark.parametrize(
    "device, dtype, near", [("cpu", torch.float32, 1e-6), gpu("cuda", torch.bfloat16, 8e-3)]
)
def test_linear_map_is_pytorchs(device, dtype, near):
    """Output and gradients; under autocast too, with fp32 parameters."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(48, 40)
    x, grad = torch.randn(2, 70, 48), torch.randn(2, 70, 40)
    expected = with_gradients(
        lambda x, w, b: F.linear(x, w, b), (x, layer.weight.detach(), layer.bias.detach()), grad
    )
    for autocast in (False, True):
        own = torch.nn.Linear(48, 40, device=device, dtype=torch.float32 if autocast else dtype)
        own.load_state_dict(layer.state_dict())
        layers = torch.nn.ModuleList([own])
        linear.attach(layers, linear.few_tokens)
        (own,) = layers
        given = x.clone().to(device, dtype).detach().requires_grad_()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            out = own(given)
        assert own.product is linear.few_tokens and out.dtype == (
            torch.bfloat16 if autocast else dtype
        )
        out.backward(grad.to(out))
        found = [
            t.float().cpu() for t in (out.detach(), given.grad, own.weight.grad, own.bias.grad)
        ]
        for a, b in zip(found, expected, strict=True):
            assert torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b) < (
                8e-3 if autocast else near
            )


def test_every_nth_layer_is_recomputed():
    """Runs a second time in backward; the gradients stay what they are, dropout included."""
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 5, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(**sizes, vocab_size=64, word_embed_proj_dim=32)).train()
    runs = [0] * 5
    for i, layer in enumerate(model.model.decoder.layers):
        layer.fc1.register_forward_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    ids = torch.randint(4, 64, (2, 16))
    found = {}
    for every, expected in {0: [1, 1, 1, 1, 1], 1: [2, 2, 2, 2, 2], 2: [2, 1, 2, 1, 2]}.items():
        model.recompute_every, runs[:] = every, [0] * 5
        model.zero_grad()
        torch.manual_seed(1)
        model(input_ids=ids, labels=ids)["loss"].backward()
        assert runs == expected
        found[every] = [p.grad.clone() for p in model.parameters()]
    for every in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(found[0], found[every], strict=True))


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "waiting"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_products_that_add_up(backend, waits):
    """Of several micro-batches under way at a time the sum of the gradients, where the totals are,
    also in compiled layers, whose backward has been taken apart from their forward; and when
    products wait for the backward of the micro-batch behind theirs. One that is to be added to a
    copy, which "aot_eager" makes, does not wait."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
    batches = torch.randn(4, 3, 5, 8, requires_grad=True)
    for batch in batches:
        layers(batch).square().sum().backward()
    wanted = [batches.grad, *(p.grad for p in layers.parameters())]
    batches.grad = None

    linear.attach(layers, linear.plain)
    for part in (layers[0], layers[2]):
        part.total = part.weight.grad = torch.zeros_like(part.weight)
        part.bias.grad = None
    totals = [layers[0].total, layers[2].total]
    layers.compile(backend=backend)
    losses, waiting = [], []
    for number in range(5):
        if number < 4:
            losses.append(layers(batches[number]).square().sum())
        if number > 0:
            products = []
            with (
                linear.in_place(totals),
                linear.put_off(products, totals) if waits else nullcontext(),
            ):
                losses.pop(0).backward()
            for put_off in waiting:
                linear.add_up(put_off)
            waiting = [products]
            assert len(products) == (2 if waits and backend == "eager" else 0)
    assert torch.any(layers[0].total != 0)
    linear.add_up(waiting[0])
    assert not waiting[0]
    assert all(layers[i].weight.grad is total for i, total in zip((0, 2), totals, strict=True))
    found = [batches.grad, *(p.grad for p in layers.parameters())]
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", gpu("cuda")])
def test_what_waits_is_not_written_over(device):
    """The gradients of layers that the compiler has made are the same to the last bit when the
    weights' products wait for two backwards more: it does not use the memory of what they read for
    anything else, as it does where it is not told."""
    sizes = {"hidden_size": 64, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    if device == "cpu":  # fewer kernels to wait for
        sizes |= {"enable_bias": False, "layer_norm_elementwise_affine": False, "dropout": 0.0}
    config = OPTConfig(**sizes, vocab_size=64, word_embed_proj_dim=64, init_std=0.2)
    torch.manual_seed(0)
    model = OPTForCausalLM(config).to(device, torch.bfloat16).train()
    linear.attach(model.own_layers, linear.plain)
    parts = [part for part in model.own_layers.modules() if isinstance(part, linear.Linear)]
    totals = [torch.zeros_like(part.weight) for part in parts]
    for part, total in zip(parts, totals, strict=True):
        part.total = total
    compile_layers(model, saves_memory=False, products_wait=True)
    batches = torch.randint(4, 64, (5, 2, 16), device=device)
    found = []
    for lag in (0, 2):
        torch._foreach_zero_(totals)
        model.zero_grad()
        torch.manual_seed(1)
        waiting = []
        for ids in batches:
            loss, products = model(input_ids=ids, labels=ids)["loss"], []
            with (
                linear.in_place(totals),
                linear.put_off(products, totals) if lag else nullcontext(),
            ):
                loss.backward()
            assert len(products) == (len(totals) if lag else 0)
            waiting.append(products)
            if len(waiting) > lag:
                linear.add_up(waiting.pop(0))
        for products in waiting:
            linear.add_up(products)
        others = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([total.clone() for total in totals] + others)
    assert all(total.any() for total in totals)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("stages", [2, 3, 4, 8])
def test_stages_are_as_fast_as_one_another(stages):
    """All layers, at least one each; the slowest, the last one with the head, is no slower than if
    the layers were dealt evenly, and clearly faster where the head is worth several layers."""
    for size in sizes.PRESETS:
        config = sizes.preset_config(size)
        layers, head = config.num_hidden_layers, config.vocab_size * config.word_embed_proj_dim
        own = layers_per_stage(config, stages)
        assert sum(own) == layers and min(own) >= 1 and own[:-1] == sorted(own[:-1])
        head /= 1.5 * sizes.layer_matrices(config) / layers
        evenly = max(-(-layers // stages), layers // stages + head)
        assert max(*own[:-1], own[-1] + head) <= evenly
    assert layers_per_stage(sizes.preset_config("125m"), 2) == [8, 4]
    assert layers_per_stage(sizes.preset_config("6.7b"), 2) == [16, 16]
