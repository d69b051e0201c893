"""Models and data sets by Hub id, against a stand-in for the Hub: there, missing, out of order, and
cached."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import transformers

from opt.data import tokens
from opt.data.rows import open_dataset
from opt.model import weights
from opt.model.config import load_config
from opt.model.opt import meta_model

from .conftest import REPO, SAMPLE_DATA, SAMPLE_MODEL, metrics, run, tokenize
from .hub import Hub, save_opt_tokenizer, serving
from .test_bad_input import assert_refused
from .test_data import as_lists

SCRIPT = REPO / "opt_train_demo.py"
MODEL, NETFLIX, WIKITEXT = (
    "facebook/opt-350m",
    "hugginglearners/netflix-shows",
    "Salesforce/wikitext",
)
SPLITS = ("test", "train", "validation")
DEAD = [("error", "model"), ("silent", "model"), ("hang up", "data set"), ("silent", "wikitext")]


def save_model(directory, ffn_dim=128, **torch_save) -> None:
    """A small facebook/opt-350m, as its repository has it: the base model's names, fp16, no head,
    no safetensors; and the shape that is this size's own, layer norms after the blocks and
    embeddings narrower than the model."""
    save_opt_tokenizer(directory)
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=272,
        hidden_size=64,
        word_embed_proj_dim=32,
        do_layer_norm_before=False,
        num_hidden_layers=2,
        ffn_dim=ffn_dim,
        num_attention_heads=4,
        max_position_embeddings=128,
        init_std=0.2,
        torch_dtype="float16",
        prefix="</s>",
    )
    config.save_pretrained(directory)
    state = transformers.OPTForCausalLM(config).half().state_dict()
    state = {
        name.removeprefix("model."): tensor
        for name, tensor in state.items()
        if name != "lm_head.weight"
    }
    torch.save(state, directory / "pytorch_model.bin", **torch_save)


def wikitext(split: str) -> list[str]:
    """Lines as in WikiText's raw version: blank ones between paragraphs, a space at both ends of
    the others."""
    plots = [
        line.split(",", 11)[-1].strip('"') for line in SAMPLE_DATA.read_text().splitlines()[1:]
    ]
    plots = plots[SPLITS.index(split) :: 7]
    return ["", f" = {split} = \n", "", *(f" {plot} \n" for plot in plots)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The repositories of the stand-in."""
    import pandas

    root = tmp_path_factory.mktemp("hub")
    model, netflix, wiki = (
        root / name for name in (f"models/{MODEL}", f"datasets/{NETFLIX}", f"datasets/{WIKITEXT}")
    )
    for folder in (model, netflix, wiki):
        folder.mkdir(parents=True)
    save_model(model)
    for other in ("flax_model.msgpack", "tf_model.h5", "README.md", ".gitattributes"):
        (model / other).write_text("not needed")
    shutil.copy(SAMPLE_DATA, netflix / "netflix_titles.csv")
    (netflix / "README.md").write_text("---\nlicense: cc0-1.0\n---\n# Netflix shows\n")

    configs = ["wikitext-103-raw-v1", "wikitext-2-raw-v1"]
    card = ["---", "configs:"]
    for config in configs:
        card += [f"- config_name: {config}", "  data_files:"]
        (wiki / config).mkdir()
        for split in SPLITS:
            card += [f"  - split: {split}", f"    path: {config}/{split}-*"]
            text = wikitext(split) if config == configs[1] else ["the wrong configuration"]
            pandas.DataFrame({"text": text}).to_parquet(
                wiki / config / f"{split}-00000-of-00001.parquet"
            )
    (wiki / "README.md").write_text("\n".join([*card, "---", "# WikiText", ""]))
    return root


@pytest.fixture
def hub(root):
    with serving(root) as hub:
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """HF_HOME of this module: what one test downloads the next ones find cached, as on a user's
    machine."""
    return tmp_path_factory.mktemp("home")


