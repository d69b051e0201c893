"""What texts a file has: read as they were meant, or refused by a line that names the file and the
line in it. Never another column's."""

import csv
import io
import itertools
import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from args import train_parser
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
    "list.json": ('[{"description": "One, two."},\n {"description": "Three."}\n]\n', TWO, {}),
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
    "a list of strings.json": ('["x",\n "y"]', ["line 1", "str", "not a JSON object"]),
    "cut.jsonl": ('{"description": "x"}\n{"descri', ["line 2", "no JSON"]),
    "cut.json": ('[{"description": "x"},\n{"descri', ["line 2", "no JSON"]),
    "a comma missing.json": ('[{"description": "x"}\n{"description": "y"}]', ["line 2", "comma"]),
    "not closed.json": ('[{"description": "x"}\n', ["not closed"]),
    "over several lines.json": ('{\n"description": "x"\n}\n', ["line 1", "one a line"]),
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
