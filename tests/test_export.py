"""The written model is one that any program loads, whole or not at all, and it is the model that
was trained."""

import errno
import itertools
import json
import os
import shutil
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from colossalai.accelerator import get_accelerator, set_accelerator
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from args import Settings, resolve, train_parser
from opt.colossal import processes
from opt.data import tokens
from opt.errors import UserError
from opt.model.config import load_config
from opt.model.opt import meta_model
from opt.model.weights import open_weights
from opt.train import card, checks, export
from opt.train.schedule import Steps
from opt_train_demo import boost

from .conftest import SAMPLE_MODEL, free_port, metrics, train
from .test_parity import HYBRID, run_worker
from .test_training import Runs, all_rows, runs_in

EXPORTED = ("torch_ddp", "low_level_zero", "gemini", "tp=2", "pp=2", "tp=2 x pp=2")
SMALL = 300_000  # bytes: the sample model's embedding is 1 MB, each of its layers 0.8 MB

# What any user's program does; of this project it knows the output directories alone.
ANY_PROGRAM = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

rows, found = json.load(open(sys.argv[1])), {}
for directory in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(directory, torch_dtype="auto", output_loading_info=True)
    with torch.no_grad():
        losses = [
            (model(torch.tensor([row]), labels=torch.tensor([labels])).loss.item(), sum(x != -100 for x in labels))
            for row, labels in rows
        ]
    generator = pipeline("text-generation", model=directory)
    found[directory] = {
        "loss": sum(loss * targets for loss, targets in losses) / sum(targets for _, targets in losses),
        "dtype": str(model.dtype),
        "attention": model.config._attn_implementation,
        "not loaded": info["missing_keys"] + info["unexpected_keys"],
        "text": generator("A young", max_new_tokens=5, do_sample=False)[0]["generated_text"],
        "tokens": AutoTokenizer.from_pretrained(directory)("A young", add_special_tokens=False)["input_ids"],
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return runs_in(tmp_path_factory.getbasetemp() / "runs")


@pytest.fixture(scope="module")
def loaded(runs, tmp_path_factory) -> dict:
    """{run: what a program that only has transformers finds in its output directory}"""
    folder = tmp_path_factory.mktemp("elsewhere")
    rows = [row.tolist() for row in all_rows(runs.dataset.held_out)]
    rows = [[row, runs.labels[tuple(row)]] for row in rows]
    (folder / "rows.json").write_text(json.dumps(rows))
    outputs = {name: str(runs.output(name)) for name in EXPORTED}
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "CUDA_VISIBLE_DEVICES": ""
    }
    command = [sys.executable, "-c", ANY_PROGRAM, "rows.json", *outputs.values()]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: found[output] for name, output in outputs.items()}


@pytest.mark.parametrize("name", EXPORTED)
def test_any_program_loads_it(name, loaded, runs):
    found = loaded[name]
    last = [line["eval_loss"] for line in metrics(runs.output(name)) if "eval_loss" in line][-1]
    assert found["loss"] == pytest.approx(last, abs=0.02 if name == "gemini" else 1e-3)
    assert found["dtype"] == ("torch.bfloat16" if name == "gemini" else "torch.float32")
    assert found["attention"] == "sdpa"
    assert found["not loaded"] == []
    assert found["text"].startswith("A young") and len(found["text"]) > len("A young")
    assert (
        found["tokens"]
        == tokens.load_tokenizer(SAMPLE_MODEL)("A young", add_special_tokens=False)["input_ids"]
    )


def test_the_run_wrote_three_texts(runs):
    lines = (runs.output("tp=2 x pp=2") / "stdout").read_text().splitlines()
    assert len([line for line in lines if line.startswith("  - ") and len(line) > 10]) == 3


def test_config_is_the_given_one(runs):
    written, given = (
        json.loads((directory / "config.json").read_text())
        for directory in (runs.output("tp=2 x pp=2"), runs.model)
    )
    assert written == given, "--dropout 0 is a flag of one run, and no property of the model"