def start(hub: Hub, home, model, dataset, *flags, output="/nowhere/not/written"):
    """opt_train_demo.py with `hub` for the Hub, patient for 2 seconds."""
    env = hub.environment(home) | {"HF_HUB_ETAG_TIMEOUT": "2", "CUDA_VISIBLE_DEVICES": ""}
    return run(
        SCRIPT,
        "--model_name_or_path",
        model,
        "--dataset",
        dataset,
        "--output_path",
        output,
        *flags,
        env=env,
    )


def test_the_defaults(hub, home, root, tmp_path, monkeypatch):
    """facebook/opt-350m on the Netflix descriptions: the weights arrive, as plain transformers has
    them."""
    flags = (
        "--precision",
        "fp32",
        "--dropout",
        0,
        "--max_train_steps",
        1,
        "--batch_size",
        4,
        "--no_save",
    )
    done = start(hub, home, MODEL, NETFLIX, *flags, output=tmp_path / "out")
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"Hub, {NETFLIX}: 420 texts" in done.stdout
    assert "pytorch_model.bin" in done.stdout
    # Gigabytes that nobody reads
    assert not [r for r in hub.requests if r.endswith((".msgpack", ".h5"))]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = root / "models" / MODEL
    tokenizer = tokens.load_tokenizer(folder)
    held_out = tokenize(SAMPLE_DATA, "description", 128, 0.05, 42, tokenizer).held_out
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32
    ).eval()
    total, targets = 0.0, 0
    with torch.no_grad():
        for row in as_lists(held_out):
            ids = torch.tensor([row])
            total += plain(input_ids=ids, labels=ids).loss.item() * (len(row) - 1)
            targets += len(row) - 1
    first = metrics(tmp_path / "out")[0]
    assert first["step"] == 0
    assert first["eval_loss"] == pytest.approx(total / targets, abs=1e-4)


