"""Tokens of texts on disk -> rows: which texts are held out, and where a row begins and ends.

A text of more than --max_length tokens goes on in a next row, which begins with the last token of
the row before, so that each token but a text's first is a target once. With --block_size all texts
are joined, an end token between them, and cut into blocks.
"""

import hashlib
import json
import os
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

TEXT = np.dtype([("end", np.int64), ("context", np.int32)])  # of a text: in the split's tokens
ROW = np.dtype([("start", np.int64), ("length", np.int32), ("context", np.int32)])
_CHUNK = 2**20  # texts, rows or tokens that are worked on at a time


@dataclass
class Counts:
    """What became of a data set's texts."""

    texts: int = 0  # kept
    empty: int = 0  # skipped: empty or missing, or without a response
    tokens: int = 0  # in rows
    long: int = 0  # over --max_length
    cut: int = 0  # tokens of those that were cut away
    unanswered: int = 0  # rows left out: their response was cut away, or they are prompt alone
    # What else was not as it should be, in words, and how often
    notes: dict[str, int] = field(default_factory=dict)


class Rows:
    """Token rows of unequal length, mapped into memory."""

    def __init__(self, directory: Path, split: str):
        """`directory`: one that tokenize() gave; `split`: train or held_out."""
        self._tokens = mapped(directory / f"{split}.tokens", np.int32)
        rows = mapped(directory / f"{split}.rows", ROW)
        self._start = rows["start"]
        self.lengths = rows["length"]  # tokens of each row
        self.contexts = rows["context"]  # leading tokens of each row that are no targets
        facts = json.loads((directory / "counts.json").read_text())["splits"][split]
        self.shortest: int = facts["shortest"]  # tokens of the shortest row
        self.longest: int = facts["longest"]
        self.num_tokens: int = facts["tokens"]  # of all rows
        self.checksum: str = facts["checksum"]  # SHA-256 of all rows and where they end

    def __len__(self):
        return len(self._start)

    def __getitem__(self, i: int) -> np.ndarray:
        return self._tokens[self._start[i] : self._start[i] + self.lengths[i]]


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
        return max(self.train.longest, self.held_out.longest)


def open_dataset(directory: Path) -> Dataset:
    """The data set in a directory that tokenize() gave."""
    facts = json.loads((directory / "counts.json").read_text())
    rows = Rows(directory, "train"), Rows(directory, "held_out")
    return Dataset(*rows, Counts(**facts["counts"]), facts["source"])


def held_out(number: int, fraction: float, seed: int) -> np.ndarray:
    """Which of `number` texts are held out: (number,) of bool."""
    mask = np.zeros(number, bool)
    chosen = np.random.default_rng(seed).permutation(number)[: round(number * fraction)]
    mask[chosen] = True
    return mask


def first_of(mask: np.ndarray, number: int | None) -> np.ndarray:
    """The first `number` of those that `mask` has; all if None."""
    return mask if number is None else mask & (np.cumsum(mask) <= number)


def select(part: Path, source: str, split: str, mask: np.ndarray | None, plan, tokenizer) -> None:
    """Write SPLIT.tokens and SPLIT.all.chosen: the texts of `source` where `mask` is, or all."""
    tokens = mapped(part / f"{source}.all", np.int32)
    whole = mapped(part / f"{source}.all.texts", TEXT)
    first = start = total = 0
    with (
        open(part / f"{split}.tokens", "wb") as tokens_out,
        open(part / f"{split}.all.chosen", "wb") as texts_out,
    ):
        if plan.block_size and tokenizer.bos_token_id is not None:
            tokens_out.write(np.array([tokenizer.bos_token_id], np.int32))
        while first < len(whole):
            own = whole[first : first + 2**16]
            own = own[: max(1, np.searchsorted(own["end"], start + _CHUNK))]
            lengths = np.diff(own["end"], prepend=start)
            there, start = tokens[start : own["end"][-1]], int(own["end"][-1])
            chosen = None if mask is None else mask[first : first + len(own)]
            first += len(own)
            if chosen is not None and not chosen.all():
                there = there[np.repeat(chosen, lengths)] if chosen.any() else there[:0]
                own, lengths = own[chosen], lengths[chosen]
            tokens_out.write(there)
            texts_out.write(_texts(total + np.cumsum(lengths), own["context"]))
            total += int(lengths.sum())
        if plan.block_size and total:  # an end token between texts
            tokens_out.truncate(tokens_out.tell() - 4)


def _texts(ends: np.ndarray, contexts: np.ndarray) -> np.ndarray:
    table = np.empty(len(ends), TEXT)
    table["end"], table["context"] = ends, contexts
    return table