def tensors_of(directory) -> dict:
    return dict(AutoModelForCausalLM.from_pretrained(directory).named_parameters())


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def odd_model(tmp_path_factory) -> Path:
    """A model whose vocabulary is padded under tensor parallelism."""
    directory = tmp_path_factory.mktemp("odd")
    torch.manual_seed(2)
    OPTForCausalLM(OPTConfig.from_pretrained(SAMPLE_MODEL, vocab_size=2049)).save_pretrained(
        directory
    )
    tokens.load_tokenizer(SAMPLE_MODEL).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def written_by_four(odd_model, tmp_path_factory) -> Path:
    """What tp=2 x pp=2 writes of `odd_model`: directories `shards` and `again`, and one file of
    each kind."""
    folder = tmp_path_factory.mktemp("four")
    # An earlier, larger model lies where the second one goes.
    torch.manual_seed(1)
    earlier = OPTForCausalLM(OPTConfig.from_pretrained(SAMPLE_MODEL, num_hidden_layers=6))
    earlier.save_pretrained(folder / "again", max_shard_size=SMALL)
    earlier.save_pretrained(folder / "again", max_shard_size=SMALL, safe_serialization=False)
    flags = (*HYBRID, "--tp_size", 2, "--pp_size", 2, "--model_name_or_path", odd_model)
    cases = {}
    for name in ("shards", "again", "one.safetensors", "one.bin"):
        case = {"wanted": "export", "shard_bytes": SMALL if name == "shards" else 10**9}
        cases[name] = case | {"flags": (*flags, "--output_path", folder / name)}
    run_worker(tmp_path_factory.mktemp("worker"), 4, cases, {"CUDA_VISIBLE_DEVICES": ""})
    return folder


def test_shards_load(written_by_four, odd_model):
    assert same(tensors_of(written_by_four / "shards"), tensors_of(odd_model))
    shards = sorted((written_by_four / "shards").glob("*.safetensors"))
    assert len(shards) > 10
    index = json.loads((written_by_four / "shards" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        t.numel() * 4 for file in shards for t in load_file(file).values()
    )
    for file in shards:
        tensors = load_file(file)
        assert sum(t.numel() * 4 for t in tensors.values()) <= SMALL or len(tensors) == 1
        assert {
            name for name, where in index["weight_map"].items() if where == file.name
        } == tensors.keys()


def test_what_will_be_gone_is_told(runs, tmp_path):
    """In the plan; and a chat template that a tokenizer before had is not the new one's."""
    shutil.copytree(runs.model, tmp_path / "there")
    (tmp_path / "there" / "chat_template.jinja").write_text("of another")
    flags = ("--max_train_steps", 1, "--lora_r", 2, "--model_name_or_path", runs.model)
    done = train(tmp_path / "there", *flags)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("  output ")]
    assert line.endswith("; config.json, model.safetensors there will be gone")
    left = {file.name for file in (tmp_path / "there").iterdir()}
    assert "adapter_config.json" in left
    assert not left & {"config.json", "model.safetensors", "chat_template.jinja"}


def test_an_earlier_model_is_replaced(written_by_four, odd_model):
    """Two pipeline stages, so two shards: of the earlier model's, in both formats, none is left."""
    directory = written_by_four / "again"
    assert same(tensors_of(directory), tensors_of(odd_model))
    weights = sorted(file.name for file in directory.iterdir() if "model" in file.name)
    assert weights == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]


@pytest.mark.parametrize("name", ["one.safetensors", "one.bin"])
def test_one_file(name, written_by_four, odd_model):
    file = written_by_four / name
    tensors = (
        load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    )
    model = OPTForCausalLM(OPTConfig.from_pretrained(odd_model))
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], []), "the head is the embedding"
    assert same(dict(model.named_parameters()), tensors_of(odd_model))
    tokenizer = ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    config = ["config.json", "generation_config.json"]
    there = ["again", *config, "one.bin", "one.safetensors", "shards", *tokenizer]
    assert sorted(f.name for f in written_by_four.iterdir()) == there