def test_wikitext(hub, home, root):
    """The joined text in blocks of --max_length, to train on and held out as the data set has
    it."""
    done = start(
        hub,
        home,
        MODEL,
        "wikitext-2-raw",
        "--max_length",
        24,
        "--no_save",
        "--dry_run",
        output=home / "out",
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"Hub, {WIKITEXT}, wikitext-2-raw-v1" in done.stdout

    newest = max(
        (f for f in (home / "xdg" / "opt-colossalai").iterdir() if f.is_dir()),
        key=lambda entry: entry.stat().st_mtime_ns,
    )
    dataset = open_dataset(newest)
    tokenizer = tokens.load_tokenizer(root / "models" / MODEL)
    for split, rows in {"train": dataset.train, "validation": dataset.held_out}.items():
        whole = [
            tokenizer.bos_token_id,
            *tokenizer("".join(wikitext(split)), add_special_tokens=False)["input_ids"],
        ]
        assert set(rows.lengths[:-1]) == {24}
        left_out = len(whole) % 24 == 1
        assert np.concatenate(as_lists(rows)).tolist() == whole[: len(whole) - left_out]


def test_splits_configurations_and_what_else_the_hub_has(tmp_path):
    """In one process: each line is what --dataset and other flags come to."""
    data = {
        "shows/train.csv": ["a", "b"],
        "shows/validation.csv": ["c"],
        "shows/test.csv": ["d"],
        "two/north/train.csv": ["n"],
        "two/south/train.csv": ["s"],
    }
    root = tmp_path / "root"
    for name, texts in data.items():
        file = root / "datasets" / "acme" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("description\n" + "".join(f"{text}\n" for text in texts))
    card = "".join(
        f"- config_name: {name}\n  data_files: {name}/train.csv\n" for name in ("north", "south")
    )
    (root / "datasets/acme/two/README.md").write_text(f"---\nconfigs:\n{card}---\n")
    shutil.copytree(SAMPLE_MODEL, root / "models/acme/tiny")
    (root / "models/acme/tiny/config.json").unlink()
    (tmp_path / "own.csv").write_text("description\no\n")
    with serving(root) as hub:
        commit = hub.commit("models", "acme/tiny")
        asked = [
            "--dataset acme/shows",
            "--dataset acme/shows --validation_split none",
            "--dataset acme/shows --validation_split test --train_split validation",
            "--dataset acme/shows --eval_fraction 0",
            f"--dataset acme/two {tmp_path}/own.csv acme/shows --dataset_config_name south",
            f"--dataset acme/shows --validation_file {tmp_path}/own.csv",
            "--dataset acme/two",
            "--dataset acme/two --dataset_config_name east",
            "--dataset acme/shows --train_split dev",
        ]
        script = f"""
import json, sys
sys.path.insert(0, {str(REPO)!r})
from collections import Counter
from args import train_parser
from opt.data import texts
from opt.errors import UserError
from opt.model import weights
for flags in {asked!r}:
    try:
        found = texts.find(train_parser().parse_args(flags.split()))
        splits = {{s: [t.text for t in found.texts(s, Counter())] for s in found.splits}}
        print(json.dumps([splits, found.said]))
    except UserError as error:
        print(json.dumps(str(error)))
for revision in ({commit!r}, "gone"):
    try:
        folder = weights.locate("acme/tiny", revision, tokenizer_alone=True)
        print(json.dumps(sorted(f.name for f in folder.iterdir())))
    except UserError as error:
        print(json.dumps(str(error)))
"""
        (tmp_path / "ask.py").write_text(script)
        done = run(tmp_path / "ask.py", env=hub.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found[0] == [
        {"train": ["a", "b"], "held_out": ["c"]},
        "Hub, acme/shows, split train, held out: split validation, left aside: test",
    ]
    assert found[1] == [
        {"train": ["a", "b"]},
        "Hub, acme/shows, split train, left aside: validation, test",
    ]
    assert found[2][0] == {"train": ["c"], "held_out": ["d"]}
    assert found[3][0] == {"train": ["a", "b"]}
    assert found[4][0] == {"train": ["s", "o", "a", "b"], "held_out": ["c"]}
    assert found[5][0] == {"train": ["a", "b"], "held_out": ["o"]}
    for said, says in zip(
        found[6:9],
        [
            "several configurations: choose one of north, south",
            "'east': choose one of north, south",
            "no split 'dev': its splits are train, validation, test",
        ],
        strict=True,
    ):
        assert says in said
    assert "tokenizer.json" in found[9] and "model.safetensors" not in found[9]
    assert "--tokenizer_name acme/tiny" in found[10] and "not to be had from the Hub" in found[10]


def test_what_the_hub_does_not_have(hub, home):
    """Is the user's mistake, found by one question."""
    assert_refused(
        start(hub, home, "facebook/opt-351m", SAMPLE_DATA), "facebook/opt-351m", "no such model"
    )
    assert_refused(
        start(hub, home, SAMPLE_MODEL, "hugginglearners/shows"),
        "hugginglearners/shows",
        "a data set on the Hub",
    )
    assert len(hub.requests) == 2


@pytest.fixture(scope="module")
def dead_hub(root, tmp_path_factory):
    """What became of a run by what it asked a Hub in trouble for, with nothing cached: (process,
    requests)."""

    def one(mode, model, dataset):
        with serving(root) as hub:
            hub.mode = mode
            done = start(
                hub,
                tmp_path_factory.mktemp("home"),
                model,
                dataset,
                output=tmp_path_factory.mktemp("out"),
            )
            return done, hub.requests

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        asked = {
            "model": (MODEL, SAMPLE_DATA),
            "data set": (SAMPLE_MODEL, NETFLIX),
            "wikitext": (SAMPLE_MODEL, "wikitext-2-raw"),
        }
        yield {case: pool.submit(one, case[0], *asked[case[1]]) for case in DEAD}


@pytest.mark.parametrize("mode, what", DEAD)
def test_a_hub_that_does_not_answer(dead_hub, mode, what):
    """Costs HF_HUB_ETAG_TIMEOUT seconds at most: it is asked once."""
    done, requests = dead_hub[mode, what].result()
    name = {"model": MODEL, "data set": NETFLIX, "wikitext": "wikitext-2-raw"}[what]
    assert_refused(
        done,
        name,
        "not to be had from the Hub",
        {"error": "500", "silent": "timed out", "hang up": "aborted"}[mode],
    )
    assert len(requests) == 1


def test_what_is_cached_needs_no_hub(hub, home, tmp_path):
    """A model and a data set of an earlier run, with the Hub gone; but not a model that was
    downloaded by half."""
    for mode in ("serve", "silent"):
        hub.mode = mode
        done = start(hub, home, MODEL, NETFLIX, "--dry_run", output=tmp_path / "out")
        assert done.returncode == 0, done.stderr[-4000:]
        assert "pytorch_model.bin" in done.stdout
        assert "netflix-shows: 420 texts" in done.stdout
    assert "cached from the Hub, which does not answer" in done.stdout

    # What is known of the data set, torn by a power failure
    notes = (home / "xdg" / "opt-colossalai").glob("hub-*.json")
    note = max(notes, key=lambda file: file.stat().st_mtime_ns)
    note.write_text(note.read_text()[:9])
    done = start(hub, home, SAMPLE_MODEL, NETFLIX, "--dry_run", output=tmp_path / "out")
    assert_refused(done, NETFLIX, "not to be had from the Hub")

    (half,) = (home / "hub").glob("models--*/snapshots/*/pytorch_model.bin")
    half.unlink()
    done = start(hub, home, MODEL, NETFLIX, "--dry_run", output=tmp_path / "out")
    assert_refused(done, MODEL, "not to be had from the Hub")


def test_a_download_that_breaks_off(tmp_path):
    """In the middle of the weights: the run ends; half a file is not taken for the whole; the next
    run fetches the rest."""
    folder = tmp_path / "root" / "models" / MODEL
    folder.mkdir(parents=True)
    save_model(folder, ffn_dim=60_000)  # 31 MB: what arrives is written in pieces of 10
    with serving(tmp_path / "root") as hub:
        break_off(hub, tmp_path)


def break_off(hub, tmp_path):
    flags = ("--dry_run", "--no_save")
    hub.mode = "cut"
    done = start(hub, tmp_path, MODEL, SAMPLE_DATA, *flags, output=tmp_path / "out")
    said = [line for line in done.stderr.splitlines() if ": error: " in line]
    assert done.returncode == 2 and len(said) == 1 and "Traceback" not in done.stderr, done.stderr[
        -4000:
    ]
    assert "not to be had from the Hub" in said[0] and MODEL in said[0]
    assert not list((tmp_path / "hub").glob("models--*/snapshots/*/pytorch_model.bin"))
    whole = hub.repository("models", MODEL) / "pytorch_model.bin"
    halves = [
        file.stat().st_size for file in (tmp_path / "hub").glob("models--*/blobs/*.incomplete")
    ]
    assert whole.stat().st_size > max(halves) >= 10**7

    hub.mode = "serve"
    done = start(hub, tmp_path, MODEL, SAMPLE_DATA, *flags, output=tmp_path / "out")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "pytorch_model.bin" in done.stdout
    (loaded,) = (tmp_path / "hub").glob("models--*/snapshots/*/pytorch_model.bin")
    assert loaded.read_bytes() == whole.read_bytes()


def test_weights_of_an_old_torch(tmp_path):
    """Before 1.6 a .bin was no zip archive; the Hub still has such files."""
    save_model(tmp_path, _use_new_zipfile_serialization=False)
    meta = meta_model(load_config(tmp_path))
    loaded = weights.open_weights(tmp_path, meta, seed=0)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert set(loaded) == set(expected) - {"lm_head.weight"}
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
