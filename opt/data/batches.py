"""Rows -> batches: a set of rows, one after the other, or padded on the right to its own longest
row."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from opt.data.rows import Rows
from opt.model.loss import IGNORE

# A batch's length is a multiple of this: few different shapes, and sizes that tensor cores like
PAD_TO = 8


def batches_an_epoch(rows: int, batch_size: int, dp_size: int) -> int:
    """How many batches each data-parallel rank has of `rows` rows, the last one filled up."""
    return -(-rows // (batch_size * dp_size))


class Batches:
    """The batches of one data-parallel rank: an epoch's rows in a seeded order, each row once, the
    same number of batches on every rank. The last one is filled up with rows that have no
    target."""

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        dp_rank: int,
        dp_size: int,
        pad_id: int,
        seed: int | None,
        padding_free: bool = False,
        microbatches: int = 1,
    ):
        """`microbatches`: how many a batch without pads is packed in, all of one shape."""
        self.rows, self.batch_size, self.pad_id, self.padding_free = (
            rows,
            batch_size,
            pad_id,
            padding_free,
        )
        self.dp_rank, self.dp_size, self.seed = dp_rank, dp_size, seed
        self.microbatches = microbatches if padding_free else 1

    def epoch(self, epoch: int = 0, done: int = 0) -> Iterator["Batch"]:
        """The batches of an epoch, by its number, in the same order whenever it is asked for; in
        the rows' own order if unseeded.

        `done`: leave out as many rows, those that a run had done when it stopped, whatever its
        batches were.
        """
        order = np.arange(len(self.rows))
        if self.seed is not None:
            np.random.default_rng((self.seed, epoch)).shuffle(order)
        per_step = self.batch_size * self.dp_size
        for start in range(done, len(order), per_step):
            # Every rank knows every row's length: no rank has to ask the others what they hold.
            everyone = order[start : start + per_step]
            lengths, contexts = self.rows.lengths[everyone], self.rows.contexts[everyone]
            make = self._packed if self.padding_free else self._padded
            tokens = int(lengths.sum())
            inputs = make(everyone, lengths, contexts)
            yield Batch(inputs, tokens - int(contexts.sum()), tokens, len(everyone))

    def _packed(self, everyone: np.ndarray, lengths, contexts) -> dict[str, torch.Tensor]:
        """This rank's of the rows of a step, whose numbers are `everyone`, without pads: one batch,
        or its micro-batches, see stack."""
        parts = self.microbatches
        dealt = deal(lengths, self.dp_size * parts)
        most = max(int(lengths[part].sum()) for part in dealt)
        shape = self.batch_size // parts, self.rows.longest, self.pad_id, most
        # They differ by less than a row, and what rounds them up is less than another.
        pad_rows = 1 if parts == 1 else 2
        packed = [
            pack([self.rows[j] for j in everyone[part]], contexts[part], *shape, pad_rows)
            for part in dealt[self.dp_rank * parts : (self.dp_rank + 1) * parts]
        ]
        return packed[0] if parts == 1 else stack(packed)

    def _padded(self, everyone: np.ndarray, lengths, contexts) -> dict[str, torch.Tensor]:
        """The same, padded to the longest row of all ranks."""
        own = deal(lengths, self.dp_size)[self.dp_rank]
        # No pads beyond the longest row of all: the model may have no positions there.
        length = min(-(-int(lengths.max()) // PAD_TO) * PAD_TO, self.rows.longest)
        rows = [self.rows[j] for j in everyone[own]]
        return collate(rows, contexts[own], self.batch_size, length, self.pad_id)

    def steps(
        self, start: "Position", total_steps: int, accumulated: int
    ) -> Iterator[tuple["Position", list["Batch"]]]:
        """From `start` until `total_steps` are done: `accumulated` batches an optimizer step, and
        where the run is after it.

        The last step of an epoch takes what is left.
        """
        step, done = start.step, start.rows
        for epoch in itertools.count(start.epoch):
            batches = self.epoch(epoch, done)
            while group := list(itertools.islice(batches, accumulated)):
                if step == total_steps:
                    return
                step, done = step + 1, done + sum(batch.rows for batch in group)
                ended = done == len(self.rows)
                yield Position(step, epoch + 1, 0) if ended else Position(step, epoch, done), group
            done = 0


@dataclass(frozen=True)
class Position:
    """How far a run has come. In rows over all data-parallel ranks: another number of them can go
    on from it."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # the epoch that the next row belongs to
    rows: int = 0  # rows of that epoch done


