"""Text -> tokens -> batches.

One process a node reads the texts, tokenizes them once and writes two flat arrays into a cache; every process maps those
into memory. A batch is a set of rows, one after the other, or padded on the right to its own longest row.
"""

import hashlib
import itertools
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from args import UserError
from opt.data import texts
from opt.model.loss import IGNORE

PAD_TO = 8  # a batch's length is a multiple of this: few different shapes, and sizes that tensor cores like
_CACHE_VERSION = 3  # count up when the tokens of the same text change


@dataclass
class Counts:
    """What became of a data set's texts."""

    rows: int = 0  # kept
    empty: int = 0  # skipped: empty or missing
    truncated: int = 0  # cut at max_length
    tokens: int = 0
    notes: dict[str, int] = field(default_factory=dict)  # what else was not as it should be, in words, and how often


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


def load_tokenizer(directory: Path):
    """The fast tokenizer of a model's directory. Raises UserError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, use_fast=True)
    except Exception as error:  # a missing or broken file surfaces as almost any exception, by tokenizer class
        raise UserError(
            f"{directory} has no usable tokenizer ({type(error).__name__}: {error}): it needs tokenizer.json, or vocab.json and merges.txt"
        ) from error
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise UserError(f"{directory}: a fast tokenizer with an end token is needed")
    return tokenizer


def tokenize(dataset: str, text_column: str, max_length: int, eval_fraction: float, seed: int, tokenizer) -> Path:
    """Tokenize a data set, or find it tokenized: the directory in the cache that Dataset is read from.

    To be run by one process a node. A row is BOS, the text, EOS; of wikitext-2-raw, a block of `max_length` tokens of the
    whole text. Raises UserError.
    """
    source = texts.find(dataset, text_column)
    key = [
        _CACHE_VERSION,
        source.identity(),
        source.said,
        text_column,
        max_length,
        eval_fraction,
        seed,
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    ]
    directory = texts.cache_folder() / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    if (directory / "counts.json").is_file():
        return directory

    counts, notes = Counts(), Counter()
    cut = _blocks if dataset == texts.WIKITEXT else _one_row_a_text
    rows = {split: cut(list(source.texts(split, notes)), tokenizer, max_length, counts) for split in source.files}
    counts.notes = dict(notes)
    if "held_out" not in rows:
        rows["train"], rows["held_out"] = _hold_out(rows["train"], eval_fraction, seed)
    elif not eval_fraction:
        rows["held_out"] = []
    if not counts.rows:
        if not counts.empty:
            raise UserError(f"--dataset {dataset} has no rows")
        raise UserError(f"--dataset {dataset} has no text to train on: {counts.empty} of its texts are empty")
    if not rows["train"] or (eval_fraction and not rows["held_out"]):
        raise UserError(
            f"--dataset {dataset} has {counts.rows} texts, too few to train on and hold out {eval_fraction:g} of them: change --eval_fraction, or set it to 0"
        )
    counts.tokens = sum(map(len, rows["train"])) + sum(map(len, rows["held_out"]))

    try:
        _store(rows, asdict(counts) | {"source": source.said}, directory)
    except OSError as error:
        raise UserError(f"the tokens cannot be cached ({error}): choose another folder with XDG_CACHE_HOME") from error
    return directory


def _store(rows: dict[str, list], counts: dict, directory: Path) -> None:
    """Write the tokens, complete or absent: aside, then renamed."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=directory.parent))
    try:
        for split, split_rows in rows.items():
            np.save(new / f"{split}.tokens.npy", np.concatenate([np.asarray(r, np.int32) for r in split_rows] or [np.empty(0, np.int32)]))
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
    # What is left of a text of megabytes needs no more than this: no token is longer than the longest.
    enough = max_length * max(map(len, tokenizer.get_vocab()))
    kept = [t[:enough] for t in kept]
    # Special tokens are added here, once: OPT's tokenizers differ in whether they add a BOS, and none adds an EOS.
    encoded = tokenizer(kept, add_special_tokens=False, return_attention_mask=False)["input_ids"] if kept else []
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    for ids in encoded:
        row = [*start, *ids, tokenizer.eos_token_id]
        counts.truncated += len(row) > max_length
        rows.append(row[:max_length])
    return rows


def _blocks(texts: list, tokenizer, max_length: int, counts: Counts) -> list[list[int]]:
    texts = [t or "" for t in texts]
    counts.empty += sum(not t.strip() for t in texts)
    # Tokenized line by line, batched, as the fast tokenizer runs in parallel; the lines keep their newlines.
    lines = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    stream = np.concatenate([np.asarray(ids, np.int32) for ids in (start, *lines)])
    # No last block of one token: it would have no target.
    rows = [stream[i : i + max_length].tolist() for i in range(0, len(stream) - 1, max_length)]
    counts.rows += len(rows)
    return rows


def _hold_out(rows: list, fraction: float, seed: int) -> tuple[list, list]:
    held_out = set(np.random.default_rng(seed).permutation(len(rows))[: round(len(rows) * fraction)].tolist())
    return [r for i, r in enumerate(rows) if i not in held_out], [rows[i] for i in sorted(held_out)]