def test_beside_one_file(trained, runs, tmp_path, capsys):
    """What it takes to load it; what is there and of another stays, and that is told."""
    write(trained, tmp_path / "new" / "one.bin", card=CARD)
    model = OPTForCausalLM(OPTConfig.from_pretrained(tmp_path / "new"))
    model.load_state_dict(torch.load(tmp_path / "new" / "one.bin"), strict=False)
    assert same(dict(model.named_parameters()), tensors_of(runs.model))
    assert len(tokens.load_tokenizer(tmp_path / "new")) == len(tokens.load_tokenizer(runs.model))
    assert (tmp_path / "new" / "README.md").read_text() == CARD
    assert capsys.readouterr().out == ""

    write(trained, tmp_path / "new" / "one.bin", card=CARD)  # again: all of it is its own
    assert capsys.readouterr().out == ""
    for name in ("tokenizer.json", "README.md"):
        (tmp_path / "new" / name).write_text("{}")
    write(trained, tmp_path / "new" / "one.safetensors", card=CARD)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "README.md was not written by this script" in said[0]
    assert "tokenizer.json is another than this model's" in said[1]
    assert (tmp_path / "new" / "tokenizer.json").read_text() == "{}"
    assert not list((tmp_path / "new").glob(".*"))


def test_another_models_config_is_not_taken_the_place_of(runs, tmp_path):
    """Before training."""
    plan = Settings(output_path=str(tmp_path / "one.bin"), no_save=False)
    source = load_config(runs.model)
    checks._check_beside(plan, source)
    shutil.copy(runs.model / "config.json", tmp_path)
    checks._check_beside(plan, source)
    for content in ('{"model_type": "gpt2"}', "{", None):
        fields = json.loads((runs.model / "config.json").read_text())
        changed = json.dumps(fields | {"ffn_dim": 64})
        (tmp_path / "config.json").write_text(content or changed)
        with pytest.raises(UserError, match="one.bin: .*config.json is of another model"):
            checks._check_beside(plan, source)
        checks._check_beside(plan.but(output_path=str(tmp_path)), source)


@pytest.mark.parametrize(
    "output, beside",
    [
        ("model.safetensors", "adapter_config.json"),
        ("pytorch_model.bin", "model.safetensors"),
        ("pytorch_model.bin", "model.safetensors.index.json"),
    ],
)
def test_one_file_that_no_loader_would_find(output, beside, runs, tmp_path):
    """Before training: from_pretrained of that folder takes what is beside it."""
    plan = Settings(output_path=str(tmp_path / output), no_save=False)
    source = load_config(runs.model)
    (tmp_path / beside).write_text("{}")
    with pytest.raises(UserError, match=f"{output}: .*{beside} is there"):
        checks._check_beside(plan, source)
    # Nobody looks for this name; and what is looked for later may lie there
    checks._check_beside(plan.but(output_path=str(tmp_path / "mine.bin")), source)
    (tmp_path / beside).rename(tmp_path / "pytorch_model.bin.index.json")
    checks._check_beside(plan, source)


@pytest.mark.parametrize(
    "base, dataset, wanted",
    [
        (
            "facebook/opt-350m",
            ["hugginglearners/netflix-shows"],
            {
                "base_model": "facebook/opt-350m",
                "license": "other",
                "datasets": ["hugginglearners/netflix-shows"],
            },
        ),
        (
            "acme/opt",
            ["acme/shows", "sample/netflix_sample.csv", "corpus/*.csv"],
            {"datasets": ["acme/shows"]},
        ),
        (".", ["./texts.csv"], {"license": "mit", "base_model": "acme/base"}),
    ],
)
def test_what_the_hub_reads_of_a_card(base, dataset, wanted, tmp_path):
    """Of a local model what its own card says."""
    if base == ".":
        (tmp_path / "README.md").write_text("---\nlicense: mit\nbase_model: acme/base\n---\nText\n")
    plan = Settings(model_name_or_path=base, dataset=dataset)
    data = card._metadata(
        SimpleNamespace(plan=plan, setup=SimpleNamespace(directory=tmp_path)), False
    )
    parsed = ModelCard(f"---\n{ModelCardData(**data).to_yaml()}\n---\n").data.to_dict()
    rest = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    assert parsed["tags"] == ["opt", "colossalai"]
    assert {key: parsed.get(key) for key in (*wanted, *rest)} == wanted | rest
    assert ("license" in parsed) == ("license" in wanted)


