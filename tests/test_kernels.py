"""opt/kernels.py on GPUs that are not there: Triton compiles for them on any host. What the kernels compute only a GPU can show."""

import json
import os
import subprocess
import sys
from importlib import metadata

import pytest

from .conftest import REPO, finish, start

TRITONS = ("3.1.0", "3.6.0")  # of the oldest and the newest torch that requirements.txt allows
# KiB that a program may ask for, by compute capability: NVIDIA's CUDA C++ Programming Guide, "technical specifications per compute
# capability".
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227}
KERNELS = {"_adamw", "_sums_of_squares", "_cross_entropy", "_short_attention", "_short_attention_backward"}


def installed_triton() -> str | None:
    """Its version; a torch for CPUs alone comes without one."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


def triton_on_path(version: str, cache) -> dict:
    """The environment in which Python imports this Triton, without the torch that belongs to it; fetched where it is not installed."""
    if installed_triton() == version:
        return {"PYTHONPATH": str(REPO)}
    folder = cache.mkdir("triton") / f"{version}-python{sys.version_info.major}.{sys.version_info.minor}"
    if not folder.exists():
        part = folder.with_suffix(".part")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--upgrade"]
        done = subprocess.run([*pip, "--target", str(part), f"triton=={version}"], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"Triton {version} is not installed here, and pip cannot fetch it: {done.stderr.strip()[-200:]}")
        part.rename(folder)
    return {"PYTHONPATH": f"{REPO}{os.pathsep}{folder}"}


@pytest.fixture(scope="module")
def workers(request, tmp_path_factory):
    """The processes that compile, one for each Triton, started together: a core is busy with one for a minute and a half."""
    started = {}

    def worker(version):
        if version not in started:
            # A folder of its own: what an earlier run has compiled would be found there.
            env = {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))} | triton_on_path(version, request.config.cache)
            started[version] = start(REPO / "tests" / "compile_worker.py", *SHARED_MEMORY, env=env)
        return started[version]

    yield worker
    for process in started.values():
        process.kill()
        process.wait()


@pytest.fixture(scope="module", params=TRITONS)
def compiled(request, workers) -> list[dict]:
    """What compile_worker.py says of each kernel, under a Triton."""
    for version in TRITONS:
        try:
            workers(version)
        except pytest.skip.Exception:
            if version == request.param:
                raise
    done = finish(workers(request.param), timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    triton, *found = map(json.loads, done.stdout.splitlines())
    assert triton == {"triton": request.param}
    return found


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_every_kernel_is_built(compiled, capability):
    """To machine code, within the shared memory that such a GPU has."""
    found = [kernel for kernel in compiled if kernel["capability"] == capability]
    assert not [kernel for kernel in found if "error" in kernel]
    assert {kernel["kernel"] for kernel in found} == KERNELS
    sizes = {(kernel["call"].get("longest"), kernel["call"].get("head_dim")) for kernel in found}
    assert sizes >= {(64, 64), (128, 64), (64, 128)}  # heads of all published models but 2.7b's, which are 80 wide
    assert not [kernel for kernel in found if not kernel["bytes"] or kernel["shared"] > SHARED_MEMORY[capability] * 1024]


def test_the_update_moves_16_bytes_at_a_time(compiled):
    """Of tensors that lie so: a program's 8 warps move 8 elements a thread, of gradients, fp32 state and 16-bit weights."""
    found = [kernel for kernel in compiled if kernel["call"].get("aligned")]
    assert len(found) == len(SHARED_MEMORY) * 3 * (1 + 3)  # norm and update of 3 dtypes, the update with 3 kinds of output
    assert not [kernel for kernel in found if kernel.get("vectors") != 8 * kernel["call"]["bytes_an_element"] // 16]
