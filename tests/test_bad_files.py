"""Configurations, tokenizers, weights and data sets that are broken, by a list and at random: what
reads them says so, as a UserError, or gives something sound. No other exception, no hang, no
training on garbage."""

import json
import os
import pickle
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from args import PRECISIONS, train_parser
from opt.colossal import processes
from opt.data import tokens
from opt.data.batches import Position
from opt.errors import UserError
from opt.model import weights
from opt.model.opt import meta_model
from opt.registry import PLUGINS
from opt.train.checks import Setup, check
from opt.train.memory import RowLengths, estimate
from opt.train.schedule import count_steps

from .conftest import SAMPLE_DATA, SAMPLE_MODEL, tokenize

HERE = processes.Place(0, 1, 0, torch.device("cpu"))
CONFIG = json.loads((SAMPLE_MODEL / "config.json").read_text())


def check_run(model, *flags, here=HERE) -> Setup:
    """What opt_train_demo.py checks before it starts."""
    given = [
        "--model_name_or_path",
        str(model),
        "--dataset",
        str(SAMPLE_DATA),
        "--output_path",
        tempfile.gettempdir(),
        *flags,
    ]
    return check(train_parser().parse_args(given), here)


def refused(*says):
    """pytest.raises for a UserError of one line with these words, in this order."""
    return pytest.raises(UserError, match="(?s)^(?=.{20,500}$).*" + ".*".join(map(re.escape, says)))