def hold_out_the_end(part: Path, fraction: float) -> None:
    """Move the last `fraction` of the training tokens to held_out.tokens."""
    tokens = mapped(part / "train.tokens", np.int32)
    keep = len(tokens) - round(len(tokens) * fraction)
    with open(part / "held_out.tokens", "wb") as out:
        out.write(tokens[keep:])
    os.truncate(part / "train.tokens", 4 * keep)


def cut(part: Path, split: str, plan: Namespace, counts: Counts) -> dict:
    """Write SPLIT.rows; what is to be known of them without a look at each."""
    if plan.block_size:
        size = (part / f"{split}.tokens").stat().st_size // 4
        samples = plan.max_train_samples if split == "train" else plan.max_eval_samples
        size = min(size, (samples or size) * plan.block_size)
        chunks = _blocks(size, plan.block_size)
    else:
        found = mapped(part / f"{split}.all.chosen", TEXT)
        chunks = _rows_of_texts(found, plan.max_length, plan.long_texts == "cut", counts)
    with open(part / f"{split}.rows", "wb") as out:
        for chunk in chunks:
            out.write(chunk)
    rows = mapped(part / f"{split}.rows", ROW)
    lengths = rows["length"]
    return {
        "rows": len(rows),
        "tokens": int(lengths.sum(dtype=np.int64)),
        "shortest": int(lengths.min(initial=plan.block_size or plan.max_length)),
        "longest": int(lengths.max(initial=0)),
        "checksum": _checksum(rows, mapped(part / f"{split}.tokens", np.int32)),
    }


def _blocks(size: int, length: int) -> Iterator[np.ndarray]:
    """Blocks of `length` of a stream of `size` tokens; no last one of one token, which would have
    no target."""
    for first in range(0, max(size - 1, 0), length * _CHUNK):
        starts = np.arange(first, min(first + length * _CHUNK, size - 1), length)
        rows = np.empty(len(starts), ROW)
        rows["start"], rows["context"] = starts, 1
        rows["length"] = np.minimum(size - starts, length)
        yield rows


def _rows_of_texts(
    whole: np.ndarray, length: int, cut: bool, counts: Counts
) -> Iterator[np.ndarray]:
    """Rows of at most `length` tokens; what goes on begins with the last token before it."""
    start = 0
    for first in range(0, len(whole), _CHUNK):
        own = whole[first : first + _CHUNK]
        starts = np.concatenate([[start], own["end"][:-1]])
        sizes, start = own["end"] - starts, own["end"][-1]
        is_long = sizes > length
        counts.long += int(is_long.sum())
        if cut:
            counts.cut += int((sizes[is_long] - length).sum())
            number = np.ones(len(own), np.int64)
        else:
            number = -(-(sizes - 1) // (length - 1))
        text = np.repeat(np.arange(len(own)), number)
        skipped = (np.arange(len(text)) - np.repeat(np.cumsum(number) - number, number)) * (
            length - 1
        )
        rows = np.empty(len(text), ROW)
        rows["start"] = starts[text] + skipped
        rows["length"] = np.minimum(sizes[text] - skipped, length)
        rows["context"] = np.clip(own["context"][text] - skipped, 1, length)
        answered = rows["length"] > rows["context"]
        counts.unanswered += int((~answered).sum())
        yield rows[answered]


def _checksum(rows: np.ndarray, tokens: np.ndarray) -> str:
    """SHA-256 of all rows and where they end."""
    digest, end = hashlib.sha256(np.zeros(1, np.int64)), 0
    for first in range(0, len(rows), _CHUNK):
        ends = end + np.cumsum(rows["length"][first : first + _CHUNK], dtype=np.int64)
        digest.update(ends)
        end = ends[-1]
    has_context = False
    for first in range(0, len(rows), _CHUNK // 64):
        own = rows[first : first + _CHUNK // 64]
        has_context |= bool((own["context"] != 1).any())
        starts, ends = own["start"], own["start"] + own["length"]
        if (starts[1:] == ends[:-1]).all():
            digest.update(tokens[starts[0] : ends[-1]])
            continue
        for start, stop in zip(starts, ends, strict=True):
            digest.update(tokens[start:stop])
    if has_context:
        digest.update(np.ascontiguousarray(rows["context"]))
    return digest.hexdigest()


def mapped(file: Path, dtype) -> np.ndarray:
    """A file of numbers, mapped into memory."""
    if not file.is_file() or not file.stat().st_size:
        return np.empty(0, dtype)
    return np.memmap(file, dtype, "r").view(np.ndarray)
