"""--optim of fewer bits: what is rounded is right on average, the state takes the bytes that are
promised, and a run on it is a run."""

import copy

import pytest
import torch
from safetensors import safe_open

from args import resolve, train_parser
from opt.colossal import low_memory
from opt.errors import UserError
from opt.model import low_bits
from opt.model.config import load_config
from opt.model.low_bits import BLOCK, Held
from opt.model.opt import meta_model
from opt.model.weights import InitialWeights

from .conftest import REPO, SAMPLE_DATA, SAMPLE_MODEL, finish, like_the_sample, losses, start
from .test_kernels import interpreted

NUMBERS = dict(lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)


def new_held(weight: torch.Tensor, bits: int, start=0) -> Held:
    """Before the first update of these bf16 weights."""
    size, dtype = weight.numel(), torch.uint8 if bits == 8 else torch.bfloat16
    moments = [torch.zeros(size, dtype=dtype) for _ in range(2)]
    scales = [torch.zeros(size // BLOCK) if bits == 8 else None for _ in range(2)]
    return Held(torch.zeros_like(weight), weight.clone(), *moments, *scales, 7, start)


def update(held: list[Held], step: int, divisor=None) -> None:
    (beta1, beta2), lr = NUMBERS["betas"], NUMBERS["lr"]
    rates = torch.tensor([lr, 1 - beta1**step, (1 - beta2**step) ** 0.5, step])
    decay = NUMBERS["weight_decay"]
    low_bits.adamw(held, divisor, rates, beta1, beta2, NUMBERS["eps"], decay)


def moments(held: Held) -> tuple[torch.Tensor, torch.Tensor]:
    """In fp32."""
    if held.exp_avg_scale is None:
        return held.exp_avg.float(), held.exp_avg_sq.float()
    root = low_bits.decoded_second_root(held.exp_avg_sq, held.exp_avg_sq_scale)
    return low_bits.decoded_first(held.exp_avg, held.exp_avg_scale), root.square()


def test_codes_are_floats():
    """Of the first moment PyTorch's float8_e4m3fn; of the second one's root by their definition.
    Values between two of them become one or the other, and are right on average."""
    codes = torch.arange(256, dtype=torch.uint8)
    first = codes.view(torch.float8_e4m3fn).float()
    second = torch.tensor(
        [
            (m / 16) * 2.0**-14 if e == 0 else (1 + m / 16) * 2.0 ** (e - 15)
            for e in range(16)
            for m in range(16)
        ]
    )
    one = torch.ones(1)
    found = low_bits.decoded_first(codes, one)
    assert torch.equal(found[~first.isnan()], first[~first.isnan()])
    assert torch.equal(low_bits.decoded_second_root(codes, one), second)

    generator, draws = torch.Generator().manual_seed(0), 5_000
    for table, encode, decode, bits, greatest in (
        (first[:127], low_bits.encode_first, low_bits.decoded_first, 20, 448.0),
        (second, low_bits.encode_second_root, low_bits.decoded_second_root, 19, 1.9375),
    ):
        # One value in each gap, the greatest itself; a block is one of each
        share = torch.rand(len(table) - 1, generator=generator)
        between = table[:-1] + share * (table[1:] - table[:-1])
        block = torch.zeros(BLOCK)
        block[: len(between)], block[len(between)] = between, greatest
        values = block.repeat(draws)
        random = torch.randint(0, 2**bits, values.shape, generator=generator)
        codes, scales = torch.empty(len(values), dtype=torch.uint8), torch.empty(draws)
        encode(values, random, codes, scales)
        found = decode(codes, scales).view(draws, BLOCK)[:, : len(between)]
        low, high, gap = table[:-1], table[1:], table[1:] - table[:-1]
        assert (torch.isclose(found, low) | torch.isclose(found, high)).all()
        assert ((found.mean(0) - between).abs() < 5 * gap * 0.5 / draws**0.5).all()


@pytest.mark.parametrize("bits", [16, 8])
def test_the_mean_is_adamw(bits):
    """Many copies of a parameter, each rounded by itself, and torch.optim.AdamW in fp32, whose
    updates are a tenth of what bf16 tells apart: after 40 of them PyTorch's AdamW in bf16 has left
    nearly all weights where they were."""
    torch.manual_seed(0)
    copies, start = 2000, (torch.rand(BLOCK) * 0.06 + 0.02).bfloat16()
    held = new_held(start.repeat(copies), bits)
    exact, nearest = start.float().requires_grad_(), start.clone().requires_grad_()
    adams = [torch.optim.AdamW([p], **NUMBERS) for p in (exact, nearest)]
    mean, sizes = torch.randn(BLOCK) * 1e-3, torch.logspace(-3, 0, BLOCK)
    for step in range(1, 41):
        grad = ((mean + torch.randn(BLOCK) * 1e-3) * sizes).bfloat16()
        held.grad = grad.repeat(copies)
        update([held], step)
        exact.grad, nearest.grad = grad.float(), grad
        for adam in adams:
            adam.step()
    moved = (exact - start.float()).detach()
    assert moved.abs().mean() > 10 * NUMBERS["lr"]
    assert (nearest == start).float().mean() > 0.5
    state = adams[0].state[exact]
    found = held.weight.view(copies, BLOCK).double().mean(0).float() - start.float()
    spread = held.weight.view(copies, BLOCK).float().std(0) / copies**0.5
    # Of what has moved, beside five times what the mean of so many is uncertain by
    assert ((found - moved).abs() < 0.03 * moved.abs().mean() + 5 * spread).all()
    for values, name in zip(moments(held), ("exp_avg", "exp_avg_sq"), strict=True):
        mean = values.view(copies, BLOCK).double().mean(0).float()
        spread = values.view(copies, BLOCK).std(0) / copies**0.5
        assert ((mean - state[name]).abs() < 0.02 * state[name].abs() + 5 * spread + 1e-12).all()


@pytest.mark.parametrize("bits", [16, 8])
def test_pieces_round_as_the_whole(bits):
    """Wherever a parameter is cut; and a gradient that is not finite changes nothing."""
    torch.manual_seed(0)
    weight = torch.randn(8 * BLOCK).bfloat16()
    whole, cut = new_held(weight, bits), 3 * BLOCK
    pieces = [new_held(weight[:cut], bits), new_held(weight[cut:], bits, start=cut)]
    for step in range(1, 4):
        grad = torch.randn(8 * BLOCK).bfloat16()
        for held, part in zip((whole, *pieces), (grad, grad[:cut], grad[cut:]), strict=True):
            held.grad = part
        for held in (whole, *pieces):
            update([held], step, torch.tensor(2.0))
    names = ["weight", "exp_avg", "exp_avg_sq"]
    names += ["exp_avg_scale", "exp_avg_sq_scale"] if bits == 8 else []
    for name in names:
        joined = torch.cat([getattr(piece, name) for piece in pieces])
        assert torch.equal(getattr(whole, name), joined), name
    before = copy.deepcopy(whole)
    update([whole], 4, torch.tensor(float("inf")))
    assert all(torch.equal(getattr(whole, name), getattr(before, name)) for name in names)


KERNEL = """
import torch
from opt.model import kernels, low_bits
from tests.test_low_bits import NUMBERS, new_held
from copy import deepcopy
torch.manual_seed(0)
for bits, sizes in ((8, (9 * 256, 256)), (16, (9 * 256, 77))):
    ours = [new_held(torch.randn(n).bfloat16() * 0.02, bits, start=512) for n in sizes]
    theirs = deepcopy(ours)
    for step in range(1, 4):
        for a, b in zip(ours, theirs):
            a.grad = b.grad = torch.randn(len(a.weight)).bfloat16() * 1e-3
        rates = torch.tensor([1e-4, 1 - 0.9**step, (1 - 0.999**step) ** 0.5, step])
        for update, held in ((low_bits.adamw, ours), (kernels.adamw_low, theirs)):
            update(held, torch.tensor(2.0), rates, 0.9, 0.999, 1e-8, 0.1)
    for a, b in zip(ours, theirs):
        for name in ("weight", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"):
            x, y = getattr(a, name), getattr(b, name)
            if x is None:
                assert y is None
            elif "scale" in name:  # of a root, whose last bit is the library's choice
                torch.testing.assert_close(x, y, rtol=1e-6, atol=0)
            else:
                assert x.any() and (x != y).float().mean() < 1e-3, (bits, len(a.weight), name)
"""


def test_the_kernel_is_the_update(request):
    """Random bits and all."""
    done = interpreted(KERNEL, request)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture
def small_model(tmp_path):
    """The sample's model with one layer."""
    return like_the_sample(tmp_path / "model", num_hidden_layers=1)


FLAGS = ("--precision", "bf16", "--max_length", 48, "--learning_rate", 1e-3, "--num_epoch", 10)
FLAGS += ("--max_train_steps", 40, "--dropout", 0, "--eval_fraction", 0)


def checkpoint_tensors(folder) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("rank-*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {key: opened.get_tensor(key) for key in opened.keys()}
    return {name: t for name, t in found.items() if not name.startswith("rng/")}


def trained(*runs) -> None:
    """Each (folder, processes, flags), side by side."""
    model = runs[0][0].parent / "model"
    started = []
    for folder, nproc, flags in runs:
        given = ("--model_name_or_path", model, "--dataset", SAMPLE_DATA, "--output_path", folder)
        env = {"OMP_NUM_THREADS": "1"}
        script = REPO / "opt_train_demo.py"
        started.append(start(script, *given, *FLAGS, *flags, nproc=nproc, env=env))
    for done in [finish(process, 300) for process in started]:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.long
def test_a_run(tmp_path, small_model):
    """40 steps in 8 bits: the losses of adamw_torch on average; 6.2 bytes a parameter held, with
    gradients in bf16 (of so small a model a fifteenth are positions, with moments in bf16); resumed bit for bit, under the other plugin; and on two processes, which cut
    the moments between them, with what sums in bf16 differ by."""
    zero, low = ("--plugin", "low_level_zero"), ("--optim", "adamw_8bit")
    one, two = ("--batch_size", 4), ("--batch_size", 2)
    saves = ("--save_steps", 20, "--save_total_limit", 3)
    trained(
        (tmp_path / "torch", None, (*one, *zero)), (tmp_path / "low", None, (*one, *low, *saves))
    )
    ours, theirs = (torch.tensor(losses(tmp_path / name)) for name in ("low", "torch"))
    assert theirs[:5].mean() - theirs[-5:].mean() > 0.3
    assert (ours - theirs).mean().abs() < 0.005
    assert 0 < (ours - theirs).abs().max() < 0.05

    checkpoints = tmp_path / "low" / "checkpoints"
    halfway, end = (checkpoints / f"step-{step:08d}" for step in (20, 40))
    after = checkpoint_tensors(end)
    parameters = sum(t.numel() for name, t in after.items() if name.startswith("weights/"))
    assert sum(t.nbytes for t in after.values()) + 2 * parameters < 6.25 * parameters
    assert {t.dtype for t in after.values()} == {torch.bfloat16, torch.uint8, torch.float32}

    resumed = (*low, *zero, "--resume", halfway)
    trained(
        (tmp_path / "resumed", None, (*one, *resumed, *saves)),
        (tmp_path / "two", 2, (*two, *resumed)),
    )
    again = checkpoint_tensors(tmp_path / "resumed" / "checkpoints" / end.name)
    assert again.keys() == after.keys()
    assert all(torch.equal(again[name], after[name]) for name in after)
    apart = (torch.tensor(losses(tmp_path / "two")) - ours)[20:].abs()
    assert apart[0] < 1e-4 and apart.max() < 0.02


def test_gemini_goes_on_to_the_last_bit(tmp_path, small_model):
    """Two processes of low_level_zero, and from their fourth step on of gemini, which have half of
    Adam in host memory, cut elsewhere: the same weights and moments after eight, in 6 bytes a
    parameter. (Clipped, they would differ by the last bits of the norm.)"""
    common = ("--optim", "adamw_anyprecision", "--batch_size", 2, "--max_norm", 0)
    common += ("--max_train_steps", 8, "--save_steps", 4)
    gemini = ("--plugin", "gemini", "--offload_optim_frac", 0.5)
    first, then = tmp_path / "zero", tmp_path / "gemini"
    trained((first, 2, ("--plugin", "low_level_zero", *common)))
    middle, end = (f"checkpoints/step-{step:08d}" for step in (4, 8))
    trained((then, 2, (*gemini, *common, "--resume", first / middle)))
    wanted, found = checkpoint_tensors(first / end), checkpoint_tensors(then / end)
    assert found.keys() == wanted.keys() and losses(then) == losses(first)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    weights = {name: t for name, t in found.items() if name.startswith("weights/")}
    parameters = sum(t.numel() for t in weights.values())
    assert sum(t.nbytes for t in found.values()) == 6 * parameters
    assert any(
        not torch.equal(t, checkpoint_tensors(first / middle)[n]) for n, t in weights.items()
    )


@pytest.mark.parametrize(
    "flags, line",
    [
        ("--plugin gemini", "is for torch_ddp and low_level_zero, not for gemini"),
        ("--plugin hybrid_parallel", "not for hybrid_parallel"),
        ("--plugin torch_ddp_fp16", "not for torch_ddp_fp16"),
        ("--precision fp32", "updates bf16 weights: use --precision bf16"),
        ("--lora_r 4", "is not for LoRA"),
    ],
)
def test_refused(flags, line):
    """And adamw_anyprecision of one plugin less."""
    given = train_parser().parse_args(["--optim", "adamw_8bit", *flags.split()])
    with pytest.raises(UserError, match=line):
        resolve(given, "cpu", False)
    given = given.but(optim="adamw_anyprecision")
    if given.plugin == "gemini":
        assert resolve(given, "cpu", False).precision == "bf16"
    else:
        with pytest.raises(UserError, match=line.replace(" and low_level_zero", ".*gemini")):
            resolve(given, "cpu", False)


def test_refused_where_blocks_would_be_cut():
    """Three processes would cut a matrix of 2^14 elements within 256 of them; two and 64 do not."""
    plan = resolve(
        train_parser().parse_args("--plugin low_level_zero --optim adamw_8bit".split()), "cpu", 0
    )
    model = InitialWeights(meta_model(load_config(SAMPLE_MODEL)), 42, torch.device("cpu"))
    for processes in (1, 2, 64):
        low_memory.check_cuts(plan.but(dp_size=processes), model)
    with pytest.raises(UserError, match="3 processes of low_level_zero would cut"):
        low_memory.check_cuts(plan.but(dp_size=3), model)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [16, 8])
def test_the_kernel_on_a_gpu(bits):
    """Is the update of a CPU, but where the last bit of a division decides a rounding."""
    torch.manual_seed(0)
    ours = [new_held(torch.randn(n).bfloat16() * 0.02, bits) for n in (2**20, 9 * BLOCK)]
    theirs = [
        Held(**{k: getattr(v, "cuda", lambda v=v: v)() for k, v in vars(h).items()}) for h in ours
    ]
    one = torch.ones(())
    for step in range(1, 11):
        rates = torch.tensor([1e-4, 1 - 0.9**step, (1 - 0.999**step) ** 0.5, step])
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(len(a.weight)).bfloat16() * 1e-3
            b.grad = a.grad.cuda()
        low_bits.adamw(ours, one, rates, 0.9, 0.999, 1e-8, 0.1)
        low_bits.adamw(theirs, one.cuda(), rates.cuda(), 0.9, 0.999, 1e-8, 0.1)
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip((a.weight, *moments(a)), (b.weight, *moments(b)), strict=True):
            assert x.any() and torch.isclose(x.float(), y.cpu().float()).float().mean() > 0.99