@pytest.fixture(scope="module")
def tokenizer():
    return tokens.load_tokenizer(SAMPLE_MODEL)


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of the sample model, to be broken."""
    return Path(shutil.copytree(SAMPLE_MODEL, tmp_path / "model"))


# ---- config.json

VALUES = [
    *({"hidden_size": value} for value in ("128", None, -128, 0, 128.5, 10**12, True, [128])),
    {"vocab_size": 0},
    {"vocab_size": "all"},
    {"ffn_dim": -1},
    {"num_attention_heads": 0},
    {"num_hidden_layers": 0},
    {"num_hidden_layers": 10**9},  # it would be built for ever
    {"max_position_embeddings": 1},
    {"word_embed_proj_dim": -5},
    {"dropout": "a tenth"},
    {"dropout": 1.5},
    {"attention_dropout": float("nan")},
    {"layerdrop": 0.1},
    {"init_std": -1},
    {"init_std": float("inf")},
    {"do_layer_norm_before": "yes"},
    {"enable_bias": None},
    {"activation_function": "rellu"},
    {"activation_function": None},
    {"activation_function": ["relu"]},
    *({"pad_token_id": value} for value in (None, -1, 2048, "1")),
    *({"bos_token_id": value} for value in ([2], -1, 2048, "2")),
    *({"eos_token_id": value} for value in (7, 2048, -1, "2", [], [7], [2, None], {"end": 2})),
    *({"tie_word_embeddings": value} for value in (None, "yes", 0)),
]


@pytest.mark.parametrize("change", VALUES, ids=str)
def test_a_value_that_makes_no_model(model, change):
    (model / "config.json").write_text(json.dumps(CONFIG | change))
    (name,) = change
    with refused("config.json", name):
        check_run(model)


CONTENTS = {
    "empty": b"",
    "a list": b"[]",
    "a string": b'"opt"',
    "null": b"null",
    "cut": (SAMPLE_MODEL / "config.json").read_bytes()[:200],
    "binary": bytes(range(256)),
    "UTF-16": json.dumps(CONFIG).encode("utf-16"),
    "nested": b"[" * 100_000,
    "HTML": b"<!DOCTYPE html><html>404</html>",
    "strange type": json.dumps(CONFIG | {"torch_dtype": "float99"}).encode(),
    "strange labels": json.dumps(CONFIG | {"id2label": "x"}).encode(),
}


@pytest.mark.parametrize("content", CONTENTS)
def test_a_config_that_is_none(model, content):
    (model / "config.json").write_bytes(CONTENTS[content])
    with refused("config.json"):
        check_run(model)


def test_sizes_that_tensor_parallelism_cannot_divide(model):
    (model / "config.json").write_text(json.dumps(CONFIG | {"ffn_dim": 511}))
    four = processes.Place(0, 4, 0, HERE.device)
    for tp_size in ("2", "4"):
        with refused("511 ffn_dim", f"--tp_size {tp_size}"):
            check_run(model, "--plugin", "hybrid_parallel", "--tp_size", tp_size, here=four)
    check_run(model)


# ---- tokenizer


def edit_tokenizer(model: Path, edit) -> None:
    content = json.loads((model / "tokenizer.json").read_text())
    edit(content)
    (model / "tokenizer.json").write_text(json.dumps(content))


def other_end_token(model):
    """As GPT-2's in OPT's place: no more tokens than the model has, but texts end with another
    one."""
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        content = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps(content | {"eos_token": "<unk>"}))


TOKENIZERS = {
    "cut": lambda m: os.truncate(m / "tokenizer.json", 5000),
    "empty": lambda m: (m / "tokenizer.json").write_text(""),
    "an object": lambda m: (m / "tokenizer.json").write_text("{}"),
    "binary": lambda m: (m / "tokenizer.json").write_bytes(bytes(range(256)) * 9),
    "no model": lambda m: edit_tokenizer(m, lambda t: t.pop("model")),
    "strange model": lambda m: edit_tokenizer(m, lambda t: t["model"].update(type="Nothing")),
    "merges of no token": lambda m: edit_tokenizer(
        m, lambda t: t["model"]["merges"].append(["qqq", "zzz"])
    ),
    "settings broken": lambda m: (m / "tokenizer_config.json").write_text("{"),
    "an id too high": lambda m: edit_tokenizer(
        m, lambda t: t["model"]["vocab"].update({"far": 5000})
    ),
    "another end token": other_end_token,
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_broken_tokenizer(model, case):
    TOKENIZERS[case](model)
    with refused("tokenizer"):
        check_run(model)


# ---- weights


class Evil:
    def __reduce__(self):
        return os.mkdir, ("/tmp/opt_weights_ran_code",)


def write_bin(content):
    return lambda m, w: torch.save(content(w), m / "pytorch_model.bin")


def write_index(content: str):
    return lambda m, w: (m / "model.safetensors.index.json").write_text(content)


def with_tensor(change):
    def write(model, state):
        name = "model.decoder.layers.1.fc1.weight"
        save_file(state | {name: change(state[name].clone())}, model / "model.safetensors")

    return write


def set_first(value):
    return with_tensor(lambda t: t.index_fill_(0, torch.tensor([0]), value))


WEIGHTS = {
    "empty file": lambda m, w: (m / "model.safetensors").touch(),
    "length of the header too large": lambda m, w: (m / "model.safetensors").write_bytes(
        b"\xff" * 64
    ),
    "header of nothing": lambda m, w: (m / "model.safetensors").write_bytes(
        (2).to_bytes(8, "little") + b"{}"
    ),
    "empty .bin": lambda m, w: (m / "pytorch_model.bin").touch(),
    "numbers for names": write_bin(lambda w: dict(enumerate(w.values()))),
    "code in a pickle": lambda m, w: (m / "pytorch_model.bin").write_bytes(
        pickle.dumps({"decoder": Evil()})
    ),
    "code in a .bin": write_bin(lambda w: w | {"x": Evil()}),
    "index: empty": write_index('{"weight_map": {}}'),
    "index: a list": write_index("[]"),
    "index: map of a list": write_index('{"weight_map": ["model.safetensors"]}'),
    "index: numbers": write_index('{"weight_map": {"a": 1, "b": 2}}'),
    "index: mixed": write_index('{"weight_map": {"a": 1, "b": "model-00001.safetensors"}}'),
    "index: lists": write_index('{"weight_map": {"a": ["x"]}}'),
    "index: elsewhere": write_index('{"weight_map": {"a": "../../etc/passwd"}}'),
    "index: long name": write_index(json.dumps({"weight_map": {"a": "x" * 5000 + ".safetensors"}})),
    "index: NUL": write_index('{"weight_map": {"a": "\\u0000.safetensors"}}'),
    "index: cut": write_index('{"weight_map": {"a": "mo'),
    "nan": set_first(float("nan")),
    "infinity": set_first(-float("inf")),
    "quantized": with_tensor(lambda t: t.to(torch.int8)),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_broken_weights(model, case):
    torch.manual_seed(0)
    config = transformers.OPTConfig(**CONFIG)
    state = {
        k: v
        for k, v in transformers.OPTForCausalLM(config).state_dict().items()
        if k != weights.HEAD
    }
    WEIGHTS[case](model, state)
    with refused(str(model)):
        contents = weights.open_weights(model, meta_model(config), seed=0)
        for name in contents:  # as they are placed
            contents[name]
    assert not Path("/tmp/opt_weights_ran_code").exists()


# ---- data

LINES = "show_id,description\n" + "".join(
    f"s{i},Ein Café in Zürich, das nie schließt.\n".replace(", das", " das") for i in range(20)
)
DATA = {
    "UTF-16 without a mark.csv": LINES.encode("utf-16-le"),
    "UTF-16 without a mark.txt": "One text a line.\nAnother.\n".encode("utf-16-le"),
    "Latin-1.csv": LINES.encode("latin-1"),
    "Latin-1.jsonl": b'{"description": "Z\xfcrich"}\n',
    "binary.csv": bytes(range(256)) * 20,
    "binary.txt": bytes(range(256)) * 20,
    "NUL in texts.csv": LINES.replace("Caf", "C\0f").encode(),
    "more fields than columns.csv": LINES.replace("s7,", "s7,a,b,c,").encode(),
    "HTML.csv": b"<!DOCTYPE html>\n<html><body>404</body></html>\n",
    "blank lines.csv": b"\n" * 500,
    "blank lines.txt": b"\n \n\t\n" * 100,
    "a number.json": b"7",
    "null.json": b"null",
    "null first.jsonl": b' null\n{"description": "One."}\n',
    "strings.json": b'["a", "b"]',
    "nested.json": b'{"data": {"description": ["a"]}}',
    "cut.json": b'[{"description": "One."}, {"descr',
    "a list of none.json": b"[]",
    "lists.jsonl": b'{"description": ["One."]}\n' * 5,
    "objects.jsonl": b'{"description": {"text": "One."}}\n' * 5,
    "mixed.jsonl": b'{"description": "One."}\n{"description": 2}\n',
    "true.jsonl": b'{"description": true}\n' * 5,
    "random.parquet": bytes(range(256)) * 20,
    "magic alone.parquet": b"PAR1PAR1",
    "zip.csv": b"PK\x03\x04" + bytes(400),
    "gzip.csv": b"\x1f\x8b\x08" + bytes(400),
}


@pytest.mark.parametrize("name", DATA)
def test_a_broken_data_set(tokenizer, tmp_path, name):
    (tmp_path / name).write_bytes(DATA[name])
    with pytest.raises(UserError, match="(?s)^.{20,700}$"):
        tokenize(str(tmp_path / name), "description", 64, 0, 1, tokenizer)


def test_a_huge_text(tokenizer, tmp_path):
    """Ten million characters, without a space among them and with: rows like any other's."""
    (tmp_path / "d.txt").write_text("a" * 10**7 + "\n" + "an inn " * 1_500_000 + "\nOne.\n")
    found = tokenize(str(tmp_path / "d.txt"), "text", 64, 0, 1, tokenizer)
    assert found.counts.long == 2 and len(found.train) > 40_000
    lengths = found.train.lengths
    assert max(lengths) == 64 and sum(lengths < 64) <= 3
    flags = ("--long_texts", "cut")
    rows = tokenize(str(tmp_path / "d.txt"), "text", 64, 0, 1, tokenizer, *flags).train
    assert sorted(map(int, rows.lengths))[1:] == [64, 64]


