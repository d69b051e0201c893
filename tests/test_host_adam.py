"""Adam in host memory (gemini, --offload_optim_frac): AdamW's updates, in 12 bytes a parameter; with
--optim adamw_anyprecision in 6, the updates of low_bits."""

from types import SimpleNamespace

import pytest
import torch

from opt.colossal import host_adam, host_kernel
from opt.colossal.adam import MOMENTS, HybridAdam, rates_of
from opt.colossal.cpu import CpuDevice
from opt.colossal.low_memory import LowMemoryAdam
from opt.model import low_bits
from opt.model.low_bits import Held
from opt.train.memory import GIB

from .conftest import REPO, SAMPLE_DATA, finish_measured, losses, start, wide_model


class Chunks:
    """Three of Gemini's, of 5,000 elements of which the last one lacks 700, with parameters that
    begin anywhere; and what HostAdam asks of its optimizer and model."""

    def __init__(self, grads_apart: bool, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        self.sizes = [[1300, 7, 3693], [5000], [1, 4299]]
        self.chunks = []
        for number, size in enumerate((5000, 5000, 4300)):
            weights = torch.randn(5000, generator=generator).to(dtype)
            chunk = SimpleNamespace(
                valid_end=size,
                shard_size=5000,
                count_id=number,
                dtype=torch.bfloat16,
                payload=torch.full((5000,), 7.0, dtype=torch.bfloat16),
                paired_chunk=SimpleNamespace(cpu_shard=weights),
                grad_chunk=SimpleNamespace(payload=torch.empty(5000, dtype=torch.bfloat16)),
            )
            self.chunks.append(Hashable(chunk))
        keys, self.ranges, self.of = [], {}, {}
        for chunk, sizes in zip(self.chunks, self.sizes, strict=True):
            begin = 0
            for size in sizes:
                keys.append(torch.nn.Parameter(torch.empty(0)))
                self.ranges[keys[-1]], self.of[keys[-1]] = (begin, begin + size), chunk
                begin += size
        self.keys, self.grads_apart = keys, grads_apart
        groups = [
            {"params": keys[::2], "weight_decay": 0.1},
            {"params": keys[1::2], "weight_decay": 0.0},
        ]
        if dtype == torch.float32:
            self.adam = HybridAdam(groups, lr=1e-2)
        else:
            self.adam = LowMemoryAdam(groups, lr=1e-2, bits=16)
            # One of them is a piece of a parameter, from its 77th element on
            pieces = [
                SimpleNamespace(key=key, name=str(n), start=77 * (n == 2))
                for n, key in enumerate(keys)
            ]
            self.adam.know(pieces, seed=42)
        self.asked = []
        self.manager = SimpleNamespace(
            reuse_fp16_chunk=not grads_apart, access_chunk=lambda chunk, _: self.asked.append(chunk)
        )
        optimizer = SimpleNamespace(
            optim=self.adam,
            param_to_range=self.ranges,
            param_to_chunk16=self.of,
            chunk16_set=set(self.chunks),
        )
        self.adam.host_adam = host_adam.HostAdam(
            SimpleNamespace(chunk_manager=self.manager), optimizer
        )

    def step(self, grads: list[torch.Tensor], **options) -> None:
        """As GeminiOptimizer does it: `grads` stand where backward leaves them."""
        for key, grad in zip(self.keys, grads, strict=True):
            chunk, (begin, end) = self.of[key], self.ranges[key]
            place = chunk.grad_chunk.payload if self.grads_apart else chunk.payload
            place[begin:end] = grad
            key.data = place[begin:end]
            key.grad = key.data
            key.data = chunk.paired_chunk.cpu_shard[begin:end]
        self.adam.step(**options)
        self.adam.zero_grad(set_to_none=True)
        for chunk in self.chunks:
            chunk.optim_update()

    def weights(self) -> list[torch.Tensor]:
        return [
            self.of[key].paired_chunk.cpu_shard[slice(*self.ranges[key])].clone()
            for key in self.keys
        ]


class Hashable(SimpleNamespace):
    """By identity, as a Chunk is."""

    def __init__(self, other):
        super().__init__(**vars(other))

    __hash__ = object.__hash__
    __eq__ = object.__eq__


KERNELS = pytest.mark.parametrize("in_c", [False, True], ids=["torch", "C"])


@KERNELS
@pytest.mark.parametrize("grads_apart", [False, True], ids=["in place", "accumulated"])
def test_updates_are_those_of_adamw(monkeypatch, grads_apart, in_c):
    """Six steps, one of them skipped, whose chunks pass through the buffers in several slices; half
    of them asked for chunk by chunk, as forward does, in another order than theirs."""
    monkeypatch.setattr(host_adam, "get_accelerator", CpuDevice)
    monkeypatch.setattr(host_adam, "SLICE", 1024)
    ours = Chunks(grads_apart)
    ours.adam.host_adam.kernel = host_kernel.load(torch.float32) if in_c else None
    leaves = [weights.clone().requires_grad_() for weights in ours.weights()]
    groups = [
        {"params": leaves[::2], "weight_decay": 0.1},
        {"params": leaves[1::2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for step in range(6):
        grads = [torch.randn(w.shape, generator=generator).bfloat16() for w in leaves]
        is_skipped = step == 3
        ours.step(grads, div_scale=4.0, grad_norm=float("inf") if is_skipped else 1.0)
        if not is_skipped:
            for leaf, grad in zip(leaves, grads, strict=True):
                leaf.grad = grad.float() / 4
            reference.step()
        for group in (*ours.adam.param_groups, *reference.param_groups):
            group["lr"] *= 0.9  # the schedule goes on before the update is made
        if step % 2:
            ours.adam.host_adam.finish()
        else:
            for number in (1, 0, 2):
                ours.manager.access_chunk(ours.chunks[number])
                rounded = ours.chunks[number].paired_chunk.cpu_shard.bfloat16()
                end = ours.chunks[number].valid_end
                assert torch.equal(ours.chunks[number].payload[:end], rounded[:end])
        for key, weights, leaf in zip(ours.keys, ours.weights(), leaves, strict=True):
            torch.testing.assert_close(weights, leaf.detach(), rtol=0, atol=2e-6)
            begin, end = ours.ranges[key]
            assert torch.equal(ours.of[key].payload[begin:end], weights.bfloat16())
    assert ours.asked == [ours.chunks[number] for number in (1, 0, 2)] * 3


@KERNELS
def test_in_16_bits_updates_are_those_of_low_bits(monkeypatch, in_c):
    """To the last bit, wherever slices cut a parameter; in C but for a rounding in some thousand,
    which the last bit of the arithmetic decides: it differs by one step of bf16 then."""
    monkeypatch.setattr(host_adam, "get_accelerator", CpuDevice)
    monkeypatch.setattr(host_adam, "SLICE", 1024)
    ours = Chunks(False, torch.bfloat16)
    ours.adam.host_adam.kernel = host_kernel.load(torch.bfloat16) if in_c else None
    wanted = []
    for number, weights in enumerate(ours.weights()):
        moments, seed = [torch.zeros_like(weights) for _ in MOMENTS], f"{number}"
        seed, start = low_bits.parameter_seed(42, seed), 77 * (number == 2)
        wanted.append(Held(None, weights, *moments, None, None, seed, start))
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 5):
        grads = [torch.randn(w.weight.shape, generator=generator).bfloat16() for w in wanted]
        ours.step(grads, div_scale=4.0, grad_norm=1.0)
        ours.adam.host_adam.finish()
        for number, (held, grad) in enumerate(zip(wanted, grads, strict=True)):
            held.grad = grad
            rates, decay = rates_of(1e-2, 0.9, 0.999, step), 0.1 * (number % 2 == 0)
            low_bits.adamw([held], torch.tensor(4.0), rates, 0.9, 0.999, 1e-8, decay)
        found = [
            [weights, *(ours.adam.state[key][name] for name in MOMENTS)]
            for key, weights in zip(ours.keys, ours.weights(), strict=True)
        ]
        for key, held, tensors in zip(ours.keys, wanted, found, strict=True):
            begin, end = ours.ranges[key]
            assert torch.equal(ours.of[key].payload[begin:end], tensors[0])
            for a, b in zip(tensors, (held.weight, held.exp_avg, held.exp_avg_sq), strict=True):
                assert b.any()
                others = a.view(torch.int16).int() - b.view(torch.int16).int()
                assert others.count_nonzero() <= (2 + len(a) / 1000) * in_c
                b.copy_(a)  # what differs once is not to add up


def test_without_a_compiler_a_line_says_so(monkeypatch, capsys):
    assert host_kernel.load(torch.float32)
    for path in ("/nowhere", "/bin/false"):
        host_kernel.load.cache_clear()
        monkeypatch.setattr(host_kernel.shutil, "which", lambda name, path=path: path)
        assert host_kernel.load(torch.bfloat16) is None
        assert capsys.readouterr().out.startswith("  kernels   PyTorch's own operations for Adam")
    host_kernel.load.cache_clear()


@pytest.mark.parametrize("fraction", [0, 0.3, 0.5, 1])
def test_the_fraction_that_was_asked_for_is_on_the_host(monkeypatch, fraction):
    """[C30] ColossalAI 0.5.0 offloads all from a few percent on."""
    monkeypatch.setattr(host_adam, "_close_chunk", lambda chunk: None)
    close = host_adam.close_chunk(fraction)
    sizes = [100, 60, 64, 64, 61, 64, 64, 58, 64, 64]
    chunks = []
    for size in sizes:
        for is_updated in (False, True):
            chunk = SimpleNamespace(
                **{
                    "dtype": torch.bfloat16,
                    "is_updated": is_updated,
                    "keep_gathered": False,
                    "utilized_size": size,
                },
                **{"shard_size": 100, "valid_end": size, "cpu_shard": None, "cuda_shard": 0},
            )
            close(chunk)
            chunks.append(chunk)
    on_host = [host_adam.is_on_host(chunk) for chunk in chunks]
    assert not any(on_host[::2])  # what forward works with
    share = sum(s for s, there in zip(sizes, on_host[1::2], strict=True) if there) / sum(sizes)
    assert share == pytest.approx(fraction, abs=0.08 if 0 < fraction < 1 else 0)


def test_nothing_is_there_twice(tmp_path):
    """From the start to the checkpoint and the saved model: 12 bytes a parameter, beside them 2 of
    what would be on a GPU, and a chunk or two of these on their way. A copy of the state for a
    checkpoint would be 12 more."""
    model, number = wide_model(tmp_path / "model")
    process = start(
        *(REPO / "opt_train_demo.py", "--model_name_or_path", model, "--dataset", SAMPLE_DATA),
        *("--plugin", "gemini", "--offload_optim_frac", 1, "--max_train_steps", 2),
        *("--batch_size", 2, "--max_length", 16, "--eval_fraction", 0, "--save_steps", 2),
        *("--max_train_samples", 8, "--prompt", "A", "--output_path", tmp_path / "out"),
    )
    done, peak = finish_measured(process, "RssAnon", 120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(losses(tmp_path / "out")) == 2
    assert (tmp_path / "out" / "checkpoints" / "step-00000002").is_dir()
    most = (peak - 0.6 * GIB) / number
    print(f"{most:.1f} bytes a parameter of {number / 1e6:.0f} M")
    assert 12 < most < 18
