"""Texts to rows to batches: what every token of a data set becomes, and where it goes."""

import csv
import itertools
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, OPTConfig

from args import train_parser
from opt.colossal.processes import Place
from opt.data import files, texts, tokens
from opt.data.batches import PAD_TO, Batches, batches_an_epoch, collate, pack
from opt.data.rows import Counts, Dataset, Rows
from opt.errors import UserError
from opt.model.opt import OPTForCausalLM
from opt.train import plan

from .conftest import REPO, SAMPLE_MODEL, finish, run, start, stored, tokenize, train
from .hub import save_opt_tokenizer

TEXTS = [
    "A lighthouse keeper, her brother and a stolen map.",
    'He said "no", twice; the other one didn\'t.',
    "Café Zürich, 1931: жизнь on the run — in ten parts.",
    "One.",
    "the then there other on in an",
    *(f"Episode {i} of a series on the river that the old ferry crosses." for i in range(35)),
]


@pytest.fixture(scope="module", params=["adds BOS itself", "adds none"])
def tokenizer(request, tmp_path_factory):
    """The two kinds of tokenizer that OPT models ship."""
    directory = SAMPLE_MODEL
    if request.param == "adds BOS itself":
        directory = tmp_path_factory.mktemp("tokenizer")
        save_opt_tokenizer(directory)
    loaded = tokens.load_tokenizer(directory)
    assert (loaded("One.")["input_ids"][0] == loaded.bos_token_id) == (
        request.param == "adds BOS itself"
    )
    return loaded


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A tokenizer for the tests in which it makes no difference."""
    return tokens.load_tokenizer(SAMPLE_MODEL)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The cache of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "opt-colossalai"


def write(file: Path, texts: list, column="description") -> Path:
    """A data set of `texts` in the format that the file's name says; beside them a column of
    something else."""
    rows = [{"show_id": f"s{i}", column: text} for i, text in enumerate(texts)]
    if file.suffix == ".csv":
        with open(file, "w", newline="") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif file.suffix == ".txt":
        file.write_text("".join(f"{text}\n" for text in texts))
    else:
        import pandas

        pandas.DataFrame(rows).to_parquet(file)
    return file


def read(
    file, tokenizer, *flags, max_length=256, eval_fraction=0.0, seed=1, column="description"
) -> Dataset:
    return tokenize(file, column, max_length, eval_fraction, seed, tokenizer, *flags)


def as_lists(rows: Rows) -> list[list[int]]:
    return [rows[i].tolist() for i in range(len(rows))]


def test_a_row_is_bos_text_eos_once(tokenizer, cache, tmp_path):
    rows = as_lists(read(write(tmp_path / "d.csv", TEXTS), tokenizer).train)
    assert len(rows) == len(TEXTS)
    for text, row in zip(TEXTS, rows, strict=True):
        assert (row[0], row[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert not set(row[1:-1]) & set(tokenizer.all_special_ids)
        assert tokenizer.decode(row[1:-1], clean_up_tokenization_spaces=False) == text


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A tokenizer with a chat's markers, special ones and others, as transformers adds them."""
    folder = tmp_path_factory.mktemp("chat")
    chat = AutoTokenizer.from_pretrained(SAMPLE_MODEL)
    chat.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|bot|>"]})
    chat.add_tokens(["<<plain>>"])
    chat.save_pretrained(folder)
    return tokens.load_tokenizer(folder)