# ---- at random

RANDOM = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
)


@RANDOM
@given(st.dictionaries(st.sampled_from(sorted(CONFIG)), JSON, min_size=1, max_size=3))
def test_random_values_in_a_config(model, change):
    (model / "config.json").write_text(json.dumps(CONFIG | change))
    try:
        setup = check_run(model)
    except UserError:
        return
    assert setup.weights.num_parameters > 0
    assert meta_model(setup.config).config is setup.config


@RANDOM
@given(st.sampled_from(["config.json", "tokenizer.json", "tokenizer_config.json"]), st.data())
def test_random_damage_to_a_model(model, name, draw):
    """A byte changed, a stretch left out, or everything behind it gone."""
    content = (SAMPLE_MODEL / name).read_bytes()
    at = draw.draw(st.integers(0, len(content) - 1))
    length = draw.draw(st.sampled_from([1, 10, len(content)]))
    (model / name).write_bytes(
        content[:at] + draw.draw(st.binary(max_size=4)) + content[at + length :]
    )
    try:
        check_run(model)
    except UserError:
        pass
    finally:
        shutil.copy(SAMPLE_MODEL / name, model / name)


@RANDOM
@given(JSON, st.binary(max_size=200), st.sampled_from(["index", "map", "safetensors", "bin"]))
def test_random_weights(model, content, raw, kind):
    names = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}
    file = model / names.get(kind, "model.safetensors.index.json")
    file.write_bytes(
        raw
        if kind in names
        else json.dumps({"weight_map": content} if kind == "map" else content).encode()
    )
    with pytest.raises(UserError):
        check_run(model)
    file.unlink()


