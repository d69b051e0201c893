"""Rows -> batches: a set of rows, one after the other, or padded on the right to its own longest
row."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from opt.data.tokens import Rows
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
    ):
        self.rows, self.batch_size, self.pad_id, self.padding_free = (
            rows,
            batch_size,
            pad_id,
            padding_free,
        )
        self.dp_rank, self.dp_size, self.seed = dp_rank, dp_size, seed

    def __len__(self):
        """Batches an epoch."""
        return batches_an_epoch(len(self.rows), self.batch_size, self.dp_size)

    def epoch(self, number: int = 0, done: int = 0) -> Iterator["Batch"]:
        """The batches of epoch `number`, in the same order whenever it is asked for; in the rows'
        own order if unseeded.

        `done`: leave out as many rows, those that a run had done when it stopped, whatever its
        batches were.
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
                length = min(
                    -(-int(lengths[everyone].max()) // PAD_TO) * PAD_TO, int(lengths.max())
                )
                inputs = collate(own, self.batch_size, length, self.pad_id)
            yield Batch(inputs, targets=tokens - len(everyone), tokens=tokens, rows=len(everyone))

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
    # Tokens that the loss is summed over: all but each row's first, over all data-parallel ranks
    targets: int
    tokens: int  # real tokens, over all data-parallel ranks
    rows: int  # over all data-parallel ranks

    def to(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The inputs on a device."""
        return {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}


def collate(
    rows: list[np.ndarray], batch_size: int, length: int, pad_id: int
) -> dict[str, torch.Tensor]:
    """Rows as a batch {input_ids, labels}, both (batch_size, length), padded on the right; labels
    of pads are -100."""
    input_ids = np.full((batch_size, length), pad_id)
    labels = np.full((batch_size, length), IGNORE)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = labels[i, : len(row)] = row
    return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}


def pack(
    rows: list[np.ndarray], batch_size: int, longest: int, pad_id: int
) -> dict[str, torch.Tensor]:
    """Rows one after the other: {input_ids, labels}, both (1, tokens), and cu_seqlens, (batch_size
    + 2,) int32, where rows begin.

    The first token of a row has the label -100, as no token before it predicts it. A last row of
    pads, shorter than `longest`, rounds `tokens` up so that few different shapes occur: to a
    multiple of up to an eighth of them.
    """
    tokens = sum(map(len, rows))
    # 16: what the products in fp8 take
    unit = min(1 << int(np.log2(max(tokens // 8, 1))), longest // 16 * 16 or longest)
    input_ids = np.full((1, -(-max(tokens, 1) // unit) * unit), pad_id)
    cu_seqlens = np.full(batch_size + 2, tokens, np.int32)
    cu_seqlens[-1] = input_ids.shape[1]
    np.cumsum([0, *map(len, rows)], out=cu_seqlens[: len(rows) + 1])
    input_ids[0, :tokens] = np.concatenate([np.empty(0, np.int32), *rows])
    labels = np.where(np.arange(input_ids.shape[1]) < tokens, input_ids, IGNORE)
    labels[0, cu_seqlens[: len(rows)]] = IGNORE
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "cu_seqlens": torch.from_numpy(cu_seqlens),
    }


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
