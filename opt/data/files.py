"""One file -> its rows: of each the fields that are asked for, as text.

csv and JSON are read by Python's own modules, strictly: they know the line, every field is a text,
and nothing is guessed. [F47] [F48] Through pandas, as `datasets` reads a csv, a row with a field
more than the header turns the first column into row names and moves all others by one, "NA" is no
text, "007" is a number, and a column that nobody asked for changes its type after 10,000 rows.
[F49] pyarrow takes a quote that is not doubled for a letter, and [F50] half an emoji in JSON for a
broken file.
"""

import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LONGEST = 10**8  # characters of a text. A quote that is never closed makes one of half a file.
csv.field_size_limit(LONGEST)
PART = 2**20  # characters of a JSON list, or of a text that goes on through a file, read at a time

_KINDS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".txt": "txt",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
KINDS = ", ".join(_KINDS)
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# How files begin that are no text, whatever they are called.
_BINARY = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"PK\x03\x04": "zip",
    b"%PDF": "PDF",
    b"PAR1": "parquet",
    b"ARROW1\0\0": "Arrow",
}
_LFS = b"version https://git-lfs"  # what a clone without Git LFS has in a file's place
_DELIMITERS = ",\t;|"  # a csv has the first of them with which it has the columns
# What a data set's texts are mostly called, in this order, if --text_column does not say it.
USUAL_COLUMNS = ("description", "text")


class Fault(Exception):
    """What keeps a file from being read as it was meant, and the line."""

    def __init__(self, reason: str, line: int | None = None):
        super().__init__(reason)
        self.line = line


class Number(str):
    """A number of a JSON file, as it is spelled there."""


@dataclass(frozen=True)
class File:
    """A file and how to read it."""

    path: Path
    # Columns, a nested field by dots; empty: the one that holds the texts, to be found
    columns: tuple[str, ...] = ()
    takes_numbers: bool = False  # in JSON, parquet and Arrow, where text and numbers differ
    delimiter: str = ""  # of a csv, if it is known
    encoding: str = ""  # if it is known
    is_one_text: bool = (
        False  # of a txt: the whole file, line breaks and all; else a line is a text
    )


@dataclass(frozen=True)
class Row:
    """The fields of a row; or a part of a text, `ends` being False until its last one."""

    fields: tuple[str | None, ...]
    ends: bool = True


def kind_of(path: Path | str) -> str | None:
    """csv, json, txt, parquet or arrow, by a file's name; None if that says something else."""
    return _KINDS.get(ending(path))


def is_archive(path: Path | str) -> bool:
    """Whether it holds files, by its name."""
    return ending(path) in _ARCHIVES


def ending(path: Path | str) -> str:
    """Of a file's name, without that of compression."""
    path = Path(str(path).lower())
    return (path.with_suffix("") if path.suffix in _COMPRESSED else path).suffix


def rows(file: File, notes: Counter, tell: Callable[[int], None] = lambda _: None) -> Iterator[Row]:
    """Every row of a file. `notes` counts, in words, what was found, guessed or repaired; `tell` is
    told now and then how many of the file's bytes are read.

    Raises Fault for what cannot be read as it was meant.
    """
    if not file.path.stat().st_size:
        raise Fault("is an empty file")
    with open(file.path, "rb") as content:
        if content.read(len(_LFS)) == _LFS:
            raise Fault("is a pointer of Git LFS, not the file itself: run git lfs pull")
    readers = {"csv": _csv, "json": _json, "txt": _txt, "parquet": _parquet, "arrow": _arrow}
    opened = _Opened(file)
    try:
        for number, row in enumerate(readers[kind_of(file.path)](opened, notes)):
            if number % 256 == 0:
                tell(opened.position)
            yield Row(tuple(text and _repaired(text, notes) for text in row.fields), row.ends)
    except UnicodeDecodeError as error:
        raise _undecodable(opened, error) from error
    except UnicodeError as error:  # which says no more than its text
        raise Fault(
            f"is not {file.encoding} ({error}): without a mark it is {file.encoding}-le or "
            f"{file.encoding}-be"
        ) from error
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise Fault(f"is damaged, or was cut off ({error}): copy it again") from error


