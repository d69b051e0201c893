"""Texts -> tokens on disk, in bounded memory.

One process a node reads the texts, tokenizes them once and appends the tokens to flat files in a
cache; opt/data/rows.py makes rows of them, which every process maps into memory. A text is the
start token, its prompt if it has one, itself, the end token. Killed on the way, the next start
reads the texts again and tokenizes what is left.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tokenizers import AddedToken

from opt.data import rows, texts
from opt.data.files import PART
from opt.errors import UserError

_CACHE_VERSION = 6  # count up when the tokens of the same text, or the files, change
_OPTS_OWN = ("<s>", "</s>", "<pad>", "<unk>", "<mask>")
_BATCH = 2 * PART  # characters that are tokenized at a time, by all cores
_SAVED_EVERY = 64 * PART  # characters after which a killed run need not tokenize again


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

    To be run by one process a node; another run with the same texts waits for it. Raises UserError.
    """
    _check_template(plan, tokenizer)
    source = texts.find(plan, control_tokens(tokenizer))
    settings = (
        "template",
        "prompt_column",
        "response_column",
        "max_length",
        "block_size",
        "long_texts",
        "eval_fraction",
        "max_train_samples",
        "max_eval_samples",
        "seed",
    )
    key = [
        _CACHE_VERSION,
        source.identity(),
        source.said,
        [getattr(plan, name) for name in settings],
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        source.form.controls,
    ]
    directory = texts.cache_folder() / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    try:
        if not _is_whole(directory):
            with _alone(directory) as part:
                if not _is_whole(directory):  # which another run may have made meanwhile
                    if directory.exists():
                        print(f"{directory} is damaged: tokenizing anew", flush=True)
                        shutil.rmtree(directory)
                    _prepare(source, plan, tokenizer, part)
                    _move(part, directory)
    except OSError as error:
        raise UserError(
            f"the tokens cannot be cached ({error}): choose another folder with XDG_CACHE_HOME"
        ) from error
    return directory