def test_a_chats_markers_are_tokens(chat, cache, tmp_path, monkeypatch):
    """In texts, however long, and in templates, as transformers has them."""
    text = "<|user|>Who is it?<|bot|>A ferry <<plain>> crosses.<|user|>Why?"
    wanted = chat(text, add_special_tokens=False)["input_ids"]
    assert {"<|user|>", "<|bot|>", "<<plain>>"} <= {*chat.convert_ids_to_tokens(wanted)}
    (row,) = as_lists(read(write(tmp_path / "d.jsonl", [text]), chat).train)
    assert row[1:-1] == wanted
    for module in (files, tokens):
        monkeypatch.setattr(module, "PART", 7)
    (row,) = as_lists(read(write(tmp_path / "e.jsonl", [f"{text} again"]), chat).train)
    assert row[1:-1] == chat(f"{text} again", add_special_tokens=False)["input_ids"]
    form = texts.Layout(train_parser().parse_args([]), tokens.control_tokens(chat))
    pieces = [*tokens._Encoder(chat, False, form).pieces(text * 9)]
    assert "".join(pieces) == text * 9 and len(pieces) > 2 * 9
    file = tmp_path / "qa.jsonl"
    file.write_text('{"q": "Who?", "a": "Me."}\n')
    template = "<|user|>{q}<|bot|>{a}"
    rows = read(file, chat, "--template", template, column=None).train
    prompt, answer = (
        chat(part, add_special_tokens=False)["input_ids"] for part in ("<|user|>Who?<|bot|>", "Me.")
    )
    assert as_lists(rows) == [[chat.bos_token_id, *prompt, *answer, chat.eos_token_id]]
    assert rows.contexts.tolist() == [1 + len(prompt)]


def test_a_chats_texts_in_pieces_have_the_tokens_of_the_whole(chat, cache, tmp_path, monkeypatch):
    """No marker is cut, wherever it stands."""
    monkeypatch.setattr(tokens, "PART", 5)
    monkeypatch.setattr(files, "PART", 7)
    monkeypatch.setattr(tokens, "_BATCH", 40)
    rng = np.random.default_rng(0)
    alphabet = [*"ab |<>.!-", " a", "é", "🙂", "I'll ", "<|user|>", "<|bot|>", "<<plain>>", "\n"]
    found = ["x" + "".join(rng.choice(alphabet, 60)) for _ in range(150)]
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps({"description": text}) + "\n" for text in found))
    expected = [chat(text, add_special_tokens=False)["input_ids"] for text in found]
    assert [row[1:-1] for row in as_lists(read(file, chat, max_length=512).train)] == expected


def test_a_control_token_is_one_in_templates_alone(plain, cache, tmp_path):
    """There the user means it; in a text it is characters, and counted."""
    file = tmp_path / "qa.jsonl"
    file.write_text('{"q": "a</s>b</s>", "a": "c"}\n{"q": "d", "a": "e<s>"}\n')
    dataset = read(file, plain, "--template", "{q}</s>\\n{a}!", column=None)
    end, start = plain.eos_token_id, plain.bos_token_id
    backend = type(plain.backend_tokenizer).from_str(plain.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    parts = [backend.encode(part).ids for part in ("a</s>b</s>", "\n", "c!")]
    assert as_lists(dataset.train)[0] == [start, *parts[0], end, *parts[1], *parts[2], end]
    assert dataset.counts.notes == {
        "texts with </s> as characters": 1,
        "texts with <s> as characters": 1,
    }
    assert start == end  # OPT's
    for template, says in (("</s>{q}: {a}", "begins"), ("{q}: {a}</s>\\n", "ends")):
        with pytest.raises(
            UserError, match=f"--template {says} with </s>, as each text does by itself"
        ):
            read(file, plain, "--template", template, column=None)


def test_every_file_format_gives_the_same_rows(plain, cache, tmp_path):
    found = {
        kind: as_lists(read(write(tmp_path / f"d.{kind}", TEXTS), plain).train)
        for kind in ("csv", "json", "jsonl", "txt", "parquet")
    }
    assert len(found["csv"]) == len(TEXTS)
    assert all(rows == found["csv"] for rows in found.values())


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_empty_and_missing_texts_are_skipped_and_counted(plain, cache, tmp_path, kind):
    missing = float("nan") if kind == "parquet" else None
    texts = ["One.", "", missing, "Two.", "  \t ", missing, "Three."]
    dataset = read(write(tmp_path / f"d.{kind}", texts), plain)
    assert [plain.decode(row[1:-1]) for row in as_lists(dataset.train)] == [
        "One.",
        "Two.",
        "Three.",
    ]
    assert (dataset.counts.texts, dataset.counts.empty) == (3, 4)


@pytest.mark.parametrize(
    "name, texts",
    [("d.csv", ["", None]), ("d.jsonl", [float("nan")] * 3), ("d.csv", [])],
    ids=["blank", "NaN", "no rows"],
)
def test_a_data_set_without_text_is_refused(plain, cache, tmp_path, name, texts):
    file = tmp_path / name
    write(file, texts or ["x"])
    if not texts:
        file.write_text(file.read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match="has no (text|rows)"):
        read(file, plain)


def test_a_data_set_too_small_to_split_is_refused(plain, cache, tmp_path):
    file = write(tmp_path / "d.csv", TEXTS[:2])
    for fraction in (0.05, 0.9):  # nothing to hold out; nothing left to train on
        with pytest.raises(UserError, match="2 texts, too few.*--eval_fraction"):
            read(file, plain, eval_fraction=fraction)


def test_long_texts_go_on_in_a_next_row(plain, cache, tmp_path):
    """Each token but a text's first is a target once, whatever the length of rows."""
    file = write(tmp_path / "d.csv", TEXTS)
    whole = read(file, plain)
    assert whole.counts.long == 0
    targets = sorted(sum((row[1:] for row in as_lists(whole.train)), []))
    for length in (2, 3, 12, 30):
        dataset = read(file, plain, max_length=length)
        rows = as_lists(dataset.train)
        assert dataset.counts.long == sum(whole.train.lengths > length) > 0
        assert max(map(len, rows)) <= length and min(map(len, rows)) >= 2
        assert sorted(sum((row[1:] for row in rows), [])) == targets
        for before, row in itertools.pairwise(rows):
            assert row[0] == (
                plain.bos_token_id if before[-1] == plain.eos_token_id else before[-1]
            )
        assert dataset.counts.tokens == sum(dataset.train.lengths) == dataset.train.num_tokens


def test_long_texts_are_cut_and_counted(plain, cache, tmp_path):
    file = write(tmp_path / "d.csv", TEXTS)
    whole, cut = read(file, plain), read(file, plain, "--long_texts", "cut", max_length=12)
    assert as_lists(cut.train) == [row[:12] for row in as_lists(whole.train)]
    assert cut.counts.long == sum(whole.train.lengths > 12) > 0
    assert cut.counts.cut == sum(np.maximum(whole.train.lengths - 12, 0))
    assert cut.counts.tokens == sum(cut.train.lengths)


def test_texts_are_joined_to_blocks(plain, cache, tmp_path):
    """An end token between them; of a txt its line breaks too. No last block of one token, which
    would have no target, and so a step no loss."""
    end = plain.eos_token_id

    def ids(text):
        return plain(text, add_special_tokens=False)["input_ids"]

    joined = [plain.bos_token_id, *sum(([*ids(text), end] for text in TEXTS), [])[:-1]]
    text = "\n\n".join(TEXTS) + "\n"
    (tmp_path / "book.txt").write_text(text)
    (tmp_path / "other.txt").write_text(text.replace("\n", "\r\n"))
    book = [plain.bos_token_id, *ids(text)]
    for found, whole in (
        ([write(tmp_path / "d.jsonl", TEXTS)], joined),
        ([tmp_path / "book.txt"], book),
        ([tmp_path / "book.txt", tmp_path / "other.txt"], [*book, end, *book[1:]]),
    ):
        for length in (2, 7, 50, len(whole) - 1, len(whole), len(whole) + 1):
            blocks = as_lists(read(found, plain, "--block_size", length).train)
            left_out = len(whole) % length == 1
            assert sum(blocks, []) == whole[: len(whole) - left_out]
            assert all(len(block) == length for block in blocks[:-1]) and len(blocks[-1]) >= 2

    # Texts, or of a single one the end, are held out: no token is lost or in both.
    single = read(tmp_path / "book.txt", plain, "--block_size", 16, eval_fraction=0.1)
    rows = as_lists(single.train) + as_lists(single.held_out)
    assert sum(rows, []) == book and len(single.held_out) == -(-round(0.1 * len(book)) // 16)
    flags = ("--block_size", 16, "--max_train_samples", 3, "--max_eval_samples", 2)
    few = read(tmp_path / "book.txt", plain, *flags, eval_fraction=0.1)
    assert as_lists(few.train) == as_lists(single.train)[:3]
    assert as_lists(few.held_out) == as_lists(single.held_out)[:2]
    split = read(tmp_path / "d.jsonl", plain, "--block_size", 16, eval_fraction=0.2)
    both = [sum(as_lists(rows), []) for rows in (split.train, split.held_out)]
    assert sum(map(len, both)) == len(joined) and min(map(len, both)) > 0.1 * len(joined)
    assert all(
        sum(text in plain.decode(ids).split("</s>") for ids in both) == 1 for text in TEXTS[:5]
    )


def test_a_text_in_pieces_has_the_tokens_of_the_whole(plain, cache, tmp_path, monkeypatch):
    """As long ones are tokenized; whatever is in them. In one row, and joined."""
    monkeypatch.setattr(tokens, "PART", 5)
    monkeypatch.setattr(files, "PART", 7)
    monkeypatch.setattr(tokens, "_BATCH", 40)
    rng = np.random.default_rng(0)
    alphabet = [
        *"ab 'st12.,!-_\t",
        "  ",
        " a",
        "é",
        "́",
        "中",
        "。",
        "🙂",
        "½",
        "I'll ",
        "</s>",
        "\n",
    ]
    found = ["x" + "".join(rng.choice(alphabet, 60)) for _ in range(150)]
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps({"description": text}) + "\n" for text in found))
    backend = type(plain.backend_tokenizer).from_str(plain.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    expected = [backend.encode(text, add_special_tokens=False).ids for text in found]
    assert [row[1:-1] for row in as_lists(read(file, plain).train)] == expected
    (tmp_path / "d.txt").write_text("".join(found))
    blocks = as_lists(read(tmp_path / "d.txt", plain, "--block_size", 64).train)
    whole = backend.encode("".join(found), add_special_tokens=False).ids
    assert sum(blocks, [])[1:] == whole[: len(sum(blocks, [])) - 1]


def test_samples(plain, cache, tmp_path):
    """--max_train_samples texts are left when others are held out; no more is read than that."""
    file = write(tmp_path / "d.csv", TEXTS)
    everything = as_lists(read(file, plain).train)
    dataset = read(file, plain, "--max_train_samples", 8, eval_fraction=0.2)
    rows = as_lists(dataset.train), as_lists(dataset.held_out)
    assert tuple(map(len, rows)) == (8, 2)
    assert sorted(rows[0] + rows[1]) == sorted(everything[:10])
    few = read(file, plain, "--max_train_samples", 8, "--max_eval_samples", 1, eval_fraction=0.2)
    assert (as_lists(few.train), as_lists(few.held_out)) == (rows[0], rows[1][:1])


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        (("--max_train_samples", 3), (3, 1)),  # and not none held out
        (("--max_train_samples", 3, "--max_eval_samples", 2), (3, 2)),
        (("--max_train_samples", 3, "--max_eval_samples", 99), (3, 4)),  # of all that there are
    ],
)
def test_few_samples(plain, cache, tmp_path, flags, sizes):
    file = write(tmp_path / "d.csv", TEXTS)
    dataset = read(file, plain, *flags, eval_fraction=0.1)
    assert (len(dataset.train), len(dataset.held_out)) == sizes
    assert dataset.counts.texts == sum(sizes)
    assert not {*map(tuple, dataset.train)} & {*map(tuple, dataset.held_out)}


def test_held_out_rows_are_not_trained_on(plain, cache, tmp_path):
    file = write(tmp_path / "d.csv", TEXTS)
    everything = as_lists(read(file, plain).train)
    splits = {}
    for seed in (1, 2):
        dataset = read(file, plain, eval_fraction=0.2, seed=seed)
        train_rows, held_out = as_lists(dataset.train), as_lists(dataset.held_out)
        assert len(held_out) == round(0.2 * len(TEXTS))
        assert sorted(train_rows + held_out) == sorted(everything)  # the texts are all different
        splits[seed] = held_out
    assert splits[1] != splits[2]
    assert as_lists(read(file, plain, eval_fraction=0.2, seed=1).held_out) == splits[1]


# ---- batches


PAD = 1
LENGTHS = st.lists(st.integers(2, 9), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 5), st.integers(1, 4), st.sampled_from([None, 0, 7]))
def test_an_epoch_is_every_row_once(lengths, batch_size, dp_size, seed):
    with tempfile.TemporaryDirectory() as directory:
        rows = stored(lengths, directory)
        ranks = [Batches(rows, batch_size, rank, dp_size, PAD, seed) for rank in range(dp_size)]
        # Strict: as many on every rank
        steps = list(zip(*(rank.epoch(3) for rank in ranks), strict=True))
        assert len(steps) == batches_an_epoch(len(lengths), batch_size, dp_size)

        seen = []
        for batches in steps:
            ids, labels = ([b.inputs[name] for b in batches] for name in ("input_ids", "labels"))
            real = [(x != PAD) for x in ids]
            # All the ranks' tensors together hold what each batch says that they do.
            for batch in batches:
                assert batch.tokens == sum(int(r.sum()) for r in real)
                assert batch.targets == sum(int((y[:, 1:] != -100).sum()) for y in labels) > 0
            for x, y, r in zip(ids, labels, real, strict=True):
                assert len(x) == batch_size
                assert torch.equal(y[:, 1:], torch.where(r, x, -100)[:, 1:])
                assert (y[:, 0] == -100).all()
                own = [int(row[0]) - 10 for row in x if row[0] != PAD]
                seen += own
                # Padded on the right, to a multiple of PAD_TO that the longest row of all ranks
                # needs, and to no more than the longest row of all batches.
                assert [int(n) for n in r.sum(1)] == [lengths[i] for i in own] + [0] * (
                    batch_size - len(own)
                )
                assert bool((r[:, :-1] >= r[:, 1:]).all())
                longest = max(int(r.sum(1).max()) for r in real)
                assert x.shape[1] == min(-(-longest // PAD_TO) * PAD_TO, max(lengths))
        assert sorted(seen) == list(range(len(lengths)))


@settings(max_examples=20, deadline=None)
@given(LENGTHS, st.integers(1, 4))
def test_no_rank_is_idle_while_another_has_two_rows_more(lengths, dp_size):
    with tempfile.TemporaryDirectory() as directory:
        rows = stored(lengths, directory)
        for batches in zip(
            *(Batches(rows, 4, rank, dp_size, PAD, 0).epoch() for rank in range(dp_size)),
            strict=True,
        ):
            held = [int((b.inputs["input_ids"][:, 0] != PAD).sum()) for b in batches]
            assert max(held) - min(held) <= 1


def test_ranks_have_about_as_many_tokens_and_the_same_shapes(tmp_path):
    """The slowest decides, and a shape that one rank meets first holds up the others."""
    lengths = np.random.default_rng(0).integers(20, 61, 32 * 100)
    rows = stored(lengths, tmp_path)
    most = []
    for batches in zip(*(Batches(rows, 8, rank, 4, PAD, 0, True).epoch() for rank in range(4))):  # noqa: B905
        assert len({b.inputs["input_ids"].shape for b in batches}) == 1
        own = [int(b.inputs["cu_seqlens"][8]) for b in batches]
        most.append(max(own) / np.mean(own))
    assert np.mean(most) < 1.03  # dealt out in turn: 1.11


def test_a_prompt_has_no_loss(tmp_path):
    """Of a row, packed or padded, the targets are those behind its context."""
    contexts = [3, 1, 4, 2]
    rows = stored([5, 4, 7, 3], tmp_path, contexts=contexts)
    for packed in (False, True):
        (batch,) = Batches(rows, 4, 0, 1, PAD, None, packed).epoch()
        ids, labels = (batch.inputs[name] for name in ("input_ids", "labels"))
        assert batch.targets == sum([5, 4, 7, 3]) - sum(contexts)
        counts = [int((labels[ids == 10 + i] != -100).sum()) for i in range(4)]
        assert counts == [2, 3, 3, 1]
        assert torch.equal(labels[labels != -100], ids[labels != -100])


def test_each_epoch_has_its_own_order_which_stays(tmp_path):
    batches = Batches(stored([3] * 50, str(tmp_path)), 4, 0, 1, PAD, seed=5)
    orders = [
        [b.inputs["input_ids"][:, 0].tolist() for b in batches.epoch(number)]
        for number in (0, 1, 0)
    ]
    assert orders[0] == orders[2] != orders[1]
    unseeded = Batches(batches.rows, 50, 0, 1, PAD, seed=None)
    assert next(unseeded.epoch(1)).inputs["input_ids"][:, 0].tolist() == list(range(10, 60))


def small_opt(**config) -> OPTForCausalLM:
    sizes = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 16}
    return OPTForCausalLM(OPTConfig(**sizes, **config)).eval()


def test_pads_are_in_no_loss(tmp_path):
    """The loss of a padded batch is the sum of its rows' losses one by one, whatever the pads
    are."""
    torch.manual_seed(0)
    lengths = [2, 9, 5]
    model = small_opt()
    rows = [
        np.random.default_rng(i).integers(4, 64, n).astype(np.int32) for i, n in enumerate(lengths)
    ]
    with torch.no_grad():
        alone = sum(model(**collate([row], [1], 1, len(row), PAD))["loss"] for row in rows)
        for pad in (PAD, 33):
            together = model(**collate(rows, [1] * 3, 4, 9, pad))[
                "loss"
            ]  # and a fourth row of pads alone
            assert together.item() == pytest.approx(alone.item(), rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 12), st.integers(1, 3), st.integers(1, 3))
def test_rows_without_pads(lengths, each, dp_size, microbatches):
    """Every row once and whole between its bounds; what fills a batch up is one row more, of pads,
    no longer than the others, and of several micro-batches of one shape two."""
    fills = 1 if microbatches == 1 else 2
    with tempfile.TemporaryDirectory() as directory:
        rows = stored(lengths, directory)
        seen = []
        for batches in zip(
            *(
                Batches(
                    *(rows, each * microbatches, rank, dp_size, PAD, 0, True, microbatches)
                ).epoch()
                for rank in range(dp_size)
            ),
            strict=True,
        ):
            targets = 0
            for batch in batches:
                inputs = [batch.inputs[name] for name in ("input_ids", "labels", "cu_seqlens")]
                assert inputs[0].shape == inputs[1].shape == (microbatches, inputs[0].shape[1])
                for ids, labels, ends in zip(
                    *inputs[:2], inputs[2].view(microbatches, -1), strict=True
                ):
                    assert len(ids) == ends[-1]
                    assert (len(ends), ends[0], ends.dtype) == (each + 1 + fills, 0, torch.int32)
                    parts = ids.split(ends.diff().tolist())
                    seen += [row.tolist() for row in parts[:-fills] if len(row)]
                    for fill in parts[-fills:]:
                        assert (fill == PAD).all() and len(fill) <= max(lengths)
                    starts = {int(start) for start in ends[:-1]}
                    first_pad = int(ends[-1 - fills])
                    real = [i not in starts and i < first_pad for i in range(int(ends[-1]))]
                    assert torch.equal(labels, torch.where(torch.tensor(real), ids, -100))
                    targets += sum(real)
            assert {batch.targets for batch in batches} == {targets}
        assert sorted(seen) == sorted(rows[i].tolist() for i in range(len(rows)))


def test_few_shapes_and_few_pads(tmp_path):
    """Of 400 batches of 32 rows of 20 to 60 tokens: a shape is a CUDA graph to record."""
    lengths = np.random.default_rng(0).integers(20, 61, 32 * 400)
    batches = [
        batch.inputs["input_ids"]
        for batch in Batches(stored(lengths, str(tmp_path)), 32, 0, 1, PAD, 0, True).epoch()
    ]
    assert len({ids.shape for ids in batches}) <= 10
    assert lengths.sum() / sum(ids.numel() for ids in batches) > 0.95


def test_packed_rows_are_strangers_to_each_other(tmp_path):
    """The loss of each row is what it is alone, and to the last bit the same whatever its
    neighbours are."""
    torch.manual_seed(0)
    model = small_opt(init_std=0.5)
    model.longest_row = 9
    rows = [
        np.random.default_rng(i).integers(4, 64, n).astype(np.int32)
        for i, n in enumerate([7, 9, 5])
    ]

    def loss(rows, of):
        inputs = pack(rows, [1] * 3, 3, 9, PAD)
        start, end = inputs["cu_seqlens"][of : of + 2]
        inputs["labels"][0, :start] = inputs["labels"][0, end:] = -100
        with torch.no_grad():
            return model(**inputs)["loss"].item()

    for i, row in enumerate(rows):
        with torch.no_grad():
            alone = model(**collate([row], [1], 1, len(row), PAD))["loss"].item()
        assert loss(rows, i) == pytest.approx(alone, rel=1e-5)
        assert loss(
            [row if j == i else (other + 7) % 60 for j, other in enumerate(rows)], i
        ) == loss(rows, i)


@pytest.mark.parametrize(
    "lengths, flags, device, expected",
    [
        ([20, 40, 60], "", "cpu", True),
        ([56, 60, 60], "", "cuda", False),  # few pads
        ([20, 20, 500], "", "cpu", False),  # few rows much longer than the rest
        ([20, 20, 500], "", "cuda", True),
        ([20, 40, 60], "--plugin hybrid_parallel --pp_size 2", "cuda", True),
        ([20, 40, 60], "--plugin hybrid_parallel --pp_size 2", "cpu", False),
        ([20, 40, 60], "--no-padding_free", "cuda", False),
        ([60, 60, 60], "--padding_free", "cpu", True),
    ],
)
def test_where_rows_are_packed(tmp_path, lengths, flags, device, expected):
    flags = train_parser().parse_args(flags.split())
    rows = stored(lengths, str(tmp_path))
    dataset = Dataset(rows, rows, Counts(), "")
    settled = flags.but(pp_size=flags.pp_size or 1)
    here = Place(0, 1, 0, torch.device(device))
    assert plan.is_padding_free(settled, here, dataset) is expected


# ---- once


def test_tokenized_once(tmp_path):
    """By two processes, and not again by the next run."""
    env = {"XDG_CACHE_HOME": str(tmp_path / "xdg"), "CUDA_VISIBLE_DEVICES": ""}
    root = tmp_path / "xdg" / "opt-colossalai"
    flags = ("--max_train_steps", 1, "--no_save", "--batch_size", 4, "--eval_fraction", 0.01)
    train(tmp_path / "out", *flags, nproc=2, env=env)
    # One, complete, and nothing half written beside it
    (entry,) = (f for f in root.iterdir() if f.suffix != ".lock")
    assert {f.name for f in entry.iterdir()} == {
        "counts.json",
        *(f"{split}.{part}" for split in ("train", "held_out") for part in ("tokens", "rows")),
    }
    # A folder's time changes with every file made or removed in it: new tokens are written aside,
    # in `root`.
    before = [(f, f.stat().st_mtime_ns) for f in (root, entry, *sorted(entry.iterdir()))]
    train(tmp_path / "out", *flags, "--dry_run", env=env)
    assert [(f, f.stat().st_mtime_ns) for f, _ in before] == before


def test_other_settings_are_other_tokens(plain, cache, tmp_path):
    file = write(tmp_path / "d.csv", TEXTS)
    variants = [
        {},
        {"max_length": 9},
        {"eval_fraction": 0.2},
        {"eval_fraction": 0.2, "seed": 2},
        {"column": "show_id"},
    ]
    for i, settings_ in enumerate(variants, 1):
        read(file, plain, **settings_)
        assert len([f for f in cache.iterdir() if f.is_dir()]) == i
    write(file, TEXTS[1:])  # another content under the same name
    assert len(read(file, plain).train) == len(TEXTS) - 1
    assert len([f for f in cache.iterdir() if f.is_dir()]) == len(variants) + 1
    # The same content: its tokens are not said to come from elsewhere
    other = file.rename(tmp_path / "other.csv")
    assert read(other, plain).source == f"local file {other}"