@settings(RANDOM, max_examples=60)
@given(
    st.sampled_from(["csv", "json", "jsonl", "txt", "parquet"]),
    st.binary(max_size=300) | st.text(max_size=200).map(lambda t: t.encode("utf-8", "replace")),
)
def test_random_data(tokenizer, tmp_path, kind, content):
    """Refused, or rows of whole texts."""
    file = tmp_path / f"d.{kind}"
    file.write_bytes(b"description\n" + content if kind == "csv" else content)
    try:
        rows = tokenize(file, "description", 16, 0, 1, tokenizer).train
    except UserError:
        return
    assert len(rows) and all(rows.lengths <= 16)


NUMBERS = [
    "--batch_size",
    "--gradient_accumulation_steps",
    "--mem_cap",
    "--dropout",
    "--learning_rate",
    "--weight_decay",
    "--seed",
    "--timeout_minutes",
    "--tp_size",
    "--pp_size",
    "--num_microbatches",
    "--zero_stage",
    "--offload_optim_frac",
    "--max_length",
    "--eval_fraction",
    "--num_epoch",
    "--max_train_steps",
    "--warmup_ratio",
    "--warmup_steps",
    "--adam_beta1",
    "--adam_epsilon",
    "--max_norm",
    "--eval_steps",
]
NUMBER = (
    st.integers().map(str)
    | st.integers(-2, 20).map(str)
    | st.floats().map(str)
    | st.text(max_size=6)
    | st.sampled_from(
        ["nan", "inf", "-inf", "1e999", "-0", "9" * 5000, "", " ", "0x10", "1_0", "\u0661"]
    )
)


@settings(RANDOM, max_examples=200)
@given(
    st.sampled_from(list(PLUGINS)),
    st.sampled_from([*PRECISIONS, None]),
    st.dictionaries(st.sampled_from(NUMBERS), NUMBER, max_size=4),
    st.integers(1, 8),
)
def test_random_arguments(capsys, plugin, precision, numbers, world_size):
    """One line and exit code 2, or a plan of whole numbers of steps."""
    flags = [f"{flag}={value}" for flag, value in numbers.items()]
    flags += [f"--plugin={plugin}", *([f"--precision={precision}"] if precision else [])]
    here = processes.Place(0, world_size, 0, HERE.device)
    try:
        args = train_parser().parse_args(["--model_name_or_path", str(SAMPLE_MODEL), *flags])
    except SystemExit as end:
        assert end.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
        return
    try:
        setup = check(args, here)
    except UserError:
        return
    steps = count_steps(setup.plan, 420, Position())
    assert 1 <= steps.total_steps and 0 <= steps.warmup_steps and steps.learning_rate < 100
    # As transformers' Trainer takes it, --warmup_steps may be more: then the rate rises to the end
    assert steps.warmup_steps == setup.plan.warmup_steps or steps.warmup_steps <= steps.total_steps
    needed = estimate(setup.plan, setup.config, RowLengths(setup.plan.max_length), "cpu")
    assert 0 < needed.device < needed.host