class _Opened:
    """A file, opened as often as it takes to read it: decompressed, and decoded."""

    def __init__(self, file: File):
        self.file = file
        self._raw = self._share = None

    @property
    def position(self) -> int:
        """How many of the file's bytes are read."""
        size = self.file.path.stat().st_size
        if self._share is not None:
            return int(self._share * size)
        return 0 if self._raw is None or self._raw.closed else self._raw.tell()

    def at(self, share: float) -> None:
        """So much of the file is read, where its reader has the place and we do not."""
        self._share = share

    @contextmanager
    def content(self):
        """The bytes, decompressed."""
        suffix = self.file.path.suffix.lower()
        with open(self.file.path, "rb") as raw:
            self._raw = raw
            if suffix == ".zst":
                import pyarrow  # which has the codec that Python lacks

                raw = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), "zstd")
            elif suffix in _COMPRESSED:
                raw = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[suffix](raw)
            with raw:
                yield raw

    @contextmanager
    def text(self, newline: str | None = ""):
        """The characters, in UTF-8 or what the byte order mark or --encoding says; line ends as
        they are, or with `newline` None as \\n."""
        with self.content() as content:
            start = content.read(2**16)
        for mark, form in _BINARY.items():
            if start.startswith(mark):
                raise Fault(f"is binary ({form}), and not what its name says")
        encoding = self.file.encoding or next(
            (name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8-sig"
        )
        if "16" not in encoding and "32" not in encoding and start.count(0) > len(start) / 100:
            raise Fault(
                "is binary, or UTF-16 text without a mark: save it as UTF-8 text, or say what it "
                "is with --encoding, such as utf-16-le"
            )
        with self.content() as content:
            yield io.TextIOWrapper(content, encoding=encoding, newline=newline)

    @contextmanager
    def lines(self):
        """The lines, each with its end, one by one."""
        with self.text() as text:
            yield self._lines(text)

    @staticmethod
    def _lines(text) -> Iterator[str]:
        for number in itertools.count(1):
            line = text.readline(LONGEST + 1)
            if len(line) > LONGEST:
                raise Fault(f"it has over {LONGEST:,} characters, too long for a text", number)
            if not line:
                return
            yield line


# ---- csv


def _csv(opened: _Opened, notes: Counter) -> Iterator[Row]:
    """Columns of a csv. A row has as many fields as the header; more only if there is nothing in
    them."""
    delimiter, has_spaces, header, columns = _header(opened, notes)
    for column in columns:
        _check_is_one(header, column)
    places, width = [header.index(column) for column in columns], len(header)
    with opened.lines() as lines:
        reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=has_spaces, strict=True)
        next(filter(None, reader))
        while True:
            first = reader.line_num + 1  # of the row that comes
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise Fault(
                    f"a text in quotes is not closed, or a quote in it is not doubled ({error})",
                    first,
                ) from error
            if row is None:
                return
            if not row:
                if width == 1:  # an empty line, and a row where there is one column
                    yield Row((None,) * len(places))
                continue
            if len(row) > width and not any(row[width:]):
                notes["rows with an empty field too many"] += 1
            elif len(row) != width:
                more = f"a text with {_named(delimiter)} in it needs quotes around it"
                less = "one is missing, or a text goes on in the next line without quotes around it"
                hint = more if len(row) > width else less
                raise Fault(f"it has {len(row)} fields, the header {width}: {hint}", first)
            yield Row(tuple(row[place] for place in places))


