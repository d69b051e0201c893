"""What only a GPU can show; skipped without one."""

import math
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from opt.model.kernel_probe import WORK, has_fp8

from .conftest import REPO, SAMPLE_DATA, SAMPLE_MODEL, like_the_sample, losses, run, train

pytestmark = pytest.mark.gpu


def test_imports_touch_no_gpu():
    """Or every process of a node has a context, some hundred MiB, on the first GPU."""
    code = "import opt_train_demo, torch; print(torch.cuda.is_initialized())"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.stdout.split() == ["False"], done.stderr


def test_fused_loss_is_the_plain_loss():
    from opt.model.loss import fused_linear_cross_entropy

    torch.manual_seed(0)
    hidden = torch.randn(300, 64, device="cuda", requires_grad=True)
    weight = torch.randn(1003, 64, device="cuda", requires_grad=True)
    targets = torch.randint(0, 1003, (300,), device="cuda")
    targets[::7] = -100
    plain = F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction="sum")
    expected = torch.autograd.grad(plain, (hidden, weight))
    fused = fused_linear_cross_entropy(hidden, weight, targets)
    found = torch.autograd.grad(fused, (hidden, weight))
    assert math.isclose(fused.item(), plain.item(), rel_tol=1e-5)
    for a, b in zip(found, expected, strict=True):
        assert torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b) < 5e-3


