"""docs/workarounds.md: each fault, on the library as it is; and its ids against the code's.

A test that turns red here, `XPASS(strict)`, is good news: the library is mended, and the
workaround can go, with its row and its id.
"""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version

import pytest

from .conftest import REPO, finish

# What is seen of each fault; if something else goes wrong, the test is broken.
SEEN = {
    "colossalai": {
        "F1": "CUDA_DEVICE_MAX_CONNECTIONS",
        "F2": "capability",
        "F3": "apex|tensornvme",
        "F4": "torch<=2.5.1",
        "F5": "not supported for cpu",
        "F6": "get_rng_state.. takes 0",
        "F7": "device is required",
        "F8": "HCCL",
        "F9": "AssertionError:.*chunk.py",
        "F10": "the loss is nan",
        "F11": "those of the 16-bit weights",
        "F12": "it is 512",
        "F13": "65536.0, not 131072",
        "F14": "No usable kernel found for CPUAdamLoader",
        "F15": "in the available list",
        "F16": "first moment is 0.1000",
        "F17": r"1 \+ 1 is 3",
        "F18": "given back while it is under way",
        "F20": "of an evaluation",
        "F21": "Unsupported",
        "F22": "ColoTensor",
        "F23": "it is not",
        "F24": "abstract class BF16MixedPrecision",
        "F25": "not scaled",
        "F26": "KeyError: 'sdpa'",
        "F27": "No usable kernel found for FlashAttention",
        "F28": "Expected a cuda device",
        "F29": r"\d\d lines",
        "F30": "NoneType",
        "F31": r"\(1, 8, 4\) comes of \(1, 16, 4\)",
        "F54": "the embedding is the head",
        "F57": "no group any more",
        "F58": "they are still there",
    },
    "others": {
        "F32": "0:30:00",
        "F59": "unexpected pos",
        "F33": "^RuntimeError.*can't allocate memory",
        "F34": "^RuntimeError.*(Connection|closed|reset)",
        "F35": "exit code 1",
        "F52": "exit code -10",
        "F39": "element_ty is a constexpr",
        "F40": "it is not",
        "F41": "gets eager attention",
        "F42": "torchvision::nms",
        "F43": "mode is 600",
        "F44": "SafetensorError",
        "F45": "2 s",
        "F46": "no weights",
        "F47": r"\[7, 42, None, 'b'\]",
        "F48": "first column is",
        "F49": "it is read as",
        "F50": "surrogate",
        "F55": "not counted",
    },
}
# Mended in a version that requirements.txt allows too
MENDED = {"F39", "F55"} if tuple(map(int, version("torch").split(".")[:2])) > (2, 5) else set()
ID = re.compile(r"\[([FC]\d+)\]")


class Fault(Exception):
    """The library is as wrong as docs/workarounds.md says."""


def _cases():
    for library, ids in SEEN.items():
        for name in ids:
            reason = f"[{name}] docs/workarounds.md"
            mark = pytest.mark.xfail(strict=True, raises=Fault, reason=reason)
            yield pytest.param(library, name, id=name, marks=[] if name in MENDED else mark)


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[str, dict[str, str | None]]:
    """By library, what each function has seen; the two are run side by side."""
    folder = tmp_path_factory.mktemp("faults")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    started = {}
    for library in SEEN:
        command = [sys.executable, REPO / "tests" / f"faults_of_{library}.py", folder / library]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started[library] = subprocess.Popen(command, cwd=folder, env=environment, **streams)
    ended = {library: finish(process, 600) for library, process in started.items()}
    for done in ended.values():
        assert done.returncode == 0, done.stdout[-3000:]
    return {library: json.loads((folder / library).read_text()) for library in SEEN}


@pytest.mark.parametrize(("library", "name"), _cases())
def test_fault(seen, library, name):
    """What is right does not happen. XPASS: it does, and the workaround can go."""
    what = seen[library][name]
    if what is not None:
        if not re.search(SEEN[library][name], what):
            pytest.fail(f"not the fault, but {what}")
        raise Fault(what)


def test_every_fault_is_run(seen):
    assert {library: set(run) for library, run in seen.items()} == {
        library: set(ids) for library, ids in SEEN.items()
    }


def test_ids_and_rows():
    """What the code carries has a row, and the other way round; a fault has a test, or its row says
    why there is none."""
    files = [f for kind in ("*.py", "*.sh", "requirements*.txt") for f in REPO.glob(kind)]
    files += (REPO / "opt").rglob("*.py")
    in_code = {found for file in files for found in ID.findall(file.read_text())}
    table = (REPO / "docs" / "workarounds.md").read_text()
    rows = dict(re.findall(r"^\| ([FC]\d+) \| (.*) \|$", table, re.MULTILINE))
    assert len(re.findall(r"^\| [FC]\d+ \|", table, re.MULTILINE)) == len(rows)
    assert in_code == set(rows)
    tested = {name for ids in SEEN.values() for name in ids}
    for name, row in rows.items():
        *_, ours, last = row.split(" | ")
        assert ours.strip("`"), name
        if name.startswith("F"):
            assert (f"test {name}" in last) == (name in tested), name
            assert name in tested or "no test: " in last, name
