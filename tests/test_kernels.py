"""opt/model/kernels.py on GPUs that are not there: Triton compiles for them on any host. What the
kernels compute only a GPU can show."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from importlib import metadata

import pytest
import torch
from transformers import OPTConfig

from args import resolve, train_parser
from opt.colossal.processes import Place
from opt.model import kernel_probe
from opt.model.kernel_probe import has_kernel, has_short_attention
from opt.train import plan

from .conftest import REPO, SAMPLE_MODEL, finish, start

TRITONS = ("3.1.0", "3.6.0")  # of the oldest and the newest torch that requirements.txt allows
# KiB that a program may ask for, by compute capability: NVIDIA's CUDA C++ Programming Guide,
# "technical specifications per compute capability".
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227}
# The narrowest and the newest: what is built for these two is built for those between them, which
# have the instructions of the first, and as much shared memory or more.
GPUS = ((86, 90), pytest.param((80, 89), marks=pytest.mark.long))
KERNELS = {
    "_adamw",
    "_adamw_low",
    "_cross_entropy",
    "_part_of_rows",
    "_cross_entropy_of_parts",
    "_short_attention",
    "_short_attention_backward",
    "_add",
    "_add_norm_backward",
}
OF_FP8 = {"_largest", "_to_fp8"}  # from Ada on


def installed_triton() -> str | None:
    """Its version; a torch for CPUs alone comes without one."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


def triton_on_path(version: str, cache) -> dict:
    """The environment in which Python imports this Triton, without the torch that belongs to it;
    fetched where it is not installed."""
    if installed_triton() == version:
        return {"PYTHONPATH": str(REPO)}
    folder = (
        cache.mkdir("triton") / f"{version}-python{sys.version_info.major}.{sys.version_info.minor}"
    )
    if not folder.exists():
        part = folder.with_suffix(".part")
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--upgrade",
        ]
        done = subprocess.run(
            [*pip, "--target", str(part), f"triton=={version}"], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(
                f"Triton {version} is not installed here, and pip cannot fetch it: "
                f"{done.stderr.strip()[-200:]}"
            )
        part.rename(folder)
    return {"PYTHONPATH": f"{REPO}{os.pathsep}{folder}"}


@pytest.fixture(scope="module")
def workers(request, tmp_path_factory):
    """The processes that compile, one for each Triton, started together: a core is busy with one
    for most of a minute."""
    started = {}

    def worker(version, gpus):
        if (version, gpus) not in started:
            # A folder of its own: what an earlier run has compiled would be found there.
            env = {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))} | triton_on_path(
                version, request.config.cache
            )
            process = start(REPO / "tests" / "compile_worker.py", *gpus, env=env)
            started[version, gpus] = process
        return started[version, gpus]

    yield worker
    for process in started.values():
        process.kill()
        process.wait()


@pytest.fixture(scope="module", params=GPUS, ids=lambda gpus: "{} and {}".format(*gpus))
def gpus(request) -> tuple[int, ...]:
    """Compute capabilities that are compiled for."""
    return request.param


@pytest.fixture(scope="module", params=TRITONS)
def compiled(request, workers, gpus) -> list[dict]:
    """What compile_worker.py says of each kernel, under a Triton."""
    for version in TRITONS:
        try:
            workers(version, gpus)
        except pytest.skip.Exception:
            if version == request.param:
                raise
    done = finish(workers(request.param, gpus), timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    triton, *found = map(json.loads, done.stdout.splitlines())
    assert triton == {"triton": request.param}
    return found


@pytest.mark.parametrize("which", (0, 1))
def test_every_kernel_is_built(compiled, gpus, which):
    """To machine code, within the shared memory that such a GPU has."""
    capability = gpus[which]
    found = [
        kernel
        for kernel in compiled
        if kernel["capability"] == capability and isinstance(kernel["call"], dict)
    ]
    assert not [kernel for kernel in found if "error" in kernel]
    there = KERNELS | (OF_FP8 if capability >= 89 else set())
    assert {kernel["kernel"] for kernel in found} == there
    sizes = {(kernel["call"].get("longest"), kernel["call"].get("head_dim")) for kernel in found}
    # Heads of all published models but 2.7b's, which are 80 wide
    assert sizes >= {
        (64, 64),
        (128, 64),
        (64, 128),
    }
    assert not [
        kernel
        for kernel in found
        if not kernel["bytes"] or kernel["shared"] > SHARED_MEMORY[capability] * 1024
    ]


def test_the_update_moves_16_bytes_at_a_time(compiled, gpus):
    """Of tensors that lie so: a program's 8 warps move 8 elements a thread, of gradients, fp32
    state and 16-bit weights."""
    found = [
        kernel
        for kernel in compiled
        if isinstance(kernel["call"], dict) and kernel["call"].get("aligned")
    ]
    # Of 3 dtypes with 3 kinds of output; of bf16 weights with moments of 8 and 16 bits
    assert len(found) == len(gpus) * (3 * 3 + 2)
    assert not [
        kernel
        for kernel in found
        if kernel.get("vectors") != 8 * kernel["call"]["bytes_an_element"] // 16
    ]


def test_what_a_trial_builds_the_run_uses(compiled):
    """Or the start of each run on a GPU would take longer, for kernels that it never calls."""
    built = {
        call: {kernel["kernel"] for kernel in compiled if kernel["call"] == call and kernel["new"]}
        for call in ("trial", "run")
    }
    assert built == {"trial": KERNELS | OF_FP8, "run": set()}


def interpreted(code: str, request) -> subprocess.CompletedProcess:
    """`code` with Triton's interpreter in its kernels' place, which needs no GPU: 3.6's, since
    3.1's reads nothing right beside numpy 2."""
    env = triton_on_path(TRITONS[-1], request.config.cache)
    env |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    streams = {"capture_output": True, "text": True, "timeout": 300}
    return subprocess.run(command, cwd=REPO, env=os.environ | env, **streams)


QUANTIZE = """
import torch
from opt.model import float8, kernels

torch.manual_seed(0)
for rows, columns, dtype in (
    (16, 16, torch.bfloat16), (160, 272, torch.bfloat16), (336, 144, torch.float32)
):
    for eight in (float8.FORWARD, float8.BACKWARD):
        matrix = (torch.randn(rows, columns) * 3).to(dtype)
        found = kernels.quantize(matrix, eight, True, True)
        wanted = float8.quantize(matrix, eight, True, True)
        near, turned, scale, sums = (f.float() - w.float() for f, w in zip(found, wanted))
        assert scale == 0 and sums.abs().max() < 1e-3
        assert torch.equal(found[1].t().float(), found[0].float())
        # The interpreter rounds ties its own way, and what is rounded up to a power of 2 to half
        # of that: all others are the same.
        own = torch.frexp(wanted[0].float()).mantissa.abs() == 0.5
        step = wanted[0].float().abs() / (8 if eight is float8.FORWARD else 4)
        assert (near.abs() <= step + 1e-2)[~own].all()
        assert (near != 0).float().mean() < 0.1
for poison in (float("inf"), float("nan")):
    matrix[3, 5] = poison
    assert kernels.quantize(matrix, float8.BACKWARD, False, False)[0][3, 5].isnan()
print("all")
"""


def test_quantization_is_pytorchs(request):
    """Both formats, by rows and by columns; an infinity or a nan does not become finite."""
    done = interpreted(QUANTIZE, request)
    assert done.stdout.split() == ["all"], done.stderr[-2000:]


# ---- where one cannot be built (opt/model/kernel_probe.py)


@pytest.fixture
def broken(monkeypatch):
    """A GPU, as far as kernel_probe looks, and the set of kernels that Triton does not build for
    it."""
    names = set()

    def trial(name):
        def run(*_):
            if name in names:
                raise ValueError("at 3:1:\n\n    tl.load(x)\n            ^\nno such instruction")

        return run

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernel_probe, "_TRIALS", {name: trial(name) for name in kernel_probe.WORK})
    monkeypatch.setattr(kernel_probe, "_told", set())
    kernel_probe._obstacle.cache_clear()
    yield names
    kernel_probe._obstacle.cache_clear()


