"""What texts a file has: read as they were meant, or refused by a line that names the file and the
line in it. Never another column's."""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import re
from collections import Counter
from pathlib import Path

import datasets
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from args import resolve, train_parser
from opt.data import files, texts, tokens
from opt.errors import UserError

from .conftest import REPO, SAMPLE_MODEL, metrics, run
from .test_bad_input import assert_refused


def source(file, *flags) -> texts.Source:
    """What --dataset `file` and other flags name."""
    return texts.find(train_parser().parse_args(["--dataset", str(file), *flags]))


def read(file, content: bytes | str, *flags) -> tuple[list, dict]:
    """The texts of a file with this content, and what is noted of it."""
    Path(file).write_bytes(content if isinstance(content, bytes) else content.encode())
    notes = Counter()
    return [text.text for text in source(file, *flags).texts("train", notes)], dict(notes)


TWO = ["One, two.", "Three."]
TOO_MANY = {"rows with an empty field too many": 2}
# Kinds of files that are sound, or can only be meant in one way -> their texts, and what is noted.
READ = {
    "plain.csv": ('id,description\n1,"One, two."\n2,Three.\n', TWO, {}),
    "one comma more in each row.csv": (
        'description,genre\n"One, two.",a,\nThree.,b,\n',
        TWO,
        TOO_MANY,
    ),
    "many commas more.csv": (
        'id,description,genre\n1,"One, two.",a,,,\n2,Three.,b,,,\n',
        TWO,
        TOO_MANY,
    ),
    "a comma more in the header too.csv": (
        'description,genre,\n"One, two.",a,\nThree.,b,\n',
        TWO,
        {},
    ),
    "semicolons.csv": (
        'id;description\n1;"One, two."\n2;Three.\n',
        TWO,
        {"file with ';' between fields": 1},
    ),
    "semicolons, no quotes.csv": (
        "id;description\n1;One, two.\n2;Three.\n",
        TWO,
        {"file with ';' between fields": 1},
    ),
    "tabs.csv": (
        "id\tdescription\n1\tOne, two.\n2\tThree.\n",
        TWO,
        {"file with a tab between fields": 1},
    ),
    "bars.csv": (
        "id|description\n1|One, two.\n2|Three.\n",
        TWO,
        {"file with '|' between fields": 1},
    ),
    "tabs.tsv": ("id\tdescription\n1\tOne, two.\n2\tThree.\n", TWO, {}),
    "spaces.csv": ('id, description\n1, "One, two."\n2, Three.\n', TWO, {}),
    "all in quotes.csv": ('"id","description"\n"1","One, two."\n"2","Three."\n', TWO, {}),
    "UPPER.CSV": ('id,description\n1,"One, two."\n2,Three.\n', TWO, {}),
    "a mark.csv": ('\ufeffdescription,id\n"One, two.",1\nThree.,2\n', TWO, {}),
    "UTF-16.csv": ('description,id\n"One, two.",1\nThree.,2\n'.encode("utf-16"), TWO, {}),
    "empty lines.csv": ('\n\nid,description\n\n1,"One, two."\n\n2,Three.\n\n', TWO, {}),
    "old Mac.csv": ('id,description\r1,"One, two."\r2,Three.\r', TWO, {}),
    "Windows.csv": ('id,description\r\n1,"One, two."\r\n2,Three.\r\n', TWO, {}),
    "lines in a text.csv": (
        'id,description\n1,"One,\ntwo."\n2,Three.\n',
        ["One,\ntwo.", "Three."],
        {},
    ),
    "quotes.csv": (
        'id,description\n1,"""One"", two."\n2,A 12" pipe.\n',
        ['"One", two.', 'A 12" pipe.'],
        {},
    ),
    "words that stand for nothing.csv": (
        "description\nNA\nNone\nnull\nnan\nN/A\n#N/A\n",
        ["NA", "None", "null", "nan", "N/A", "#N/A"],
        {},
    ),
    "digits.csv": (
        "id,description\na,000\nb,007\nc,1e5\nd,true\ne,2024-01-01\n",
        ["000", "007", "1e5", "true", "2024-01-01"],
        {},
    ),
    "nothing.csv": ('id,description\n1,\n2,""\n3,x\n', ["", "", "x"], {}),
    "NUL.csv": (
        "description\n" + "A long text. " * 20 + "\0\n",
        ["A long text. " * 20],
        {"texts with NUL characters, left out": 1},
    ),
    "plain.jsonl": ('{"description": "One, two."}\n{"description": "Three."}\n', TWO, {}),
    "plain.ndjson": ('{"description": "One, two."}\n{"description": "Three."}\n', TWO, {}),
    "list.json": ('[{"description": "One, two."},\n {"description": "Three."}\n]\n', TWO, {}),
    "texts.json": ('["One, two.",\n "Three."]\n', TWO, {"file that is a list of texts": 1}),
    "over several lines.json": (
        '{\n"description": "One, two."\n}\n{\n"description":\n"Three."}\n',
        TWO,
        {},
    ),
    "one over several lines.json": ('{\n"description": "x",\n"tags": [{"a": 1}]}\n', ["x"], {}),
    "under a key.json": (
        '{"version": 1, "data": [{"description": "One, two."},\n {"description": "Three."}]}',
        TWO,
        {"file whose rows are in its 'data'": 1},
    ),
    "of a description itself.json": (
        '{"description": "About shows.", "sources": [{"url": "x"}], "shows": ['
        '{"description": "One, two."}, {"description": "Three."}]}',
        TWO,
        {"file whose rows are in its 'shows'": 1},
    ),
    "a table of pandas.json": (
        '{"schema": {"fields": [{"name": "x"}]}, "data": [\n{"index": 0, "description": "One, two."},'
        '\n{"index": 1, "description": "Three."}]}',
        TWO,
        {"file whose rows are in its 'data'": 1},
    ),
    "columns of pandas.json": (
        '{"id": {"0": 7, "1": 8}, "description": {"0": "One, two.", "1": "Three."}}',
        TWO,
        {"file of columns, as pandas writes them": 1},
    ),
    "rows of pandas.json": (
        '{"7": {"id": 1, "description": "One, two."}, "8": {"id": 2, "description": "Three."}}',
        TWO,
        {"file that names its rows": 1},
    ),
    "commas, whatever it is called.tsv.csv": (
        'id,text\n1,"One, two."\n2,Three.\n',
        TWO,
        {"file whose texts are its column 'text'": 1},
    ),
    "lists of pandas.json": (
        '{"id": [7, 8], "description": ["One, two.", "Three."]}',
        TWO,
        {"file of columns, as pandas writes them": 1},
    ),
    "lines.json": ('{"description": "One, two."}\n\n{"description": "Three."}', TWO, {}),
    "a mark.jsonl": ('\ufeff{"description": "One, two."}\n{"description": "Three."}\n', TWO, {}),
    "missing.jsonl": (
        '{"id": 1}\n{"description": null}\n{"description": NaN}\n{"description": "x"}\n',
        [None, None, None, "x"],
        {},
    ),
    "others change.jsonl": (
        '{"description": "x", "m": null}\n{"description": "y", "m": "s"}\n{"description": "z", "m": [1]}\n',
        list("xyz"),
        {},
    ),
    "half an emoji.jsonl": (
        '{"description": "a \\ud83d b"}\n',
        ["a \ufffd b"],
        {"texts with half a character, now U+FFFD": 1},
    ),
    "an emoji.jsonl": ('{"description": "a \\ud83d\\ude00 b"}\n', ["a \U0001f600 b"], {}),
    "NUL.jsonl": (
        '{"description": "a\\u0000b"}\n',
        ["ab"],
        {"texts with NUL characters, left out": 1},
    ),
    "null first.json": ('[{"description": null}, {"description": "x"}]', [None, "x"], {}),
    "plain.txt": ("One, two.\nThree.", TWO, {}),
    "a mark.txt": ("\ufeffOne, two.\r\nThree.\r\n", TWO, {}),
    "UTF-32.txt": ("One, two.\nThree.\n".encode("utf-32"), TWO, {}),
    "UTF-16.txt": ("One, two.\nThree.\n".encode("utf-16"), TWO, {}),
    "other line ends.txt": ("One\u2028two\x0b.\nThree.\n", ["One\u2028two\x0b.", "Three."], {}),
}


@pytest.mark.parametrize("name", READ)
def test_read_as_it_was_meant(tmp_path, name):
    content, expected, noted = READ[name]
    assert read(tmp_path / name, content) == (expected, noted)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
# Kinds of files that may mean several things, or that lack something -> what the line says.
REFUSED = {
    "a comma in the first text.csv": (
        "id,description\n1,One, two.\n2,Three.\n",
        ["line 2", "3 fields", "header 2"],
    ),
    "a comma in a title.csv": (
        "title,description,genre\nThe, end,One.,a\nx,Three.,b\n",
        ["line 2", "4 fields", "header 3"],
    ),
    "a comma in each text.csv": (
        "title,description\na,One, two.\nb,Three, four.\n",
        ["line 2", "3 fields"],
    ),
    "a comma later.csv": (
        'id,description\n1,"One,\ntwo."\n2,Three.\n3,Four, five.\n',
        ["line 5", "3 fields"],
    ),
    "a field less.csv": (
        "id,description,genre\n1,One.,a\n2,Three.\n",
        ["line 3", "2 fields", "header 3"],
    ),
    "backslashes, a comma.csv": (
        't,description\na,"A \\"tall, cousin\\" left."\n',
        ["line 2", "not doubled"],
    ),
    "backslashes.csv": ('description\n"A \\"tall\\" cousin."\n', ["line 2", "not doubled"]),
    "a backslash at the end.csv": (
        't,description\n"say \\"",b\n"more",c\n',
        ["line 2", "not doubled"],
    ),
    "a quote left open.csv": (
        'id,description\n1,One.\n2,"Two.\n3,Three.\n',
        ["line 3", "not closed"],
    ),
    "single quotes.csv": ("id,description\n1,'One, two.'\n", ["line 2", "3 fields"]),
    "rows with another delimiter.csv": ("id,description\n1;One.\n", ["line 2", "1 fields"]),
    "two such columns.csv": ("description,description\na,b\n", ["2 columns 'description'"]),
    "no such column.csv": (
        "id,plot\n1,One.\n",
        ["no column 'description'", "id, plot", "--text_column"],
    ),
    "Latin-1.csv": (
        "id,description\n1,One.\n2,Z\xfcrich\n".encode("latin-1"),
        ["line 3", "0xfc", "UTF-8"],
    ),
    "Latin-1.txt": ("One.\nZ\xfcrich\n".encode("latin-1"), ["line 2", "0xfc", "UTF-8"]),
    "UTF-16 without a mark.txt": ("One, two.\nThree.\n".encode("utf-16-le"), ["UTF-16", "UTF-8"]),
    "half of UTF-16.txt": ("One, two.\nThree.\n".encode("utf-16")[:-1], ["utf-16"]),
    "a number.jsonl": (
        '{"description": "x"}\n\n{"description": 7}\n',
        ["line 3", "int", "not text", "--text_column"],
    ),
    "an object.jsonl": ('{"description": {"text": "x"}}\n', ["line 1", "an object", "not text"]),
    "texts and a number.json": ('["x",\n 7]', ["line 1", "str", "not a JSON object"]),
    "cut.jsonl": ('{"description": "x"}\n{"descri', ["line 2", "no JSON"]),
    "cut.json": ('[{"description": "x"},\n{"descri', ["line 2", "no JSON"]),
    "a comma missing.json": ('[{"description": "x"}\n{"description": "y"}]', ["line 2", "comma"]),
    "not closed.json": ('[{"description": "x"}\n', ["not closed"]),
    "cut over several lines.json": ('{\n"description": "x",\n"id"\n', ["line 4", "one a line"]),
    "two lists.json": (
        '{"train": [{"description": "x"}], "test": [{"description": "y"}]}',
        ["several lists (train, test)", "save one"],
    ),
    "a list behind another.json": (
        '[{"description": "x"}]\n[{"description": "y"}]\n',
        ["line 2", "behind the list"],
    ),
    "words behind a list.json": ('[{"description": "x"}\n]\n\nx', ["line 4", "behind the list"]),
    "a list in each line.jsonl": ('["x", "y"]\n["z", "w"]\n', ["line 2", "behind the list"]),
    "Git LFS.csv": (LFS, ["Git LFS", "git lfs pull"]),
    "Git LFS.parquet": (LFS, ["Git LFS", "git lfs pull"]),
    "Git LFS.txt.gz": (LFS, ["Git LFS", "git lfs pull"]),
    "no such column.jsonl": ('{"plot": "x", "id": 1}\n', ["no column 'description'", "plot"]),
    "empty.txt": ("", ["empty file"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_a_line(tmp_path, name):
    content, says = REFUSED[name]
    with pytest.raises(
        UserError,
        match="(?s)^(?!.*\n)(?=.{20,600}$)"
        + ".*".join(map(re.escape, [f"--dataset {tmp_path / name}", *says])),
    ):
        read(tmp_path / name, content)


def test_parquet_is_read_by_column(tmp_path):
    import pandas

    file = tmp_path / "d.parquet"
    pandas.DataFrame(
        {"description": ["NA", None, "x"], "n": [1, 2, 3], "c": pandas.Categorical(["a", "b", "a"])}
    ).to_parquet(file)

    def column(name):
        found = source(file, "--text_column", name).texts("train", Counter())
        return [text.text for text in found]

    assert column("description") == ["NA", None, "x"]
    assert column("c") == ["a", "b", "a"]
    with pytest.raises(UserError, match="'n' holds int64, not text.*--text_column"):
        column("n")
    twice = pyarrow.table([["x"], ["y"]], names=["description", "description"])
    pyarrow.parquet.write_table(twice, file)
    with pytest.raises(UserError, match="has 2 columns 'description': rename all but one"):
        column("description")


FIELDS = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=9),
    min_size=2,
    max_size=4,
)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(FIELDS, min_size=1, max_size=6),
    st.sampled_from(",;|\t"),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_what_a_writer_of_csv_wrote_is_what_is_read(tmp_path, fields, delimiter, quoting):
    """Whatever is in the texts, and whatever stands between them."""
    rows = [(row + ["", "", ""])[:3] for row in fields]
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter, quoting=quoting).writerows(
        [["id", "description", "genre"], *rows]
    )
    assert read(tmp_path / "d.csv", out.getvalue())[0] == [row[1] for row in rows]


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.integers(0, 10**6), st.sampled_from([*",\";\\\n\r\t '", ""]), st.booleans(), st.booleans()
)
def test_one_damage_never_brings_another_columns_text(tmp_path, at, character, replaces, quoted):
    """A character put into a sound file, or in the place of another, or one left out: what is read
    then is of the right column, or it is refused. Texts of that column begin with D, those of the
    others do not have a D."""
    mark = '"' if quoted else ""
    rows = [
        ["title", "description", "genre"],
        *([f"T{i}", f"{mark}D{i} text{mark}", f"G{i}"] for i in range(5)),
    ]
    sound = "".join(",".join(row) + "\n" for row in rows)
    header = sound.index("\n") + 1
    at = header + at % (len(sound) - header)
    damaged = sound[:at] + character + sound[at + (replaces or not character) :]
    try:
        found, _ = read(tmp_path / "d.csv", damaged)
    except UserError as error:
        assert re.search(r"d\.csv, line \d+: ", str(error))
        return
    for text in found:
        assert not set(text) & set("TG"), (damaged, found)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.text(max_size=60), min_size=1, max_size=20),
    st.integers(1, 20),
    st.sampled_from([None, 1]),
)
def test_a_json_list_is_read_in_parts(tmp_path, found, part, indent):
    """Wherever the parts end: in a text, in a number, in a surrogate pair."""
    content = json.dumps(
        [{"n": i * 10**6, "description": text} for i, text in enumerate(found)], indent=indent
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "PART", part)
        read_back, _ = read(tmp_path / "d.json", content)
        assert read_back == [
            re.sub("[\ud800-\udfff]", "\ufffd", text.replace("\0", "")) for text in found
        ]
        lines = [
            line for line, _ in files._list(open(tmp_path / "d.json", encoding="utf-8", newline=""))
        ]
    starts = [
        content.count("\n", 0, match.start()) + 1 for match in re.finditer(r'\{\s*"n": ', content)
    ]
    assert lines == starts


def test_an_object_over_several_lines_has_a_length(tmp_path, monkeypatch):
    """Beyond it a file has to have an object a line, or a list of them."""
    content = json.dumps({"data": [{"description": "One, two."}] * 20}, indent=1)
    assert read(tmp_path / "d.json", content)[0] == ["One, two."] * 20
    monkeypatch.setattr(files, "LONGEST", len(content) - 1)
    with pytest.raises(UserError, match=r"d\.json, line 1: .* one a line or in a list"):
        read(tmp_path / "d.json", content)


# ---- compressed, in other encodings, nested, as prompt and response


COMPRESSORS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: _zstd(content[:5]) + _zstd(content[5:]),  # as pzstd writes it
}


def stream(*tables: pyarrow.Table) -> bytes:
    """As `datasets` writes it."""
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, tables[0].schema) as out:
        for table in tables:
            out.write_table(table)
    return sink.getvalue().to_pybytes()


def _zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as out:
        out.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "txt", "parquet", "TSV", "arrow", "feather"])
def test_compressed(tmp_path, kind, suffix):
    compress = COMPRESSORS[suffix]
    plain = tmp_path / f"d.{kind}"
    table = pyarrow.table({"description": TWO})
    if kind == "parquet":
        pyarrow.parquet.write_table(table, plain)
    elif kind == "feather":
        pyarrow.feather.write_feather(table, plain)
    elif kind == "arrow":
        plain.write_bytes(stream(table))
    else:
        texts = {"csv": "plain.csv", "jsonl": "plain.jsonl", "txt": "plain.txt", "TSV": "tabs.tsv"}
        plain.write_text(READ[texts[kind]][0])
    whole = compress(plain.read_bytes())
    assert read(tmp_path / f"e.{kind}{suffix}", whole) == (TWO, {})
    with pytest.raises(UserError, match=f"e.{kind}{suffix}.*(damaged|cut off|cannot be read)"):
        read(tmp_path / f"e.{kind}{suffix}", whole[:-9])


def test_arrow_that_was_cut_off(tmp_path):
    """Between two batches too, where pyarrow reads what is there, and in any other place."""
    table = pyarrow.table({"description": TWO})
    whole, first = stream(table, table), stream(table)[:-8]
    assert read(tmp_path / "d.arrow", whole) == (2 * TWO, {}) and whole.startswith(first)
    for cut in (len(first), len(first) + 40, len(whole) - 8, len(whole) - 1, 9):
        with pytest.raises(UserError, match="d.arrow (cannot be read|.*cut off)"):
            read(tmp_path / "d.arrow", whole[:cut])
    pyarrow.feather.write_feather(table, tmp_path / "d.feather")
    content = (tmp_path / "d.feather").read_bytes()
    with pytest.raises(UserError, match="d.feather cannot be read"):
        read(tmp_path / "d.feather", content[:-40])
    with pytest.raises(UserError, match=r"is binary \(Arrow\)"):
        read(tmp_path / "d.txt", content)


def test_encodings(tmp_path):
    content = 'id,description\n1,"Zürich, für €2"\n'
    for encoding in ("cp1252", "utf-16-le", "latin-1", "utf-8", "UTF8"):
        text = content.replace("€", "e") if encoding == "latin-1" else content
        found, _ = read(tmp_path / "d.csv", text.encode(encoding), "--encoding", encoding)
        assert found == ["Zürich, für €2" if encoding != "latin-1" else "Zürich, für e2"]
    with pytest.raises(UserError, match="line 2: byte 0xfc is not UTF-8.*--encoding"):
        read(tmp_path / "d.csv", content.encode("cp1252"))
    with pytest.raises(UserError, match="is not utf-16 .* without a mark it is utf-16-le"):
        read(tmp_path / "d.txt", "One.\n".encode("utf-16-le"), "--encoding", "utf-16")
    for name, content in (("zip", b"PK\x03\x04" + b"x" * 99), ("gzip", gzip.compress(b"x" * 99))):
        with pytest.raises(UserError, match=rf"is binary \({name}\)"):
            read(tmp_path / "d.txt", content)


def test_the_column_that_was_not_named(tmp_path):
    """description, text, or the only one: said, where it is not the first."""
    for content, column in (
        ("id,text\n1,x\n", "text"),
        ("plot\nx\n", "plot"),
        ("id;text\n1;x\n", "text"),
    ):
        found, notes = read(tmp_path / "d.csv", content)
        assert found == ["x"] and notes[f"file whose texts are its column '{column}'"] == 1
    for name, content in (
        ("d.csv", "id,plot\n1,x\n"),
        ("d.jsonl", '{"id": 1, "plot": "x"}\n'),
    ):
        with pytest.raises(
            UserError, match="no column 'description' and no column 'text'.*id, plot"
        ):
            read(tmp_path / name, content)


def test_nested_fields(tmp_path):
    """By dots, through objects and lists; a column of that very name first."""
    rows = [
        {"answer": {"text": "x", "all": ["y", "z"]}, "a.b": "w"},
        {"answer": None, "a.b": None},
        {"answer": {"text": None, "all": []}},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    table = pyarrow.Table.from_pylist(rows)
    large = pyarrow.struct({"text": "large_string", "all": pyarrow.large_list(pyarrow.string())})
    table = table.set_column(0, "answer", table["answer"].cast(large))  # as polars writes it
    pyarrow.parquet.write_table(table, tmp_path / "n.parquet")
    expected = {"answer.text": ["x", None, None], "answer.all.1": ["z", None, None]}
    for column, wanted in (expected | {"a.b": ["w", None, None]}).items():
        assert read(tmp_path / "n.jsonl", lines, "--text_column", column)[0] == wanted
        found = source(tmp_path / "n.parquet", "--text_column", column).texts("train", Counter())
        assert [text.text for text in found] == wanted
    for column, says in (("answer", "an object|struct"), ("answer.x", "no column 'answer.x'")):
        with pytest.raises(UserError, match=says):
            read(tmp_path / "n.jsonl", lines, "--text_column", column)
        with pytest.raises(UserError, match=says):
            list(source(tmp_path / "n.parquet", "--text_column", column).texts("train", Counter()))


def test_prompt_and_response(tmp_path):
    """Columns, or a template; numbers as they are spelled; without a response there is no text."""
    lines = (
        '{"q": "One?", "a": "1.", "n": 1e5, "b": true}\n'
        '{"q": null, "a": "2.", "n": 1.50}\n{"q": "Three?", "a": " "}\n'
    )

    def found(*flags):
        (tmp_path / "d.jsonl").write_text(lines)
        of = source(tmp_path / "d.jsonl", *flags).texts("train", Counter())
        return [(text.prompt, text.text) for text in of]

    columns = ("--prompt_column", "q", "--response_column", "a")
    assert found(*columns) == [("One?", "1."), ("", "2."), ("", None)]
    assert found("--template", r"Q: {q}\nA: {a}") == [
        ("Q: One?\nA: ", "1."),
        ("Q: \nA: ", "2."),
        ("", None),
    ]
    assert found("--template", "{n} {{x}} {b}: {a}!")[:2] == [
        ("1e5 {x} true: ", "1.!"),
        ("1.50 {x} : ", "2.!"),
    ]
    assert found("--template", "{q}|{a}|{n}", "--response_column", "a")[0] == ("One?|", "1.|1e5")
    numbers = ("--prompt_column", "q", "--response_column", "n")
    assert found(*numbers)[:2] == [("One?", "1e5"), ("", "1.50")]


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--template", "no field"], "names no column"),
        (["--template", "{"], "cannot be read"),
        (["--template", "{}"], "columns in braces"),
        (["--template", "{a:>3}"], "columns in braces"),
        (["--template", "{a}", "--response_column", "b"], "--response_column b is not in"),
        (["--template", "{a}", "--text_column", "b"], "--text_column does not go with"),
        (["--prompt_column", "a"], "go together"),
        (["--template", "{a}", "--block_size", "8"], "--block_size joins whole texts"),
        (["--csv_delimiter", "ab"], "one character"),
        (["--encoding", "utf-99"], "no such encoding"),
        (["--encoding", "hex"], "no such encoding"),
        (["--validation_file", "x.csv", "--validation_split", "test"], "both say"),
    ],
)
def test_flags_that_contradict_one_another(flags, says):
    with pytest.raises(UserError, match=re.escape(says)):
        resolve(train_parser().parse_args(flags), "cpu", False)


# ---- several files


def test_files_globs_and_folders_in_their_order(tmp_path):
    for name, content in {"b.csv": "x", "a.jsonl": "y", "f/one.txt": "z", "f/two.txt": "w"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        line = {"csv": "description\n{}\n", "jsonl": '{{"text": "{}"}}\n', "txt": "{}\n"}
        (tmp_path / name).write_text(line[name.split(".")[1]].format(content))
    in_latin_1 = tmp_path / "f" / os.fsdecode(b"not\xe9s.csv")
    in_latin_1.write_text("description\nv\n")

    def found(*names, split="train", flags=()):
        names = [str(tmp_path / name) for name in names]
        of = texts.find(train_parser().parse_args(["--dataset", *names, *flags]))
        return [text.text for text in of.texts(split, Counter())], of.said

    assert found("b.csv", "a.jsonl")[0] == ["x", "y"]
    assert found("a.jsonl", "b.csv", "f/*.txt")[0] == ["y", "x", "z", "w"]
    read_back, said = found("f")
    assert (
        read_back == ["z", "w"] and "1 of another form or split left aside, not\\xe9s.csv" in said
    )
    assert found("**/*.txt")[0] == ["z", "w"]
    flags = ("--validation_file", str(tmp_path / "a.jsonl"))
    assert found("b.csv", split="held_out", flags=flags)[0] == ["y"]
    for name, says in (("g", "no such file"), ("*.parquet", "no file has such a name")):
        with pytest.raises(UserError, match=says):
            found(name)
    (tmp_path / "f" / "train.csv").write_text("description\nt\n")
    (tmp_path / "f" / "test.csv").write_text("description\nu\n")
    for name in ("one.txt", "two.txt", in_latin_1.name):
        (tmp_path / "f" / name).unlink()
    assert found("f") == (["t"], f"folder {tmp_path}/f, 2 files, split train, left aside: test")
    assert found("f", flags=("--train_split", "test"))[0] == ["u"]
    assert found("f", split="held_out", flags=("--validation_split", "test"))[0] == ["u"]
    with pytest.raises(UserError, match="no split 'dev': its splits are train, test"):
        found("f", flags=("--train_split", "dev"))
    validation = (tmp_path / "f" / "test.csv").rename(tmp_path / "f" / "validation.csv")
    assert found("f")[1].endswith(", split train, held out: split validation")
    none = found("f", flags=("--eval_fraction", "0"))[1]
    assert none.endswith(", split train, left aside: validation")
    validation.rename(tmp_path / "f" / "test.csv")
    # What is held out by name is what was kept for it, and never what others train on
    flags = ("--validation_file", str(tmp_path / "f"))
    assert found("b.csv", split="held_out", flags=flags)[0] == ["u"]
    assert found("b.csv", flags=flags)[1].endswith(
        f"held out: folder {tmp_path}/f, 2 files, split test"
    )
    for flag in ("--train_split", "--validation_split"):
        with pytest.raises(UserError, match=f"{flag} dev is of none of the data sets"):
            found("b.csv", flags=(flag, "dev"))
    repeated = ["--dataset", str(tmp_path / "a.jsonl"), f"--dataset={tmp_path}/b.csv"]
    of = texts.find(train_parser().parse_args(repeated))
    assert [text.text for text in of.texts("train", Counter())] == ["y", "x"]
    (tmp_path / "l").mkdir()
    (tmp_path / "f").rename(tmp_path / "f [old]")
    (tmp_path / "l" / "f").symlink_to(tmp_path / "f [old]")
    for name, says in (
        ("l", r"without a file .* \(1 link to folders not followed\)"),
        ("f [old]", r"no folder with .* \["),
    ):
        with pytest.raises(UserError, match=says):
            found(name)


def test_a_folder_of_several_configurations(tmp_path):
    """A clone of a data set on the Hub, whose README says what they are."""
    for language in ("en", "de"):
        (tmp_path / f"{language}.csv").write_text(f"description\n{language}\n")
    configs = "".join(f"- config_name: {x}\n  data_files: {x}.csv\n" for x in ("en", "de"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")

    def found(*flags):
        of = source(tmp_path, *flags)
        return [text.text for text in of.texts("train", Counter())], of.said

    read_back, said = found("--dataset_config_name", "de")
    assert read_back == ["de"] and said.endswith(
        "1 of another form or split left aside, en.csv the first), de"
    )
    with pytest.raises(UserError, match="several configurations: choose one of en, de"):
        found()
    with pytest.raises(UserError, match="no configuration 'fr': choose one of en, de"):
        found("--dataset_config_name", "fr")


def test_what_datasets_has_saved(tmp_path):
    """Its files alone, in its order, and not the caches that it leaves beside them."""
    rows = datasets.Dataset.from_dict(
        {"id": range(2500), "text": [f"text {i}" for i in range(2500)]}
    )
    rows.save_to_disk(tmp_path / "one", num_shards=3)
    several = {"train": rows.select(range(2000, 0, -1)), "validation": rows.select([5, 7])}
    datasets.DatasetDict(several).save_to_disk(tmp_path / "two")
    for place in ("one", "two/train"):
        (tmp_path / place / "cache-0123.arrow").write_bytes(stream(pyarrow.table({"text": ["no"]})))

    def found(name, split="train"):
        of = texts.find(train_parser().parse_args(["--dataset", str(tmp_path / name)]))
        return [text.text for text in of.texts(split, Counter())], of.said

    assert found("one") == (rows["text"], f"folder {tmp_path}/one, saved by datasets")
    read_back, said = found("two")
    assert read_back == several["train"]["text"]
    assert said.endswith("saved by datasets, split train, held out: split validation")
    assert found("two", "held_out")[0] == ["text 5", "text 7"]
    (tmp_path / "two" / "validation" / "state.json").unlink()
    with pytest.raises(UserError, match="is not all of what datasets' save_to_disk writes"):
        found("two")


# ---- as a user meets it


def train(dataset, output, *flags, env=None):
    """opt_train_demo.py on all texts of a file, in one step."""
    given = (
        "--model_name_or_path",
        SAMPLE_MODEL,
        "--dataset",
        dataset,
        "--output_path",
        output,
        "--eval_fraction",
        0,
    )
    flags = ("--batch_size", 64, "--max_train_steps", 1, "--no_save", *flags)
    return run(
        REPO / "opt_train_demo.py", *given, *flags, env={"CUDA_VISIBLE_DEVICES": ""} | (env or {})
    )


def tokens_of(found: list[str]) -> int:
    tokenizer = tokens.load_tokenizer(SAMPLE_MODEL)
    return sum(len(ids) + 2 for ids in tokenizer(found, add_special_tokens=False)["input_ids"])


def test_a_field_too_many_costs_no_text(tmp_path):
    """Read by pandas the genres were the texts, and the exit code was 0."""
    found = ["A girl leaves.", "A boy stays, for once."]
    rows = itertools.chain(["description,genre"], (f'"{text}",Drama,' for text in found))
    (tmp_path / "d.csv").write_text("\n".join(rows) + "\n")
    done = train(tmp_path / "d.csv", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "2 rows with an empty field too many" in done.stdout
    assert metrics(tmp_path / "out")[0]["tokens"] == tokens_of(found)


def test_a_comma_too_many_is_named(tmp_path):
    (tmp_path / "d.csv").write_text("description,genre\nOne, two, and three.,Drama\nFour.,Comedy\n")
    done = train(tmp_path / "d.csv", tmp_path / "out")
    assert_refused(done, str(tmp_path / "d.csv"), "line 2")


def test_a_replaced_file_is_read_anew(tmp_path):
    """Another one of the same name, size and time, as tar, rsync -t and cp -p leave it; with the
    same caches."""
    env = {"XDG_CACHE_HOME": str(tmp_path / "xdg"), "HF_HOME": str(tmp_path / "hf")}
    versions = (
        ["A girl leaves the town!!", "Nobody came to the inn!!"],
        ["A boy stays, and then...", "The end of all the roads"],
    )
    tokens = []
    for number, found in enumerate(versions):
        file = tmp_path / "texts.csv"
        file.write_text("description\n" + "".join(f'"{text}"\n' for text in found))
        os.utime(file, (1_700_000_000, 1_700_000_000))
        done = train(file, tmp_path / f"out{number}", env=env)
        assert done.returncode == 0, done.stderr
        tokens.append(metrics(tmp_path / f"out{number}")[0]["tokens"])
    sizes = {len("".join(found)) for found in versions}
    assert (
        len(sizes) == 1
        and tokens == [tokens_of(found) for found in versions]
        and tokens[0] != tokens[1]
    )


def test_a_file_that_changes_while_it_is_read(tmp_path):
    """Its texts would be kept under a checksum that is not theirs."""
    file = tmp_path / "d.txt"
    file.write_text("One.\nTwo.\n")
    found = source(file)
    found.identity()
    reading = found.texts("train", Counter())
    assert next(reading).text == "One."
    time = file.stat().st_mtime_ns
    file.write_text("Six.\nTen.\n")
    os.utime(file, ns=(time, time))
    with pytest.raises(UserError, match="was changed while it was read"):
        list(reading)
