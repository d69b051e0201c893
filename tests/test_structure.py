"""What CONTRIBUTING.md promises of the structure."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import REPO, SAMPLE_DATA, SAMPLE_MODEL, finish, losses, start, train

# What each floor may import of this project, besides itself; args is what the user said.
FLOORS = {
    "opt/model": {"errors"},
    "opt/data": {"errors", "model"},
    "opt/colossal": {"errors", "limits", "model"},
    "opt/train": {
        "errors",
        "limits",
        "model",
        "data",
        "colossal",
        "registry",
        "measure",
        "installed",
        "args",
    },
}


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_go_down(floor):
    allowed = {floor.split("/")[1], *FLOORS[floor]}
    found = {}
    for file in (REPO / floor).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for name in names:
                top, *rest = name.split(".")
                if top == "opt":
                    found.setdefault(rest[0], file.name)
                elif top in ("args", "opt_train_demo", "opt_benchmark", "benchmarks"):
                    found.setdefault(top, file.name)
    assert set(found) <= allowed, {room: found[room] for room in set(found) - allowed}
    assert floor.split("/")[1] in found


def test_the_tests_that_documents_name_are_there():
    named = re.compile(r"(test_\w+\.py)(?:::(test_\w+))?")
    found = set()
    for document in (*REPO.glob("*.md"), *REPO.glob("docs/*.md"), *REPO.glob("benchmarks/*.md")):
        found |= set(named.findall(document.read_text()))
    assert len(found) > 30
    for file, test in found:
        content = (REPO / "tests" / file).read_text()
        assert not test or f"\ndef {test}(" in content, (file, test)


def test_only_plugins_and_flags_ask_for_a_plugins_name():
    """What differs by plugin is answered by the plugin: see opt/colossal/plugin.py."""
    asked = re.compile(r"\bplugin\b( ==| !=| in |\.startswith|\.endswith)")
    found = [
        f"{file.relative_to(REPO)}: {line.strip()}"
        for file in (*REPO.glob("opt_*.py"), *REPO.glob("opt/**/*.py"))
        if file.parent.name != "colossal"
        for line in file.read_text().splitlines()
        if asked.search(line)
    ]
    assert not found


def test_model_and_data_without_colossalai():
    """They can be read, tested and used where ColossalAI is not installed."""
    code = """
import importlib, pkgutil, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "colossalai":
            raise ModuleNotFoundError("no colossalai here")
sys.meta_path.insert(0, Refuse())
import torch, opt.data, opt.model
for room in (opt.data, opt.model):
    for module in pkgutil.iter_modules(room.__path__, room.__name__ + "."):
        importlib.import_module(module.name)
        print(module.name)
from transformers import OPTConfig
from opt.model.opt import OPTForCausalLM
small = dict(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2)
model = OPTForCausalLM(OPTConfig(vocab_size=50, word_embed_proj_dim=32, **small))
ids = torch.arange(4, 12).unsqueeze(0)
model(input_ids=ids, labels=ids)["loss"].backward()
print(model.lm_head.weight.grad.abs().sum().item() > 0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *modules, learns = done.stdout.split()
    files = [*(REPO / "opt" / "model").glob("*.py"), *(REPO / "opt" / "data").glob("*.py")]
    assert len(modules) == sum(file.name != "__init__.py" for file in files)
    assert learns == "True"


def test_a_new_plugin(tmp_path):
    """CONTRIBUTING.md's: one file and one line, in a copy of the project. It trains as torch_ddp
    does, over two processes, and saves and resumes."""
    guide = (REPO / "CONTRIBUTING.md").read_text()
    plugin, line = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    copy = tmp_path / "project"
    shutil.copytree(REPO / "opt", copy / "opt", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("opt_train_demo.py", "args.py", "requirements.txt"):
        shutil.copy(REPO / name, copy)
    (file,) = re.findall(r"`(opt/colossal/\w+\.py)`, is a whole plugin", guide)
    (copy / file).write_text(plugin)
    registry = copy / "opt" / "registry.py"
    registry.write_text(registry.read_text().replace("PLUGINS = {\n", f"PLUGINS = {{\n{line}"))

    flags = ["--max_train_steps", "6", "--eval_fraction", "0", "--batch_size", "4"]
    train(tmp_path / "reference", *flags, "--plugin", "torch_ddp", nproc=2)

    def run_new(output: Path, *more) -> list[float]:
        given = ["--model_name_or_path", SAMPLE_MODEL, "--dataset", SAMPLE_DATA, *flags]
        given += ["--plugin", "torch_ddp_plain", "--output_path", output, *more]
        done = finish(start(copy / "opt_train_demo.py", *given, nproc=2), 120)
        assert done.returncode == 0, done.stderr[-3000:]
        return losses(output)

    through = run_new(tmp_path / "through", "--save_steps", "3")
    assert through == pytest.approx(losses(tmp_path / "reference"), abs=1e-5)
    saved = tmp_path / "through" / "checkpoints" / "step-00000003"
    assert run_new(tmp_path / "resumed", "--resume", saved) == through