CURVE = [
    "--dropout",
    "0",
    "--max_train_steps",
    "10",
    "--learning_rate",
    "1e-3",
    "--eval_fraction",
    "0",
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> list[float]:
    """The losses of ten steps in fp32, with padded rows."""
    output = tmp_path_factory.mktemp("reference")
    train(output, *CURVE, "--precision", "fp32", "--no-padding_free")
    return losses(output)


@pytest.mark.parametrize(
    "flags",
    [
        ["--plugin", "low_level_zero"],
        ["--plugin", "low_level_zero", "--no-padding_free"],
        ["--plugin", "gemini"],
        ["--plugin", "gemini", "--offload_optim_frac", "1"],
        [
            "--plugin",
            "gemini",
            "--offload_optim_frac",
            "0.5",
            "--batch_size",
            "16",
            "--gradient_accumulation_steps",
            "2",
        ],
        ["--plugin", "hybrid_parallel"],
        ["--plugin", "torch_ddp", "--compile"],
        ["--plugin", "gemini", "--compile"],
        ["--plugin", "torch_ddp", "--cuda_graph"],
        ["--plugin", "low_level_zero", "--cuda_graph", "--fused_loss"],
        [
            "--plugin",
            "low_level_zero",
            "--cuda_graph",
            "--batch_size",
            "16",
            "--gradient_accumulation_steps",
            "2",
        ],
        ["--plugin", "hybrid_parallel", "--cuda_graph", "--compile"],
        ["--plugin", "torch_ddp_fp16"],
        ["--plugin", "torch_ddp", "--fp8"],
        ["--plugin", "low_level_zero", "--fp8", "--compile"],
        ["--plugin", "low_level_zero", "--fp8", "--cuda_graph"],
        ["--plugin", "gemini", "--fp8"],
    ],
    ids=" ".join,
)
def test_loss_curve_on_a_gpu(tmp_path, reference, flags):
    """The same as torch_ddp's in fp32, within the noise of 16 bits, which fp8 adds 0.002 to (seen
    on a CPU)."""
    if "--fp8" in flags and not has_fp8(torch.device("cuda", 0)):
        pytest.skip("needs a GPU of compute capability 8.9 or later")
    done = train(tmp_path / "found", *CURVE, *flags)
    assert "kernels  " not in done.stdout  # Triton has built all that were needed
    found = losses(tmp_path / "found")
    assert len(found) == 10 and reference[-1] < reference[0] - 0.3
    assert found == pytest.approx(reference, abs=0.03)


@pytest.fixture(scope="module")
def like_galactica(tmp_path_factory) -> tuple:
    """A model without biases, whose norms have no weights; the losses of ten steps in fp32."""
    folder = tmp_path_factory.mktemp("galactica")
    config = {"enable_bias": False, "layer_norm_elementwise_affine": False}
    model = like_the_sample(folder / "model", **config, activation_function="gelu")
    given = ("--model_name_or_path", model)
    train(folder / "reference", *CURVE, *given, "--precision", "fp32", "--no-padding_free")
    return given, losses(folder / "reference")


@pytest.mark.parametrize(
    "flags",
    [
        ["--plugin", "low_level_zero", "--compile"],
        ["--plugin", "gemini", "--fused_loss"],
        ["--plugin", "hybrid_parallel", "--cuda_graph"],
        ["--plugin", "torch_ddp", "--fp8"],
    ],
    ids=" ".join,
)
def test_loss_curve_without_biases(tmp_path, like_galactica, flags):
    if "--fp8" in flags and not has_fp8(torch.device("cuda", 0)):
        pytest.skip("needs a GPU of compute capability 8.9 or later")
    given, expected = like_galactica
    done = train(tmp_path / "found", *CURVE, *given, *flags)
    assert "kernels  " not in done.stdout
    found = losses(tmp_path / "found")
    assert len(found) == 10 and expected[-1] < expected[0] - 0.3
    assert found == pytest.approx(expected, abs=0.03)


def test_adam_in_16_bits_in_host_memory(tmp_path):
    """The C kernel, and Triton's for what is on the GPU: the losses of low_level_zero, whose
    updates round alike."""
    found, common = {}, ("--optim", "adamw_anyprecision", "--max_norm", "0")
    for name, flags in (
        ("zero", ("--plugin", "low_level_zero")),
        ("host", ("--plugin", "gemini", "--offload_optim_frac", "1")),
        ("half", ("--plugin", "gemini", "--offload_optim_frac", "0.5")),
    ):
        done = train(tmp_path / name, *CURVE, *common, *flags)
        assert "kernels  " not in done.stdout
        found[name] = losses(tmp_path / name)
    assert found["zero"][-1] < found["zero"][0] - 0.3
    for name in ("host", "half"):
        assert found[name] == pytest.approx(found["zero"], abs=0.01)


def test_without_a_compiler(tmp_path, reference):
    """Triton can build nothing: the plan says so, and PyTorch's operations give the same losses."""
    env = {"CC": "/nowhere/cc", "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    done = train(tmp_path / "found", *CURVE, "--plugin", "low_level_zero", "--fused_loss", env=env)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("  kernels  "))
    needed = ("update", "loss", "attention", "residual")
    assert all(WORK[name] in line for name in needed) and "37 %" in line
    assert losses(tmp_path / "found") == pytest.approx(reference, abs=0.03)


@pytest.mark.parametrize(
    "flags",
    [
        ["--plugin", "low_level_zero"],
        ["--plugin", "low_level_zero", "--compile"],
        [
            "--plugin",
            "low_level_zero",
            "--zero_stage",
            "2",
            "--batch_size",
            "8",
            "--gradient_accumulation_steps",
            "2",
        ],
        ["--plugin", "hybrid_parallel", "--zero_stage", "1"],
    ],
    ids=" ".join,
)
def test_loss_curve_of_two_processes_on_one_gpu(tmp_path, reference, flags):
    """Gradients come together beside backward, parts of the weights after the update. (A graph
    records no collective of gloo's.)"""
    rows = [] if "--batch_size" in flags else ["--batch_size", "16"]
    train(tmp_path, *CURVE, *flags, *rows, script=REPO / "tests" / "gloo_worker.py", nproc=2)
    assert losses(tmp_path) == pytest.approx(reference, abs=0.03)


def test_a_cuda_graph_records_no_collective(tmp_path):
    """Two processes under torch_ddp reduce gradients within backward."""
    given = [
        "--model_name_or_path",
        SAMPLE_MODEL,
        "--dataset",
        SAMPLE_DATA,
        "--plugin",
        "torch_ddp",
        "--cuda_graph",
        "--dry_run",
    ]
    done = run(REPO / "opt_train_demo.py", *given, env={"WORLD_SIZE": "2"})
    assert done.returncode == 2 and "low_level_zero" in done.stderr


def test_step_along_nan_is_skipped_on_the_device():
    """torch_ddp decides it without asking the device; the step after it is taken."""
    from opt.colossal.adam import HybridAdam, decay_groups

    layer = torch.nn.Linear(64, 64).cuda()
    adam = HybridAdam(decay_groups(layer, 0.1), lr=1e-2)
    states = []
    for poison in (0.0, math.nan, math.inf, 0.0):
        layer(torch.ones(4, 64, device="cuda")).sum().backward()
        layer.weight.grad[3, 5] += poison
        adam.step(grad_norm=adam.grad_norm(), max_norm=1.0)
        adam.zero_grad()
        states.append(
            [
                t.clone()
                for p in layer.parameters()
                for t in (p, adam.state[p]["exp_avg"], adam.state[p]["exp_avg_sq"])
            ]
        )
    assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(*states[:3], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(*states[2:], strict=True)) and all(
        t.isfinite().all() for t in states[3]
    )


@pytest.mark.parametrize(
    "flags",
    [
        ["--plugin", "torch_ddp"],
        ["--plugin", "low_level_zero"],
        ["--plugin", "gemini"],
        ["--plugin", "gemini", "--offload_optim_frac", "1"],
    ],
    ids=" ".join,
)
def test_resume_on_a_gpu(tmp_path, flags):
    """Dropout on: the device's random numbers go on where they were."""
    common = [
        *flags,
        "--max_train_steps",
        "12",
        "--learning_rate",
        "1e-3",
        "--eval_fraction",
        "0",
        "--save_steps",
        "6",
        "--no_save",
    ]
    train(tmp_path / "through", *common)
    train(
        tmp_path / "resumed",
        *common,
        "--resume",
        tmp_path / "through" / "checkpoints" / "step-00000006",
    )
    assert losses(tmp_path / "resumed") == pytest.approx(losses(tmp_path / "through"), abs=2e-3)