@pytest.fixture(scope="module")
def trained(runs):
    """(boosted, source, config, tokenizer) in this process, the only one of its group, on the
    CPU."""
    here = processes.Place(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    args = resolve(train_parser().parse_args([]), "cpu", False)
    given = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "RANK": "0",
        "WORLD_SIZE": "1",
    }
    with pytest.MonkeyPatch.context() as environment:
        for name, value in given.items():
            environment.setenv(name, value)
        accelerator = get_accelerator()
        processes.start(here)
        config = load_config(runs.model)
        contents = open_weights(runs.model, meta_model(config), seed=0)
        yield (
            boost(args, here, config, contents, Steps.of_benchmark(1e-3)),
            runs.model,
            config,
            tokens.load_tokenizer(runs.model),
        )
        processes.stop()
        set_accelerator(accelerator)


CARD = f"---\ntags: []\n---\n{export.CARD_MARK}\n# A model\n"


def write(trained, output_path, shard_bytes=10**9, card=None):
    boosted, source, config, tokenizer = trained
    given = (source, config, tokenizer, str(output_path), shard_bytes, card)
    export.export_model(boosted.plugin, *given)


@pytest.mark.parametrize("output", ["directory", "shards", "one.safetensors", "one.bin"])
def test_others_may_read_it_as_the_umask_says(output, trained, tmp_path):
    """safetensors makes its files readable to their owner alone."""
    before = os.umask(0o027)
    try:
        write(trained, tmp_path / output, SMALL if output == "shards" else 10**9)
    finally:
        os.umask(before)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert files and {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o640}


class _Disk:
    """Fails at the n-th change under a folder. By Python's audit events, which come before the
    change that they tell of."""

    def __init__(self):
        self.folder, self.left = None, 0
        sys.addaudithook(self._hook)  # for good: there is no way to remove it

    def _hook(self, event, arguments):
        if self.folder is None or event not in (
            "open",
            "os.rename",
            "os.remove",
            "os.rmdir",
            "os.mkdir",
            "os.chmod",
        ):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if str(arguments[0]).startswith(self.folder):
            self.left -= 1
            if self.left <= 0:  # and whatever is tried after that
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextmanager
    def failing(self, folder, at):
        self.folder, self.left = str(folder), at
        try:
            yield
        finally:
            self.folder = None


disk = _Disk()


@pytest.mark.parametrize("shard_bytes", [10**9, 5 * SMALL], ids=["one file", "shards"])
def test_no_half_model_when_writing_fails(shard_bytes, trained, runs, tmp_path):
    """Wherever it fails, what is there then is the earlier model, the new one, or clearly none."""
    torch.manual_seed(1)
    earlier = OPTForCausalLM(OPTConfig.from_pretrained(SAMPLE_MODEL))
    old, new = dict(earlier.named_parameters()), tensors_of(runs.model)
    target, seen = tmp_path / "model", []
    for n in itertools.count(1):
        shutil.rmtree(target, ignore_errors=True)
        earlier.save_pretrained(target, max_shard_size=shard_bytes)
        try:
            with disk.failing(tmp_path, at=n):
                write(trained, target, shard_bytes)
        except OSError as error:
            assert error.errno == errno.ENOSPC
        else:
            break
        try:
            there = tensors_of(target)
        except OSError as error:
            assert "no file named" in str(error)
            seen.append("none")
        else:
            seen.append("old" if same(there, old) else "new" if same(there, new) else "half")
    assert seen[0] == "old" and seen[-1] == "new" and "half" not in seen, seen
    assert same(tensors_of(target), new) and not list(target.glob(".*")), (
        "at last nothing failed, after what the failures left"
    )


def test_a_file_is_replaced_at_once_or_not_at_all(trained, tmp_path):
    target, seen = tmp_path / "one.safetensors", []
    for n in itertools.count(1):
        target.write_bytes(b"earlier")
        try:
            with disk.failing(tmp_path, at=n):
                write(trained, target)
        except OSError:
            seen.append(
                "old"
                if target.read_bytes() == b"earlier"
                else "new"
                if load_file(target)
                else "half"
            )
        else:
            break
    assert list(dict.fromkeys(seen)) == ["old", "new"], seen
    assert len(load_file(target)) == len(list(trained[0].model.named_parameters()))