def _is_whole(directory: Path) -> bool:
    """Whether all files are there, as long as they were written."""
    try:
        sizes = json.loads((directory / "counts.json").read_text())["bytes"]
        return all((directory / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


@contextmanager
def _alone(directory: Path) -> Iterator[Path]:
    """The folder to prepare `directory` in, which no other run has until this one is done or
    dead. Where files cannot be locked, a folder of this process's own."""
    import filelock

    directory.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(directory.with_suffix(".lock"))
    part = directory.with_suffix(".part")
    try:
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            print("waiting for another run, which tokenizes the same texts", flush=True)
            lock.acquire()
    except (NotImplementedError, OSError):
        part = directory.with_suffix(f".part-{os.uname().nodename}-{os.getpid()}")
    part.mkdir(exist_ok=True)
    try:
        yield part
    except OSError:  # a full disk, most likely
        shutil.rmtree(part, ignore_errors=True)
        raise
    finally:
        with suppress(OSError):  # renamed; or left as it is, for the next start to go on
            part.rmdir()
        lock.release()


def _move(part: Path, directory: Path) -> None:
    try:
        part.rename(directory)
    except OSError:
        if not _is_whole(directory):  # otherwise another run was here first
            raise
        shutil.rmtree(part)


def _prepare(source: texts.Source, plan: Namespace, tokenizer, part: Path) -> None:
    """Everything that Dataset is read from, into the folder `part`. Raises UserError."""
    encoder = _Encoder(tokenizer, bool(plan.block_size), source.form)
    notes, counts = Counter(), rows.Counts()
    own = "held_out" in source.splits
    fraction = 0.0 if own else plan.eval_fraction
    limits = {
        "train": _texts_to_read(plan, fraction),
        "held_out": plan.max_eval_samples,
    }
    if plan.block_size:  # samples are blocks, see rows.cut
        limits = dict.fromkeys(limits)
    number = {}
    for split in source.splits:
        read = (source, split, limits[split], notes, counts)
        number[split] = _tokenize_split(*read, encoder, part).texts
    counts.texts, counts.notes = sum(number.values()), dict(notes)
    _check_enough(plan, counts, number, fraction)

    held_out = rows.held_out(number["train"], fraction, plan.seed)
    if own:
        rows.select(part, "train", "train", None, plan, tokenizer)
        rows.select(part, "held_out", "held_out", None, plan, tokenizer)
    elif plan.block_size and fraction and not held_out.any():
        # Too few texts to hold any out: the end of the stream
        rows.select(part, "train", "train", None, plan, tokenizer)
        rows.hold_out_the_end(part, fraction)
        counts.notes["texts, too few to hold any out: the last tokens are"] = counts.texts
    else:
        evaluated = rows.first_of(held_out, limits["held_out"])
        trained = rows.first_of(~held_out, None if plan.block_size else plan.max_train_samples)
        rows.select(part, "train", "held_out", evaluated, plan, tokenizer)
        rows.select(part, "train", "train", trained if fraction else None, plan, tokenizer)
        counts.texts = int(evaluated.sum() + trained.sum())
    splits = {}
    for split in ("train", "held_out"):
        splits[split] = rows.cut(part, split, plan, counts)
        counts.tokens += splits[split]["tokens"]
    if not splits["train"]["rows"]:
        raise UserError(
            f"--dataset {' '.join(plan.dataset)} leaves nothing to train on: {counts.unanswered} "
            "rows have no response within --max_length"
        )
    for path in part.glob("*.all*"):
        path.unlink()
    sizes = {path.name: path.stat().st_size for path in part.iterdir()}
    facts = {"counts": asdict(counts), "source": source.said, "splits": splits, "bytes": sizes}
    (part / "counts.json").write_text(json.dumps(facts))
    for path in part.iterdir():  # or a power failure could leave their names and sizes alone
        _flush(path)


def _flush(path: str | Path) -> None:
    """Wait until a file's content is on disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _check_enough(plan: Namespace, counts: rows.Counts, number: dict, fraction: float) -> None:
    name = f"--dataset {' '.join(plan.dataset)}"
    if not counts.texts and not counts.empty:
        raise UserError(f"{name} has no rows")
    if not number["train"]:
        raise UserError(f"{name} has no text to train on: {counts.empty} of its texts are empty")
    if "held_out" in number and not number["held_out"]:
        raise UserError(f"{name}: what is to be held out has no texts: give --eval_fraction 0")
    out = round(number["train"] * fraction)
    if fraction and not plan.block_size and not 0 < out < number["train"]:
        raise UserError(
            f"{name} has {number['train']} texts, too few to train on and hold out {fraction:g} of "
            "them: change --eval_fraction, or set it to 0"
        )


def _texts_to_read(plan: Namespace, fraction: float) -> int | None:
    """How many texts are to be read for --max_train_samples to be left when `fraction` of them is
    held out, and for one, or --max_eval_samples, to be held out; None: all."""
    wanted = plan.max_train_samples
    if wanted is None or not fraction:
        return wanted
    evaluated = plan.max_eval_samples or 1
    number = int(max(wanted / (1 - fraction), (evaluated - 1) / fraction))
    while number - round(number * fraction) < wanted or round(number * fraction) < evaluated:
        number += 1
    return number


# ---- texts to tokens


def control_tokens(tokenizer) -> list[str]:
    """What begins, ends and pads rows, and the like: OPT's own, and those that the tokenizer names
    so; not what a chat's format has added (<|user|>)."""
    named = [value for value in tokenizer.special_tokens_map.values() if isinstance(value, str)]
    own = [
        token for token in _OPTS_OWN if tokenizer.backend_tokenizer.token_to_id(token) is not None
    ]
    return list(dict.fromkeys([*own, *named]))


def _check_template(plan: Namespace, tokenizer) -> None:
    """Raise UserError for a --template that begins or ends as each text does by itself."""
    if not plan.template:
        return
    parts = texts.parse_template(plan.template, plan.response_column)
    (first, _), (last, column) = parts[0], parts[-1]
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    if bos and first.strip().startswith(bos):
        what = f"begins with {bos}"
    elif not column and last.strip().endswith(eos):
        what = f"ends with {eos}"
    else:
        return
    raise UserError(f"--template {what}, as each text does by itself: leave it out")


class _Encoder:
    """A tokenizer, for texts in which nothing is a control token, but what texts.MARKED has."""

    def __init__(self, tokenizer, joined: bool, form: texts.Layout):
        self.joined, self.controls = joined, form.controls
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        model = json.loads(tokenizer.backend_tokenizer.to_str())
        self._whole = []  # in texts these are one token
        for one in model["added_tokens"]:
            if one["content"] not in self.controls:  # <|user|>, see below
                one["special"] = False
                self._whole.append(one["content"])
        self._backend = type(tokenizer.backend_tokenizer).from_str(json.dumps(model))
        self._real: dict[int, int] = {}  # of a marked control token: its own id
        for control in self.controls if form.is_marked else ():
            marked = texts.MARKED.format(control)
            self._backend.add_tokens([AddedToken(marked, normalized=False)])
            real = tokenizer.convert_tokens_to_ids(control)
            self._real[self._backend.token_to_id(marked)] = real
            self._whole.append(marked)
        self._backend.no_truncation()
        self._backend.no_padding()
        # "</s>" in a text is four characters. It is added here, once: OPT's tokenizers differ in
        # whether they add a BOS, and none adds an EOS.
        self._backend.encode_special_tokens = True
        before = model["pre_tokenizer"] or {}
        self.can_cut = before.get("type") == "ByteLevel" and not model["normalizer"]

    def __call__(self, batch: list[str]) -> list[list[int]]:
        """The tokens of each text."""
        found = self._backend.encode_batch_fast(batch, add_special_tokens=False)
        if not self._real:
            return [encoding.ids for encoding in found]
        return [[self._real.get(token, token) for token in encoding.ids] for encoding in found]

    def pieces(self, text: str) -> Iterator[str]:
        """`text` in pieces of PART characters or little more, as few tokenizers take a book at
        once, whose tokens are those of the whole; where it cannot be cut, in one."""
        start = 0
        while len(text) - start > 2 * PART and (cut := self._cut(text, start + PART)):
            yield text[start:cut]
            start = cut
        yield text[start:]

    def _cut(self, text: str, behind: int) -> int | None:
        """The first place from `behind` on between two tokens, neither of which is one of
        _whole."""
        for found in _BOUNDARY.finditer(text, behind) if self.can_cut else ():
            at = found.start()
            if not any(x in text[max(at - len(x), 0) : at + len(x)] for x in self._whole):
                return at
        return None


# Between these two characters no token of a byte-level BPE lies (its words are ` ?\p{L}+` and the
# like): the tokens of what is before and of what is behind are those of the whole.
_BOUNDARY = re.compile(r"(?<=\S) (?=[^\W\d_])|(?<=[^\w\s'])(?=[^\W\d_])")


@dataclass
class _Piece:
    text: str
    is_prompt: bool
    starts: bool  # the text that it belongs to
    ends: bool


def _in_pieces(
    source: Iterator[texts.Text], encoder: _Encoder, counts: rows.Counts, notes: Counter
) -> Iterator[_Piece]:
    """The texts in pieces that can be tokenized one by one; what has no text, and what looks like a
    control token, is counted."""
    parts, length, starts = [], 0, True
    controls = re.compile("(?<!\0)(?:" + "|".join(map(re.escape, encoder.controls)) + ")")
    found: set[str] = set()  # in the text in the making
    for text in source:
        found.update(controls.findall(text.text or ""), controls.findall(text.prompt or ""))
        if text.ends:
            notes.update(f"texts with {control} as characters" for control in found)
            found.clear()
        if starts and text.ends and not parts and not (text.text and text.text.strip()):
            counts.empty += 1
            continue
        if text.prompt:
            for prompt in encoder.pieces(text.prompt):
                yield _Piece(prompt, True, starts, False)
                starts = False
        parts.append(text.text or "")
        length += len(parts[-1])
        if not text.ends and (length <= 2 * PART or not encoder.can_cut):
            continue
        *pieces, rest = encoder.pieces("".join(parts))
        for piece in pieces:
            yield _Piece(piece, False, starts, False)
            starts = False
        if text.ends:
            yield _Piece(rest, False, starts, True)
            parts, length, starts = [], 0, True
        else:
            parts, length = [rest], len(rest)


def _batches(pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    batch, length = [], 0
    for piece in pieces:
        batch.append(piece)
        length += len(piece.text) + 8
        if length > _BATCH:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


@dataclass
class _Done:
    """How far a split has come: what a killed run need not do again."""

    batches: int = 0
    characters: int = 0
    tokens: int = 0
    texts: int = 0
    context: int = 0  # tokens of the text in the making that have no loss


def _tokenize_split(
    source: texts.Source,
    split: str,
    limit: int | None,
    notes: Counter,
    counts: rows.Counts,
    encoder: _Encoder,
    part: Path,
) -> _Done:
    """Append a split's tokens to `part`/SPLIT.all, its texts' ends to SPLIT.all.texts; at most
    `limit` texts."""
    from tqdm import tqdm

    progress = part / f"{split}.all.json"
    done = _Done(**json.loads(progress.read_text())) if progress.is_file() else _Done()
    if done.batches:
        print(f"{done.texts:,} texts were tokenized before: going on from there", flush=True)
    saved = done.characters
    with (
        open(part / f"{split}.all", "ab") as tokens,
        open(part / f"{split}.all.texts", "ab") as ends,
        tqdm(
            total=source.size(split), unit="B", unit_scale=True, desc="tokenizing", delay=2
        ) as bar,
    ):
        tokens.truncate(done.tokens * 4)
        ends.truncate(done.texts * rows.TEXT.itemsize)
        read = source.texts(split, notes, lambda position: bar.update(position - bar.n))
        batches = _batches(_in_pieces(read, encoder, counts, notes))
        for batch in itertools.islice(batches, done.batches, None):
            if limit and done.texts >= limit:
                break
            _append(batch, encoder, done, limit, tokens, ends)
            if done.characters - saved > _SAVED_EVERY:
                new = progress.with_suffix(".new")
                new.write_text(json.dumps(asdict(done)))
                for file in (tokens, ends):
                    file.flush()
                for path in (tokens.name, ends.name, new):  # before it is said that they are there
                    _flush(path)
                new.replace(progress)
                saved = done.characters
    return done


def _append(batch: list[_Piece], encoder: _Encoder, done: _Done, limit, tokens, ends) -> None:
    flat, finished = [], []
    for piece, ids in zip(batch, encoder([piece.text for piece in batch]), strict=True):
        if limit and done.texts + len(finished) >= limit:
            break
        if piece.starts:
            start = [] if encoder.joined or encoder.bos is None else [encoder.bos]
            flat += start
            done.context = len(start)
        if piece.is_prompt:
            done.context += len(ids)
        flat += ids
        if piece.ends:
            flat.append(encoder.eos)
            # Nothing stands before the first token that could tell it.
            finished.append((done.tokens + len(flat), max(done.context, 1)))
    done.batches += 1
    done.characters += sum(len(piece.text) for piece in batch)
    done.tokens += len(flat)
    done.texts += len(finished)
    tokens.write(np.array(flat, np.int32))
    ends.write(np.array(finished, rows.TEXT))