def batches_an_epoch(rows: int, batch_size: int, dp_size: int) -> int:
    """How many batches each data-parallel rank has of `rows` rows, the last one filled up."""
    return -(-rows // (batch_size * dp_size))


class Batches:
    """The batches of one data-parallel rank: an epoch's rows in a seeded order, each row once, the same number of
    batches on every rank. The last one is filled up with rows that have no target."""

    def __init__(self, rows: Rows, batch_size: int, dp_rank: int, dp_size: int, pad_id: int, seed: int | None, padding_free: bool = False):
        self.rows, self.batch_size, self.pad_id, self.padding_free = rows, batch_size, pad_id, padding_free
        self.dp_rank, self.dp_size, self.seed = dp_rank, dp_size, seed

    def __len__(self):
        """Batches an epoch."""
        return batches_an_epoch(len(self.rows), self.batch_size, self.dp_size)

    def epoch(self, number: int = 0, done: int = 0) -> Iterator["Batch"]:
        """The batches of epoch `number`, in the same order whenever it is asked for; in the rows' own order if unseeded.

        `done`: leave out as many rows, those that a run had done when it stopped, whatever its batches were.
        """
        order = np.arange(len(self.rows))
        if self.seed is not None:
            np.random.default_rng((self.seed, number)).shuffle(order)
        lengths = self.rows.lengths
        per_step = self.batch_size * self.dp_size
        for start in range(done, len(order), per_step):
            everyone = order[start : start + per_step]
            # Dealt out in turn, so that a last step with few rows gives every rank its share.
            own = [self.rows[j] for j in everyone[self.dp_rank :: self.dp_size]]
            # Every rank knows every row's length: no rank has to ask the others what they hold.
            tokens = int(lengths[everyone].sum())
            if self.padding_free:
                inputs = pack(own, self.batch_size, int(lengths.max()), self.pad_id)
            else:
                # No pads beyond the longest row of all: the model may have no positions there.
                length = min(-(-int(lengths[everyone].max()) // PAD_TO) * PAD_TO, int(lengths.max()))
                inputs = collate(own, self.batch_size, length, self.pad_id)
            yield Batch(inputs, targets=tokens - len(everyone), tokens=tokens, rows=len(everyone))

    def steps(self, start: "Position", num_epoch: int, accumulated: int) -> Iterator[tuple["Position", list["Batch"]]]:
        """From `start` to the end of the last epoch: `accumulated` batches an optimizer step, and where the run is after it.

        The last step of an epoch takes what is left.
        """
        step, done = start.step, start.rows
        for epoch in range(start.epoch, num_epoch):
            batches = self.epoch(epoch, done)
            while group := list(itertools.islice(batches, accumulated)):
                step, done = step + 1, done + sum(batch.rows for batch in group)
                ended = done == len(self.rows)
                yield Position(step, epoch + 1, 0) if ended else Position(step, epoch, done), group
            done = 0


@dataclass(frozen=True)
class Position:
    """How far a run has come. In rows over all data-parallel ranks: another number of them can go on from it."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # the epoch that the next row belongs to
    rows: int = 0  # rows of that epoch done


@dataclass
class Batch:
    """One rank's rows of a step, and what the rows of all ranks hold together."""

    inputs: dict[str, torch.Tensor]  # what collate or pack gives, on the host
    targets: int  # tokens that the loss is summed over: all but each row's first, over all data-parallel ranks
    tokens: int  # real tokens, over all data-parallel ranks
    rows: int  # over all data-parallel ranks


def collate(rows: list[np.ndarray], batch_size: int, length: int, pad_id: int) -> dict[str, torch.Tensor]:
    """Rows as a batch {input_ids, labels}, both (batch_size, length), padded on the right; labels of pads are -100."""
    input_ids = np.full((batch_size, length), pad_id)
    labels = np.full((batch_size, length), IGNORE)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = labels[i, : len(row)] = row
    return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}


def pack(rows: list[np.ndarray], batch_size: int, longest: int, pad_id: int) -> dict[str, torch.Tensor]:
    """Rows one after the other: {input_ids, labels}, both (1, tokens), and cu_seqlens, (batch_size + 2,) int32, where rows begin.

    The first token of a row has the label -100, as no token before it predicts it. A last row of pads, shorter than `longest`,
    rounds `tokens` up so that few different shapes occur: to a multiple of up to an eighth of them.
    """
    tokens = sum(map(len, rows))
    unit = min(1 << int(np.log2(max(tokens // 8, 1))), longest // 16 * 16 or longest)  # 16: what the products in fp8 take
    input_ids = np.full((1, -(-max(tokens, 1) // unit) * unit), pad_id)
    cu_seqlens = np.full(batch_size + 2, tokens, np.int32)
    cu_seqlens[-1] = input_ids.shape[1]
    np.cumsum([0, *map(len, rows)], out=cu_seqlens[: len(rows) + 1])
    input_ids[0, :tokens] = np.concatenate([np.empty(0, np.int32), *rows])
    labels = np.where(np.arange(input_ids.shape[1]) < tokens, input_ids, IGNORE)
    labels[0, cu_seqlens[: len(rows)]] = IGNORE
    return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels), "cu_seqlens": torch.from_numpy(cu_seqlens)}


class SyntheticBatches:
    """Endless batches of random tokens for the benchmark: full rows, ids over the model's whole vocabulary."""

    def __init__(self, batch_size: int, length: int, vocab_size: int, dp_rank: int, dp_size: int, seed: int):
        self._shape, self._vocab_size, self._dp_size = (batch_size, length), vocab_size, dp_size
        self._generator = torch.Generator().manual_seed(seed + dp_rank)

    def __next__(self) -> Batch:
        # 4: OPT's first ids are <s>, <pad>, </s> and <unk>.
        ids = torch.randint(4, self._vocab_size, self._shape, generator=self._generator)
        rows, length = self._shape
        everyones = rows * self._dp_size
        return Batch({"input_ids": ids, "labels": ids}, targets=everyones * (length - 1), tokens=everyones * length, rows=everyones)