GPU = Place(0, 1, 0, torch.device("cuda", 0))


def plan_line(flags: str, longest: int | None = 60) -> str | None:
    """What the plan of a run of the sample model says of kernels."""
    args = resolve(train_parser().parse_args(flags.split()), "cuda", True)
    return plan.missing_kernels(args, GPU, OPTConfig.from_pretrained(SAMPLE_MODEL), longest)


def test_a_kernel_falls_away_alone(broken, capsys):
    broken.add("update")
    line = plan_line("--plugin low_level_zero --fused_loss")
    assert (
        "the update, where" in line
        and "no such instruction" in line
        and "alone was not measured" in line
    )
    assert not has_kernel("update", GPU.device, torch.bfloat16, torch.bfloat16)
    assert has_kernel("loss", GPU.device, torch.bfloat16, 2048)
    assert has_short_attention(GPU.device, torch.bfloat16, 32, 60)
    assert not capsys.readouterr().out  # the plan has told it


def test_all_kernels_away(broken):
    broken.update(kernel_probe.WORK)
    line = plan_line("--plugin low_level_zero --fused_loss")
    found = {name for name, work in kernel_probe.WORK.items() if work in line}
    assert found == {"update", "loss", "attention", "residual"}
    assert line.count("no such instruction") == 1 and "about 8 % " in line and "37 % " in line


@pytest.mark.parametrize(
    "flags, longest, needed",
    [
        ("--plugin low_level_zero --fused_loss", 60, "update loss attention residual"),
        ("--plugin low_level_zero", None, "update residual"),
        (
            "--plugin low_level_zero --fused_loss",
            200,
            "update loss residual",
        ),  # FlashAttention's rows
        ("--plugin torch_ddp --precision fp32", 60, "update"),
        ("--plugin torch_ddp --optim adamw_8bit", None, "update_low residual"),
        ("--plugin gemini", 60, "update attention residual"),
        ("--plugin gemini --offload_optim_frac 1", 60, "attention residual"),
        ("--plugin hybrid_parallel", None, "update residual"),
    ],
)
def test_the_plan_tries_what_the_run_needs(broken, flags, longest, needed):
    broken.update(kernel_probe.WORK)
    line = plan_line(flags, longest)
    assert [name for name, work in kernel_probe.WORK.items() if work in line] == needed.split()


def test_a_kernel_that_the_plan_left_out(broken, capsys):
    """One line, however often it is asked for."""
    broken.add("loss")
    assert not any(
        has_kernel("loss", GPU.device, dtype, 2048)
        for dtype in (torch.float32, torch.float16)
        for _ in range(3)
    )
    assert (
        capsys.readouterr().out.count("kernels   PyTorch's own operations for the fused loss") == 1
    )


def test_nothing_is_said_where_nothing_is_missing(broken):
    assert plan_line("--plugin low_level_zero --fused_loss") is None


def test_a_cpu_imports_no_triton():
    """And has nothing to say: PyTorch's operations are what a CPU runs."""
    code = (
        "import sys, torch; from opt.model.kernel_probe import *; print(has_kernel('norm', "
        "torch.device('cpu'), torch.float32), 'triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr
