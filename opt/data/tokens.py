"""Text -> tokens -> batches.

One process a node reads the texts, tokenizes them once and writes two flat arrays into a cache;
every process maps those into memory. A batch is a set of rows, one after the other, or padded on
the right to its own longest row.
"""

import hashlib
import json
import shutil
import tempfile
from argparse import Namespace
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from opt.data import texts
from opt.errors import UserError

_CACHE_VERSION = 3  # count up when the tokens of the same text change


@dataclass
class Counts:
    """What became of a data set's texts."""

    rows: int = 0  # kept
    empty: int = 0  # skipped: empty or missing
    truncated: int = 0  # cut at max_length
    tokens: int = 0
    # What else was not as it should be, in words, and how often
    notes: dict[str, int] = field(default_factory=dict)


class Rows:
    """Token rows of unequal length: one flat array and the offsets of its rows."""

    def __init__(self, directory: Path, split: str):
        self.tokens = np.load(directory / f"{split}.tokens.npy", mmap_mode="r")
        self.offsets = np.load(directory / f"{split}.offsets.npy")

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.diff(self.offsets)

    def checksum(self) -> str:
        """SHA-256 of all rows and where they end."""
        digest = hashlib.sha256(np.ascontiguousarray(self.offsets, np.int64))
        digest.update(self.tokens)
        return digest.hexdigest()


@dataclass
class Dataset:
    """The tokens of a data set: training rows, held-out rows, and what was counted on the way."""

    train: Rows
    held_out: Rows
    counts: Counts
    source: str  # where the texts came from, in words

    @property
    def longest(self) -> int:
        """Tokens of the longest row of all."""
        return int(max(rows.lengths.max(initial=0) for rows in (self.train, self.held_out)))


def load_tokenizer(directory: Path, **special_tokens: str):
    """The fast tokenizer of a model's directory; `special_tokens` (eos_token="</s>") replace its
    own. Raises UserError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, use_fast=True, **special_tokens)
    except Exception as error:
        # A missing or broken file surfaces as almost any exception, by tokenizer class
        raise UserError(
            f"{directory} has no usable tokenizer ({type(error).__name__}: {error}): it needs "
            "tokenizer.json, or vocab.json and merges.txt"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"{directory}: a fast tokenizer is needed, with tokenizer.json")
    return tokenizer


def special_tokens(directory: Path) -> set[str]:
    """Which special tokens (eos_token, ...) the tokenizer's files in a directory name."""
    named = set()
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = directory / name
        if not file.is_file():
            continue
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            named |= {key for key, value in content.items() if value is not None}
        except (ValueError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{file} cannot be read ({error}): download or copy it again"
            ) from error
    return named


def tokenize(plan: Namespace, tokenizer) -> Path:
    """Tokenize what --dataset names, or find it tokenized: the directory in the cache that Dataset
    is read from.

    To be run by one process a node. A row is BOS, the text, EOS; of wikitext-2-raw, a block of
    --max_length tokens of the whole text. Raises UserError.
    """
    dataset, max_length, eval_fraction = plan.dataset, plan.max_length, plan.eval_fraction
    source = texts.find(dataset, plan.text_column)
    key = [
        _CACHE_VERSION,
        source.identity(),
        source.said,
        plan.text_column,
        max_length,
        eval_fraction,
        plan.seed,
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    ]
    directory = texts.cache_folder() / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    if (directory / "counts.json").is_file():
        return directory

    counts, notes = Counts(), Counter()
    cut = _blocks if dataset == texts.WIKITEXT else _one_row_a_text
    rows = {
        split: cut(list(source.texts(split, notes)), tokenizer, max_length, counts)
        for split in source.files
    }
    counts.notes = dict(notes)
    if "held_out" not in rows:
        rows["train"], rows["held_out"] = _hold_out(rows["train"], eval_fraction, plan.seed)
    elif not eval_fraction:
        rows["held_out"] = []
    if not counts.rows:
        if not counts.empty:
            raise UserError(f"--dataset {dataset} has no rows")
        raise UserError(
            f"--dataset {dataset} has no text to train on: {counts.empty} of its texts are empty"
        )
    if not rows["train"] or (eval_fraction and not rows["held_out"]):
        raise UserError(
            f"--dataset {dataset} has {counts.rows} texts, too few to train on and hold out "
            f"{eval_fraction:g} of them: change --eval_fraction, or set it to 0"
        )
    counts.tokens = sum(map(len, rows["train"])) + sum(map(len, rows["held_out"]))

    try:
        _store(rows, asdict(counts) | {"source": source.said}, directory)
    except OSError as error:
        raise UserError(
            f"the tokens cannot be cached ({error}): choose another folder with XDG_CACHE_HOME"
        ) from error
    return directory


def _store(rows: dict[str, list], counts: dict, directory: Path) -> None:
    """Write the tokens, complete or absent: aside, then renamed."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=directory.parent))
    try:
        for split, split_rows in rows.items():
            np.save(
                new / f"{split}.tokens.npy",
                np.concatenate(
                    [np.asarray(r, np.int32) for r in split_rows] or [np.empty(0, np.int32)]
                ),
            )
            np.save(new / f"{split}.offsets.npy", np.cumsum([0, *map(len, split_rows)]))
        (new / "counts.json").write_text(json.dumps(counts))
        new.rename(directory)
    except OSError:
        shutil.rmtree(new)
        if not directory.is_dir():  # otherwise another run was here first
            raise


def open_dataset(directory: Path) -> Dataset:
    """The data set in a directory that tokenize() gave."""
    counts = json.loads((directory / "counts.json").read_text())
    source = counts.pop("source")
    return Dataset(Rows(directory, "train"), Rows(directory, "held_out"), Counts(**counts), source)


def _one_row_a_text(texts: list, tokenizer, max_length: int, counts: Counts) -> list[list[int]]:
    kept = [t for t in texts if t and t.strip()]
    counts.empty += len(texts) - len(kept)
    counts.rows += len(kept)
    rows = []
    # What is left of a text of megabytes needs no more than this: no token is longer than the
    # longest.
    enough = max_length * max(map(len, tokenizer.get_vocab()))
    kept = [t[:enough] for t in kept]
    # Special tokens are added here, once: OPT's tokenizers differ in whether they add a BOS, and
    # none adds an EOS.
    encoded = (
        tokenizer(kept, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        if kept
        else []
    )
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    for ids in encoded:
        row = [*start, *ids, tokenizer.eos_token_id]
        counts.truncated += len(row) > max_length
        rows.append(row[:max_length])
    return rows


def _blocks(texts: list, tokenizer, max_length: int, counts: Counts) -> list[list[int]]:
    texts = [t or "" for t in texts]
    counts.empty += sum(not t.strip() for t in texts)
    # Tokenized line by line, batched, as the fast tokenizer runs in parallel; the lines keep their
    # newlines.
    lines = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    stream = np.concatenate([np.asarray(ids, np.int32) for ids in (start, *lines)])
    # No last block of one token: it would have no target.
    rows = [stream[i : i + max_length].tolist() for i in range(0, len(stream) - 1, max_length)]
    counts.rows += len(rows)
    return rows


def _hold_out(rows: list, fraction: float, seed: int) -> tuple[list, list]:
    held_out = set(
        np.random.default_rng(seed).permutation(len(rows))[: round(len(rows) * fraction)].tolist()
    )
    return [r for i, r in enumerate(rows) if i not in held_out], [rows[i] for i in sorted(held_out)]