def test_one_process_a_node_works_and_all_get_its_result(tmp_path):
    """Its exception too."""
    script = tmp_path / "worker.py"
    script.write_text(f"""
import sys, time
sys.path.insert(0, {str(REPO)!r})
from opt.colossal import processes

def say(what):
    sys.stdout.write(what + "\\n")

here = processes.place()
processes.start(here, timeout_minutes=0.05)
processes._BEAT = 0.5

def work(fails):
    time.sleep(0 if fails else 5)  # longer than a collective waits
    say(f"worked {{here.rank}}")
    if fails:
        raise KeyError("broken")
    return here.rank + 10

say(f"result {{processes.node_first(here, lambda: work(False))}}")
try:
    processes.node_first(here, lambda: work(True))
except KeyError as error:
    say(f"error {{error}}")
processes.stop()
""")
    done = run(script, nproc=2, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    assert (
        sorted(done.stdout.splitlines())
        == ["error 'broken'"] * 2 + ["result 10"] * 2 + ["worked 0"] * 2
    )


def test_killed_while_it_tokenizes(plain, cache, tmp_path):
    """Another run of the same texts waits, takes over when the first is killed, and goes on where
    that one was; what it leaves is what one run alone leaves."""
    file = tmp_path / "d.jsonl"
    words = " ".join(TEXTS)
    rows = ({"description": f"{i} {words[i % 900 :]}"} for i in range(1500))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--dataset", str(file), "--max_length", "64", "--eval_fraction", "0.1"]
    script = tmp_path / "worker.py"
    script.write_text(f"""
import sys, time
sys.path.insert(0, {str(REPO)!r})
from args import train_parser
from opt.data import tokens
tokens._BATCH, tokens._SAVED_EVERY, pause = 30_000, 100_000, float(sys.argv[1])
one, done = tokens._Encoder.__call__, [0]
def encode(self, batch):
    time.sleep(pause)
    done[0] += sum(map(len, batch))
    return one(self, batch)
tokens._Encoder.__call__ = encode
tokenizer = tokens.load_tokenizer({str(SAMPLE_MODEL)!r})
print(tokens.tokenize(train_parser().parse_args({flags!r}), tokenizer), done[0], flush=True)
""")
    env = {"XDG_CACHE_HOME": str(tmp_path / "xdg")}
    first = start(script, 0.2, env=env)
    deadline = time.monotonic() + 90
    while not list(cache.glob("*.part/train.all.json")):
        assert time.monotonic() < deadline and first.poll() is None, first.communicate()
        time.sleep(0.05)
    second = start(script, 0, env=env)
    assert second.stdout.readline() == "waiting for another run, which tokenizes the same texts\n"
    first.kill()
    finish(first, 10)
    done = finish(second, 60)
    assert done.returncode == 0 and "going on from there" in done.stdout, done.stderr
    directory, characters = done.stdout.splitlines()[-1].split()
    total = sum(len(json.loads(line)["description"]) for line in file.read_text().splitlines())
    assert 0 < int(characters) <= total - 100_000
    # Where no other run is, and nothing was begun
    alone = finish(start(script, 0, env={"XDG_CACHE_HOME": str(tmp_path / "other")}), 60)
    other = Path(alone.stdout.split()[0])
    assert {f.name: f.read_bytes() for f in Path(directory).iterdir()} == {
        f.name: f.read_bytes() for f in other.iterdir()
    }


@pytest.mark.parametrize("file", ["train.tokens", "held_out.rows", "counts.json"])
def test_a_damaged_cache_is_made_anew(plain, cache, tmp_path, capfd, file):
    """As a power failure or a quota leaves files: shorter than they were."""
    texts = write(tmp_path / "d.csv", TEXTS)
    whole = read(texts, plain, eval_fraction=0.2)
    rows = [row.tolist() for row in whole.train]
    (entry,) = (f for f in cache.iterdir() if f.is_dir())
    del whole  # which has the files mapped
    os.truncate(entry / file, (entry / file).stat().st_size // 2)
    again = read(texts, plain, eval_fraction=0.2)
    assert [row.tolist() for row in again.train] == rows
    assert f"{entry} is damaged: tokenizing anew" in capfd.readouterr().out
    read(texts, plain, eval_fraction=0.2)
    assert not capfd.readouterr().out


def test_a_cache_that_cannot_be_written_is_the_users_to_mend(plain, cache, tmp_path, monkeypatch):
    file = write(tmp_path / "d.csv", TEXTS)
    (tmp_path / "a file").touch()
    monkeypatch.setitem(os.environ, "XDG_CACHE_HOME", str(tmp_path / "a file"))
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        read(file, plain)
