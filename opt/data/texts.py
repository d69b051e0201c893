"""Files, and data sets of the Hub -> texts, read one after the other.

csv and JSON are read by Python's own modules, strictly: they know the line, every field is a text,
and nothing is guessed. [F47] [F48] Through pandas, as `datasets` reads a csv, a row with a field
more than the header turns the first column into row names and moves all others by one, "NA" is no
text, "007" is a number, and a column that nobody asked for changes its type after 10,000 rows.
[F49] pyarrow takes a quote that is not doubled for a letter, and [F50] half an emoji in JSON for a
broken file. What a data set on the Hub consists of, `datasets` says.
"""

import codecs
import csv
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from opt.errors import UserError

WIKITEXT = "wikitext-2-raw"
_KINDS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".txt": "text",
    ".parquet": "parquet",
}
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_DELIMITERS = ",\t;|"  # a csv has the first of them with which it has the column
# A quote that is never closed makes one field of the rest of the file: at this length it is an
# error and not a text.
csv.field_size_limit(10**8)


def cache_folder() -> Path:
    """Where tokens are kept, and what data sets on the Hub consist of."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "opt-colossalai"


class _Fault(Exception):
    """What keeps a file from being read as it was meant, and the line."""

    def __init__(self, reason: str, line: int | None = None):
        super().__init__(reason)
        self.line = line


class Source:
    """Where the texts of a data set are, and how to read them."""

    def __init__(
        self,
        asked_for: str,
        said: str,
        files: dict[str, list[Path]],
        column: str,
        commit: str = "",
        delimiter: str = "",
    ):
        """
        Args:
            asked_for: the value of --dataset.
            said: where the texts come from, in words.
            files: by split, "train" and perhaps "held_out".
            commit: of the data set on the Hub, if it is from there.
            delimiter: of a csv, where the data set says it.
        """
        self.asked_for, self.said, self.files, self.column = asked_for, said, files, column
        self._commit, self._delimiter = commit, delimiter
        self._states = {file: _state(file) for own in files.values() for file in own}

    def identity(self) -> list[str]:
        """What no other texts have: SHA-256 of each file, or a commit of the Hub and the files'
        names."""
        if self._commit:
            return [self._commit, *(file.name for file in self._states)]
        return [_sha256(file) for file in self._states]

    def texts(self, split: str, notes: Counter) -> Iterator[str | None]:
        """Every text of a split, None where a row has none; `notes` counts, in words, what was
        guessed or repaired.

        Raises UserError, with the file and the line, for what cannot be read as it was meant.
        """
        for file in self.files[split]:
            name = f"--dataset {self.asked_for}" + (
                f": {file.name}" if str(file) != self.asked_for else ""
            )
            try:
                yield from (text and _repaired(text, notes) for text in self._read(file, notes))
            except _Fault as fault:
                where = f", line {fault.line}: " if fault.line else " "
                raise UserError(f"{name}{where}{fault}") from fault
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{name}, {_undecodable(file, error)}: save it as UTF-8 text"
                ) from error
            except OSError as error:
                raise UserError(f"{name} cannot be read ({error.strerror or error})") from error
            if _state(file) != self._states[file]:
                # What was read may not be what identity() stands for
                raise UserError(f"{name} was changed while it was read: start again")

    def _read(self, file: Path, notes: Counter) -> Iterator[str | None]:
        if not file.stat().st_size:
            raise _Fault("is an empty file")
        kind = _KINDS[file.suffix.lower()]
        if kind == "csv":
            return _csv(
                file, self.column, "\t" if file.suffix.lower() == ".tsv" else self._delimiter, notes
            )
        if kind == "json":
            return _json(file, self.column)
        return _parquet(file, self.column) if kind == "parquet" else _lines(file)


def find(dataset: str, column: str) -> Source:
    """The texts that --dataset names: of a local file, or of a data set on the Hub, which is
    downloaded. Raises UserError."""
    if os.path.isfile(dataset):
        file = Path(dataset)
        if file.suffix.lower() not in _KINDS:
            raise UserError(f"--dataset {dataset}: a file must end in {', '.join(_KINDS)}")
        return Source(dataset, f"local file {dataset}", {"train": [file]}, column)
    if dataset == WIKITEXT:
        return _on_the_hub("Salesforce/wikitext", "wikitext-2-raw-v1", "text", asked_for=dataset)
    looks_local = (
        dataset.startswith((".", "/", "~"))
        or dataset.lower().endswith(tuple(_KINDS))
        or dataset.count("/") != 1
    )
    if looks_local or os.path.isdir(dataset):
        raise UserError(
            f"--dataset {dataset}: no such file; give a csv, json, jsonl, txt or parquet file, a "
            f"Hub id, or {WIKITEXT}"
        )
    return _on_the_hub(dataset, None, column, asked_for=dataset)


def _on_the_hub(repository: str, config: str | None, column: str, asked_for: str) -> Source:
    import datasets
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.utils import HfHubHTTPError, RepositoryNotFoundError, disable_progress_bars

    def builder():
        """What `datasets` makes of the repository's README and the names of its files:
        configurations, splits, formats."""
        try:
            return datasets.load_dataset_builder(repository, config)
        # Of whatever is wrong with a data set, its readers have exceptions of their own
        except Exception as error:
            raise UserError(
                f"--dataset {asked_for} cannot be read ({type(error).__name__}: "
                f"{' '.join(str(error).split()):.300})"
            ) from error

    disable_progress_bars()
    # What it logs of a fault, it raises too
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    note = (
        cache_folder()
        / f"hub-{hashlib.sha256(f'{repository}/{config}'.encode()).hexdigest()[:32]}.json"
    )
    origin = "Hub"
    try:
        HfApi().dataset_info(repository, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except RepositoryNotFoundError as error:
        raise UserError(
            f"--dataset {asked_for}: neither a file here nor a data set on the Hub, or a "
            "private one"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        if not note.is_file():
            reason = str(error).split("\n")[0]
            raise UserError(
                f"--dataset {asked_for}: not a file here and not to be had from the Hub "
                f"({reason}); give a local file"
            ) from error
        origin, found = "cached from the Hub, which does not answer", json.loads(note.read_text())
    else:
        remote = builder()
        found = {
            "commit": remote.hash,
            # hf://datasets/OWNER/NAME@COMMIT/PATH
            "splits": {
                str(split): ["/".join(url.split("/")[5:]) for url in urls]
                for split, urls in remote.config.data_files.items()
            },
            "delimiter": getattr(remote.config, "sep", None) or "",
        }
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(found))
    splits = found["splits"]
    train = "train" if "train" in splits else next(iter(splits))
    wanted = {"train": splits[train]} | (
        {"held_out": splits["validation"]} if asked_for == WIKITEXT else {}
    )
    paths = [path for own in wanted.values() for path in own]
    strange = next((path for path in paths if Path(path).suffix.lower() not in _KINDS), None)
    if strange:
        raise UserError(
            f"--dataset {asked_for}: {strange} is of a form that is not read: save its texts as "
            f"one of {', '.join(_KINDS)}"
        )
    try:
        how = {
            "revision": found["commit"],
            "allow_patterns": paths,
            "local_files_only": origin != "Hub",
        }
        folder = Path(snapshot_download(repository, repo_type="dataset", **how))
        files = {split: [folder / path for path in own] for split, own in wanted.items()}
        if missing := next((path for path in paths if not (folder / path).is_file()), None):
            raise OSError(f"{missing} is missing")
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"--dataset {asked_for}: its download from the Hub broke off ({reason}): start again"
        ) from error
    said = f"{repository}, {config}" if config else f"{repository}, split {train}"
    return Source(
        asked_for,
        f"{origin}, {said}",
        files,
        column,
        found["commit"],
        found["delimiter"].replace(",", ""),
    )


def _csv(file: Path, column: str, delimiter: str, notes: Counter) -> Iterator[str | None]:
    """One column of a csv. A row has as many fields as the header; more only if there is nothing in
    them."""
    delimiter, has_spaces, header = _header(file, column, delimiter, notes)
    place, width = header.index(column), len(header)
    if header.count(column) > 1:
        raise _Fault(f"has {header.count(column)} columns '{column}': rename all but one")
    with _open(file) as lines:
        rows = csv.reader(lines, delimiter=delimiter, skipinitialspace=has_spaces, strict=True)
        next(filter(None, rows))
        while True:
            first = rows.line_num + 1  # of the row that comes
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise _Fault(
                    f"a text in quotes is not closed, or a quote in it is not doubled ({error})",
                    first,
                ) from error
            if row is None:
                return
            if not row and width > 1:  # an empty line, and no row
                continue
            if len(row) > width and not any(row[width:]):
                notes["rows with an empty field too many"] += 1
            elif len(row) != width and row:
                more = f"a text with {_named(delimiter)} in it needs quotes around it"
                hint = (
                    more
                    if len(row) > width
                    else "one is missing, or a text goes on in the next line without quotes around "
                    "it"
                )
                raise _Fault(f"it has {len(row)} fields, the header {width}: {hint}", first)
            yield row[place] if row else None


def _header(file: Path, column: str, delimiter: str, notes: Counter) -> tuple[str, bool, list[str]]:
    """A csv's delimiter, whether spaces follow it, and its columns, `column` among them.
    `delimiter`: if it is known, else ""."""
    found = []
    for guess, has_spaces in itertools.product(delimiter or _DELIMITERS, (False, True)):
        with _open(file) as lines:
            try:
                header = next(
                    filter(
                        None,
                        csv.reader(
                            lines, delimiter=guess, skipinitialspace=has_spaces, strict=True
                        ),
                    ),
                    [],
                )
            except csv.Error:  # quotes that this delimiter cuts
                continue
        if column in header:
            if guess not in (delimiter or ","):
                notes[f"file with {_named(guess)} between fields"] += 1
            return guess, has_spaces, header
        found.append(header)
    raise _no_column(column, max(found, key=len, default=[]))


def _named(delimiter: str) -> str:
    return "a tab" if delimiter == "\t" else f"'{delimiter}'"


def _json(file: Path, column: str) -> Iterator[str | None]:
    """One field of JSON objects, one a line or in a list."""
    names, has_column = None, False
    for line, row in _objects(file):
        if not isinstance(row, dict):
            raise _Fault(f"it holds {type(row).__name__}, not a JSON object", line)
        names, has_column, text = names or row, has_column or column in row, row.get(column)
        if isinstance(text, str) or text is None or text != text:  # NaN stands for nothing as well
            yield text if isinstance(text, str) else None
        else:
            raise _Fault(
                f"'{column}' holds {_kind(text)}, such as {text!r:.40}, not text: choose another "
                "with --text_column",
                line,
            )
    if names is not None and not has_column:
        raise _no_column(column, list(names))


def _kind(value) -> str:
    return {"dict": "an object", "list": "a list"}.get(type(value).__name__, type(value).__name__)


def _objects(file: Path) -> Iterator[tuple[int, object]]:
    """What a JSON file holds, and the line that each begins in."""
    with _open(file) as lines:
        start = next(filter(None, (line.strip()[:1] for line in lines)), "")
    if start not in ("{", "["):
        raise _Fault("cannot be read: it must hold JSON objects in UTF-8, one a line or in a list")
    with _open(file) as lines:
        if start == "[":
            yield from _list(lines)
            return
        for number, line in enumerate(lines, 1):
            if not line.isspace():
                yield number, _decode(json.loads, line.rstrip(), number)


PART = 2**20  # characters of a JSON list that are read at a time


def _list(file) -> Iterator[tuple[int, object]]:
    """The elements of a JSON list, one by one, and the line that each begins in."""
    text, place, line, part = "", 0, 1, PART
    decode = json.JSONDecoder().raw_decode

    def more() -> bool:
        nonlocal text, place, line, part
        added = file.read(part)
        line += text.count("\n", 0, place)
        # Doubled: an element of many parts is not read anew too often
        text, place, part = text[place:] + added, 0, 2 * part
        return bool(added)

    def sign() -> str:
        nonlocal place
        while True:
            while place < len(text) and text[place].isspace():
                place += 1
            if place < len(text) or not more():
                return text[place : place + 1]

    sign()
    place += 1
    if sign() == "]":
        return
    while True:
        sign()
        try:
            element, end = decode(text, place)
        except (ValueError, RecursionError):
            if more():
                continue
            element = _decode(decode, text, line, place)  # which says what is wrong
        began, place, part = line + text.count("\n", 0, place), end, PART
        yield began, element
        if sign() == "]":
            return
        if text[place : place + 1] != ",":
            raise _Fault(
                "the list is not closed, or a comma is missing", line + text.count("\n", 0, place)
            )
        place += 1


def _decode(decode, text: str, line: int, *place: int):
    try:
        return decode(text, *place)
    except json.JSONDecodeError as error:
        raise _Fault(
            f"no JSON ({error.msg}): the file must hold objects, one a line or in a list",
            line + error.lineno - 1,
        ) from error
    except (
        ValueError,
        RecursionError,
    ) as error:
        # A number of thousands of digits, thousands of brackets in one another
        raise _Fault(f"no JSON that can be read ({error})", line) from error


def _parquet(file: Path, column: str) -> Iterator[str | None]:
    import pyarrow
    from pyarrow import parquet, types

    try:
        table = parquet.ParquetFile(file)
        if column not in table.schema_arrow.names:
            raise _no_column(column, table.schema_arrow.names)
        kind = table.schema_arrow.field(column).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if not any(
            is_kind(kind)
            for is_kind in (
                types.is_string,
                types.is_large_string,
                types.is_string_view,
                types.is_null,
            )
        ):
            raise _Fault(
                f"column '{column}' holds {kind}, not text: choose another with --text_column"
            )
        for batch in table.iter_batches(batch_size=1000, columns=[column]):
            yield from batch.column(0).to_pylist()
    except UnicodeDecodeError as error:  # of bytes that are said to be text
        raise _Fault(
            f"column '{column}' is not UTF-8 text ({error.reason}): write it again"
        ) from error
    except (pyarrow.ArrowException, OSError) as error:
        raise _Fault(f"cannot be read ({' '.join(str(error).split()):.200})") from error


def _lines(file: Path) -> Iterator[str]:
    with _open(file) as lines:
        for line in lines:
            yield line.rstrip("\r\n")


def _open(file: Path):
    """A text file, line ends as they are: in UTF-8, or what its byte order mark says."""
    with open(file, "rb") as content:
        start = content.read(2**16)
    encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8-sig")
    if encoding == "utf-8-sig" and start.count(0) > len(start) / 100:
        raise _Fault("is binary, or UTF-16 text without a mark: save it as UTF-8 text")
    return open(file, encoding=encoding, newline="")


def _undecodable(file: Path, error: UnicodeDecodeError) -> str:
    """Where a file is not in its encoding. The decoder knows the place in the part that it was
    given alone."""
    if error.encoding == "utf-8":
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    line.decode()
                except UnicodeDecodeError as found:
                    return f"line {number}: byte {line[found.start]:#04x} is not UTF-8"
    return f"which begins as {error.encoding}, does not go on so ({error.reason})"


def _no_column(column: str, names: list) -> _Fault:
    columns = f"its columns are {', '.join(map(str, names)):.300}" if names else "it has none"
    return _Fault(f"has no column '{column}': {columns}; choose one with --text_column")


def _repaired(text: str, notes: Counter) -> str:
    """`text` without NUL characters and halves of surrogate pairs (JSON can spell both), which are
    no text."""
    if "\0" in text:
        text = text.replace("\0", "")
        notes["texts with NUL characters, left out"] += 1
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            notes["texts with half a character, now U+FFFD"] += 1
    return text


def _sha256(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _state(file: Path) -> tuple:
    """What changes with a file; its time alone can be set to what it was (tar, rsync and cp -p do),
    its change's time cannot."""
    there = file.stat()
    return there.st_ino, there.st_size, there.st_mtime_ns, there.st_ctime_ns