def _header(opened: _Opened, notes: Counter) -> tuple[str, bool, list[str], tuple[str, ...]]:
    """A csv's delimiter, whether spaces follow it, its columns, and those that are asked for."""
    file, found = opened.file, []
    known = file.delimiter or ("\t" if ending(file.path) == ".tsv" else "")
    for guess, has_spaces in itertools.product(known or _DELIMITERS, (False, True)):
        with opened.lines() as lines:
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
        columns = file.columns or _usual(header)
        if columns and set(columns) <= set(header):
            if guess not in (known or ","):
                notes[f"file with {_named(guess)} between fields"] += 1
            return guess, has_spaces, header, _chosen(file, columns, notes)
        found.append(header)
    # No name that is looked for, and one column however it is cut
    if not file.columns and found and max(map(len, found)) == 1:
        return known or ",", False, found[0], _chosen(file, tuple(found[0]), notes)
    raise _no_column(file, max(found, key=len, default=[]))


def _named(delimiter: str) -> str:
    return "a tab" if delimiter == "\t" else f"'{delimiter}'"


# ---- which column


def _usual(names) -> tuple[str, ...]:
    return next(((name,) for name in USUAL_COLUMNS if name in names), ())


def _chosen(file: File, columns: tuple[str, ...], notes: Counter) -> tuple[str, ...]:
    """`columns`; which one was chosen is noted, where the user did not say it."""
    if not file.columns and columns != USUAL_COLUMNS[:1]:
        notes[f"file whose texts are its column '{columns[0]}'"] += 1
    return columns


def _check_is_one(names: list[str], column: str) -> None:
    if names.count(column) > 1:
        raise Fault(f"has {names.count(column)} columns '{column}': rename all but one")


def _no_column(file: File, names) -> Fault:
    names = list(map(str, names))
    there = f"its columns are {', '.join(names):.300}" if names else "it has none"
    missing = [column for column in file.columns if column not in names] or USUAL_COLUMNS
    lacks = " and no ".join(f"column '{column}'" for column in missing)
    by = "with --text_column" if len(file.columns) < 2 else "of these"
    return Fault(f"has no {lacks}: {there}; choose {by}")


# ---- JSON, parquet and Arrow: values of any type, nested

_ABSENT = object()


def _value(row: dict, column: str):
    """A field of a row: by its name, or through objects and lists by a path with dots; _ABSENT
    where there is none."""
    if column in row:
        return row[column]
    value = row
    for name in column.split("."):
        if isinstance(value, list) and name.isdecimal():
            value = value[int(name)] if int(name) < len(value) else _ABSENT
        elif isinstance(value, dict):
            value = value.get(name, _ABSENT)
        else:
            return _ABSENT
    return value


def _text(value, file: File, column: str, line: int | None) -> str | None:
    """A field as text, None if it holds nothing. Raises Fault for what is no text."""
    if value is None or value is _ABSENT or value != value:  # NaN stands for nothing as well
        return None
    is_number = isinstance(value, Number | bool | int | float)
    if is_number and file.takes_numbers:
        return json.dumps(value) if isinstance(value, bool) else str(value)
    if is_number or not isinstance(value, str):
        kind = type(value).__name__
        if isinstance(value, Number):
            kind = "int" if value.lstrip("-").isdecimal() else "float"
        kind = {"dict": "an object", "list": "a list"}.get(kind, kind)
        shown = value if isinstance(value, Number) else repr(value)
        raise Fault(
            f"'{column}' holds {kind}, such as {shown:.40}, not text: choose another with "
            "--text_column",
            line,
        )
    if len(value) > LONGEST:
        raise Fault(f"'{column}' has over {LONGEST:,} characters, too long for a text", line)
    return value


def _json(opened: _Opened, notes: Counter) -> Iterator[Row]:
    """Fields of JSON objects, one a line, in a list or in one that holds all; or texts alone, in a
    list."""
    file, objects = opened.file, _objects(opened, notes)
    head = list(itertools.islice(objects, 1000))
    names = list(dict.fromkeys(name for _, row in head if isinstance(row, dict) for name in row))
    columns = file.columns or _usual(names) or (tuple(names) if len(names) == 1 else ())
    if columns:
        _chosen(file, columns, notes)
    missing = dict.fromkeys(columns or USUAL_COLUMNS)
    # A Number is a str as well
    are_texts = bool(head) and not file.columns and all(type(row) is str for _, row in head)
    if are_texts:
        notes["file that is a list of texts"] += 1
    for line, row in itertools.chain(head, objects):
        if are_texts and type(row) is str:
            yield Row((_text(row, file, "the list", line),))
            continue
        if not isinstance(row, dict):
            kind = {"Number": "a number", "NoneType": "null"}.get(
                type(row).__name__, type(row).__name__
            )
            raise Fault(f"it holds {kind}, not a JSON object", line)
        if not columns:
            break
        values = [_value(row, column) for column in columns]
        for column, value in zip(columns, values, strict=True) if missing else ():
            if value is not _ABSENT:
                missing.pop(column, None)
        yield Row(tuple(_text(v, file, c, line) for c, v in zip(columns, values, strict=True)))
    if head and missing and not are_texts:
        raise _no_column(file, names)


_DECODER = json.JSONDecoder(parse_int=Number, parse_float=Number, parse_constant=lambda _: None)


def _objects(opened: _Opened, notes: Counter) -> Iterator[tuple[int | None, object]]:
    """What a JSON file holds, and the line that each begins in, where it is known."""
    with opened.lines() as lines:
        number, first = next(((n, x.strip()) for n, x in enumerate(lines, 1) if x.strip()), (1, ""))
        goes_on = any(line.strip() for line in lines)
    if first[:1] not in ("{", "["):
        raise Fault("cannot be read: it must hold JSON objects in UTF-8, one a line or in a list")
    if first[0] == "[":
        with opened.text() as text:
            yield from _list(text)
    elif goes_on and _is_json(first):
        with opened.lines() as lines:
            for number, line in enumerate(lines, 1):
                if not line.isspace():
                    yield number, _decoded(_DECODER.decode, line.rstrip(), number)
    else:
        with opened.text() as text:
            whole = text.read(LONGEST + 1)
        if len(whole) > LONGEST:
            _decoded(_DECODER.decode, first, number)  # which says what is wrong
        yield from _whole(whole, opened.file, notes)


def _is_json(text: str) -> bool:
    try:
        _DECODER.decode(text)
    except (ValueError, RecursionError):
        return False
    return True


def _whole(text: str, file: File, notes: Counter) -> Iterator[tuple[int | None, object]]:
    """Objects over several lines, one behind the other; or the rows of one that holds all of
    them."""
    found, place, line = [], 0, 1
    while (begins := re.compile(r"\s*").match(text, place).end()) < len(text):
        line += text.count("\n", place, begins)
        value, place = _decoded(_DECODER.raw_decode, text, 1, begins)
        found.append((line, value))
        line += text.count("\n", begins, place)
    inside = _inside(found[0][1], file.columns or USUAL_COLUMNS) if len(found) == 1 else None
    if inside is None:
        yield from found
        return
    rows, what = inside
    notes[what] += 1
    yield from ((None, row) for row in rows)


def _inside(whole: dict, columns: tuple[str, ...]) -> tuple[list, str] | None:
    """The rows that the only object of a file holds, and in words how; None if it is a row."""

    def has_text(value) -> bool:
        is_object = isinstance(value, dict)
        return is_object and any(isinstance(_value(value, c), str) for c in columns)

    lists = [n for n, v in whole.items() if isinstance(v, list) and v and isinstance(v[0], dict)]
    # What has a list of rows may have a description of itself
    lists_with_text = [name for name in lists if any(map(has_text, whole[name][:9]))]
    if has_text(whole) and not lists_with_text:
        return None
    lists = lists_with_text or lists
    if len(lists) > 1:
        raise Fault(f"has several lists ({', '.join(lists)}): save one of them alone")
    if lists:
        return whole[lists[0]], f"file whose rows are in its '{lists[0]}'"
    held = list(whole.values())
    # As pandas writes them: orient="index", "columns", "list"
    if all(isinstance(value, dict) for value in held):
        if any(map(has_text, held[:9])) and not any(column in whole for column in columns):
            return held, "file that names its rows"
        if all(list(v) == list(held[0]) and all(map(str.isdecimal, v)) for v in held):
            held = [list(value.values()) for value in held]
    if held and all(isinstance(v, list) and len(v) == len(held[0]) > 0 for v in held):
        rows = [dict(zip(whole, values, strict=True)) for values in zip(*held, strict=True)]
        return rows, "file of columns, as pandas writes them"
    return None


def _list(file) -> Iterator[tuple[int, object]]:
    """The elements of a JSON list, one by one, and the line that each begins in."""
    text, place, line, part = "", 0, 1, PART
    decode = _DECODER.raw_decode

    def more() -> bool:
        nonlocal text, place, line, part
        added = file.read(part)
        line += text.count("\n", 0, place)
        # Doubled: an element of many parts is not read anew too often
        text, place, part = text[place:] + added, 0, 2 * part
        if len(text) > 4 * LONGEST:
            raise Fault(f"an element has over {LONGEST:,} characters, too long for a text", line)
        return bool(added)

    def sign() -> str:
        nonlocal place
        while True:
            while place < len(text) and text[place].isspace():
                place += 1
            if place < len(text) or not more():
                return text[place : place + 1]

    def here() -> int:
        return line + text.count("\n", 0, place)

    sign()
    place += 1
    is_over = sign() == "]"
    place += is_over
    while not is_over:
        sign()
        try:
            element, end = decode(text, place)
        except (ValueError, RecursionError):
            if more():
                continue
            element = _decoded(decode, text, line, place)  # which says what is wrong
        began, place, part = here(), end, PART
        yield began, element
        is_over = sign() == "]"
        if not is_over and text[place : place + 1] != ",":
            raise Fault("the list is not closed, or a comma is missing", here())
        place += 1
    if sign():
        raise Fault(
            "something stands behind the list: a file holds one, or an object a line", here()
        )


def _decoded(decode, text: str, line: int, *place: int):
    try:
        return decode(text, *place)
    except json.JSONDecodeError as error:
        raise Fault(
            f"no JSON ({error.msg}): the file must hold objects, one a line or in a list",
            line + error.lineno - 1,
        ) from error
    except RecursionError as error:
        # Thousands of brackets in one another
        raise Fault(f"no JSON that can be read ({error})", line) from error


def _parquet(opened: _Opened, notes: Counter) -> Iterator[Row]:
    """Columns of a parquet file."""
    from pyarrow import parquet

    with _arrow_faults(), _plain(opened) as path:
        # Without its buffers it holds a row group, which may be the whole file.
        table = parquet.ParquetFile(path, buffer_size=PART)

        def batches(columns: list[str]):
            done, total = 0, max(table.metadata.num_rows, 1)
            for batch in table.iter_batches(256, columns=columns, use_threads=False):
                done += len(batch)
                opened.at(done / total)
                yield batch

        yield from _rows_of_batches(opened.file, table.schema_arrow, batches, notes)


def _arrow(opened: _Opened, notes: Counter) -> Iterator[Row]:
    """Columns of an Arrow file (Feather is one) or stream (what `datasets` saves)."""
    import pyarrow
    from pyarrow import ipc

    with _arrow_faults(), _plain(opened) as path, pyarrow.OSFile(str(path)) as content:
        is_stream = content.read(6) != b"ARROW1"
        size = content.size()
        content.seek(max(0, size - 8))
        if is_stream and content.read(8) != b"\xff\xff\xff\xff\0\0\0\0":
            # Of what was cut off between two batches the reader takes the rest for all
            raise Fault("is no Arrow stream, or was cut off: it has no end mark")
        content.seek(0)
        table = ipc.open_stream(content) if is_stream else ipc.open_file(content)

        def batches(columns: list[str]):
            numbers = range(0 if is_stream else table.num_record_batches)
            for batch in table if is_stream else map(table.get_batch, numbers):
                chosen = batch.select(columns)
                for start in range(0, len(chosen), 256):
                    opened.at(content.tell() / size)
                    yield chosen.slice(start, 256)

        yield from _rows_of_batches(opened.file, table.schema, batches, notes)


@contextmanager
def _plain(opened: _Opened):
    """Where a file lies that its reader jumps about in: decompressed, if need be."""
    if opened.file.path.suffix.lower() not in _COMPRESSED:
        yield opened.file.path
        return
    with tempfile.NamedTemporaryFile() as plain:
        with opened.content() as content:
            shutil.copyfileobj(content, plain)
        plain.flush()
        yield Path(plain.name)


@contextmanager
def _arrow_faults():
    """What pyarrow finds wrong, as a Fault."""
    import pyarrow

    try:
        yield
    except UnicodeDecodeError as error:  # of bytes that are said to be text
        raise Fault(f"is not UTF-8 text ({error.reason}): write it again") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise Fault(f"cannot be read ({' '.join(str(error).split()):.200})") from error


def _rows_of_batches(file: File, schema, batches: Callable, notes: Counter) -> Iterator[Row]:
    """`batches`: of the columns of these names, a few hundred rows at a time."""
    columns = file.columns or _usual(schema.names)
    if not columns:
        columns = tuple(schema.names) if len(schema.names) == 1 else ()
    if not columns:
        raise _no_column(file, schema.names)
    _chosen(file, columns, notes)
    tops = [c if c in schema.names else c.split(".")[0] for c in columns]
    for column, top in zip(columns, tops, strict=True):
        _check_is_one(schema.names, top)
        _check_arrow_type(schema, column, file)
    for batch in batches(list(dict.fromkeys(tops))):
        for row in batch.to_pylist():
            yield Row(tuple(_text(_value(row, c), file, c, None) for c in columns))


def _check_arrow_type(schema, column: str, file: File) -> None:
    """Refuse a column that is not there, or that holds no text, before it is read."""
    from pyarrow import types

    if column in schema.names:
        kind = schema.field(column).type
    else:
        top, *path = column.split(".")
        if top not in schema.names:
            raise _no_column(file, schema.names)
        kind = schema.field(top).type
        for name in path:
            if types.is_struct(kind) and kind.get_field_index(name) >= 0:
                kind = kind.field(name).type
            elif name.isdecimal() and (types.is_list(kind) or types.is_large_list(kind)):
                kind = kind.value_type
            else:
                raise _no_column(file, schema.names)
    kind = kind.value_type if types.is_dictionary(kind) else kind
    fits = [types.is_string, types.is_large_string, types.is_string_view, types.is_null]
    if file.takes_numbers:
        fits += [types.is_integer, types.is_floating, types.is_boolean]
    if not any(fit(kind) for fit in fits):
        raise Fault(f"column '{column}' holds {kind}, not text: choose another with --text_column")


# ---- txt


def _txt(opened: _Opened, notes: Counter) -> Iterator[Row]:
    if opened.file.is_one_text:
        with opened.text(newline=None) as text:
            part = text.read(PART)
            while part:
                following = text.read(PART)
                yield Row((part,), ends=not following)
                part = following
        return
    with opened.lines() as lines:
        for line in lines:
            yield Row((line.rstrip("\r\n"),))


# ---- what is no text


def _undecodable(opened: _Opened, error: UnicodeDecodeError) -> Fault:
    """Where a file is not in its encoding. The decoder knows the place in the part that it was
    given alone."""
    encoding = opened.file.encoding or error.encoding
    if encoding == "utf-8":
        with opened.content() as content:
            for number, line in enumerate(content, 1):
                try:
                    line.decode()
                except UnicodeDecodeError as found:
                    return Fault(
                        f"byte {line[found.start]:#04x} is not UTF-8: save it as UTF-8 text, or "
                        "say what it is with --encoding, such as cp1252",
                        number,
                    )
    return Fault(
        f"does not go on as the {encoding} that it begins as ({error.reason}): save it as UTF-8 "
        "text, or say what it is with --encoding"
    )


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