@dataclass
class Batch:
    """One rank's rows of a step, and what the rows of all ranks hold together."""

    inputs: dict[str, torch.Tensor]  # what collate or pack gives, on the host
    # Tokens that the loss is summed over, over all data-parallel ranks: of each row all but its
    # context, which is its first token or its prompt
    targets: int
    tokens: int  # real tokens, over all data-parallel ranks
    rows: int  # over all data-parallel ranks

    def to(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The inputs on a device."""
        return {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}


def deal(lengths: np.ndarray, ranks: int) -> list[np.ndarray]:
    """The rows of a step for each of `ranks`, by their places in `lengths`: as many for each, and
    about as many tokens, since the slowest decides.

    The longest first, from the first rank to the last and back again.
    """
    if ranks == 1:
        return [np.arange(len(lengths))]
    order = np.argsort(-lengths, kind="stable")
    turn = np.arange(len(order)) % (2 * ranks)
    rank = np.minimum(turn, 2 * ranks - 1 - turn)
    return [order[rank == i] for i in range(ranks)]


def collate(
    rows: list[np.ndarray], contexts: np.ndarray, batch_size: int, length: int, pad_id: int
) -> dict[str, torch.Tensor]:
    """Rows as a batch {input_ids, labels}, both (batch_size, length), padded on the right; labels
    of pads, and of the first `contexts` tokens of each row, are -100."""
    input_ids = np.full((batch_size, length), pad_id)
    labels = np.full((batch_size, length), IGNORE)
    for i, (row, context) in enumerate(zip(rows, contexts, strict=True)):
        input_ids[i, : len(row)] = row
        labels[i, context : len(row)] = row[context:]
    return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}


def pack(
    rows: list[np.ndarray],
    contexts: np.ndarray,
    batch_size: int,
    longest: int,
    pad_id: int,
    tokens: int | None = None,
    pad_rows: int = 1,
) -> dict[str, torch.Tensor]:
    """Rows one after the other: {input_ids, labels}, both (1, tokens), and cu_seqlens, (batch_size
    + 1 + pad_rows,) int32, where rows begin.

    The first `contexts` tokens of a row have the label -100. The last `pad_rows` rows, of pads,
    none longer than `longest`, round up `tokens`, by default those of these rows, so that few
    different shapes occur: to a multiple of up to an eighth of them. Given those of the rank that
    has most, all ranks have the same shape, and a new one holds up all of them at once; unless they
    differ by more than these rows can fill, as where an epoch's last rows are few.
    """
    own = sum(map(len, rows))
    length, unit = _rounded(tokens or own, longest)
    # The pads are no more rows
    length -= max(0, -(-(length - own - pad_rows * longest) // unit)) * unit
    input_ids = np.full((1, length), pad_id)
    labels = np.full_like(input_ids, IGNORE)
    cu_seqlens = np.full(batch_size + 1 + pad_rows, own, np.int32)
    cu_seqlens[-pad_rows:] = np.minimum(own + longest * np.arange(1, pad_rows + 1), length)
    np.cumsum([0, *map(len, rows)], out=cu_seqlens[: len(rows) + 1])
    for row, start, context in zip(rows, cu_seqlens, contexts):  # noqa: B905
        input_ids[0, start : start + len(row)] = row
        labels[0, start + context : start + len(row)] = row[context:]
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "cu_seqlens": torch.from_numpy(cu_seqlens),
    }


def stack(packed: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Micro-batches of one shape, see pack: {input_ids, labels}, (micro-batches, tokens), and
    cu_seqlens, (micro-batches, rows + 3)."""
    return {name: torch.stack([one[name].view(-1) for one in packed]) for name in packed[0]}


def _rounded(tokens: int, longest: int) -> tuple[int, int]:
    """Up to a multiple of a unit, and that unit: see pack()."""
    tokens = max(tokens, 1)
    # 16: what the products in fp8 take
    unit = min(1 << int(np.log2(max(tokens // 8, 1))), longest // 16 * 16 or longest)
    return -(-tokens // unit) * unit, unit


def largest_batch(lengths: np.ndarray, longest: int, batch_size: int, dp_size: int) -> int:
    """Tokens of the largest batch of a rank in an epoch of packed rows of these `lengths`. In one
    order of them, as good as another: no epoch's own."""
    shuffled = np.random.default_rng(0).permutation(lengths)
    starts = np.arange(0, len(shuffled), batch_size * dp_size)
    of_step = np.add.reduceat(shuffled, starts, dtype=np.int64)
    return _rounded(-(-int(of_step.max()) // dp_size), longest)[0]


class SyntheticBatches:
    """Endless batches of random tokens for the benchmark: full rows, ids over the model's whole
    vocabulary."""

    def __init__(
        self, batch_size: int, length: int, vocab_size: int, dp_rank: int, dp_size: int, seed: int
    ):
        self._shape, self._vocab_size, self._dp_size = (batch_size, length), vocab_size, dp_size
        self._generator = torch.Generator().manual_seed(seed + dp_rank)

    def __next__(self) -> Batch:
        # 4: OPT's first ids are <s>, <pad>, </s> and <unk>.
        ids = torch.randint(4, self._vocab_size, self._shape, generator=self._generator)
        rows, length = self._shape
        everyones = rows * self._dp_size
        return Batch(
            {"input_ids": ids, "labels": ids},
            targets=everyones * (length - 1),
            tokens=everyones * length,
            rows=everyones,
        )
