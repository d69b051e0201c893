"""What --dataset and its companions name -> texts, one after the other.

A data set is files, folders and repositories of the Hub, in the order given; which files a folder
or repository consists of, and in which splits, `datasets` says. opt/data/files.py reads a file.
"""

import glob
import hashlib
import json
import os
import re
import string
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from opt.data import files
from opt.data.files import File
from opt.errors import UserError, in_a_line

WIKITEXT = "wikitext-2-raw"


def cache_folder() -> Path:
    """Where tokens are kept, and what data sets on the Hub consist of."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "opt-colossalai"


@dataclass(frozen=True)
class Text:
    """A text of a data set, or a part of one, `ends` being False until its last."""

    text: str | None
    prompt: str | None = None  # what stands before it and has no loss; None: nothing of the kind
    ends: bool = True


class Layout:
    """How the fields of a row make a text: one column; a prompt and a response; or a template."""

    def __init__(self, plan: Namespace, controls: Iterable[str] = ()):
        """`controls`: a tokenizer's control tokens, which in a template are meant as such."""
        self.controls = tuple(controls)
        if plan.template:
            parts = parse_template(plan.template, plan.response_column)
            parts = [(_marked(literal, controls), name) for literal, name in parts]
            self._parts, names = parts, [name for _, name in parts if name]
            # The prompt ends where the response begins: at its last occurrence
            response = plan.response_column or names[-1]
            self._response = max(i for i, (_, name) in enumerate(parts) if name == response)
            self.columns = tuple(dict.fromkeys(names))
        elif plan.response_column:
            self._parts, self._response = [("", plan.prompt_column), ("", plan.response_column)], 1
            self.columns = (plan.prompt_column, plan.response_column)
        else:
            self._parts = None
            self.columns = (plan.text_column,) if plan.text_column else ()

    @property
    def is_marked(self) -> bool:
        """Whether there are control tokens in it, as MARKED has them."""
        return self.has_prompt and any("\0" in literal for literal, _ in self._parts)

    @property
    def has_prompt(self) -> bool:
        """Whether a part of each text has no loss."""
        return self._parts is not None

    def text(self, fields: tuple[str | None, ...], ends: bool) -> Text:
        """What a row's fields make. Without a response there is no text."""
        if not self.has_prompt:
            return Text(fields[0], None, ends)
        row = dict(zip(self.columns, fields, strict=True))
        filled = [(literal, row[name] or "" if name else "") for literal, name in self._parts]
        before, response = filled[: self._response], filled[self._response][1]
        if not response.strip():
            return Text(None, "", ends)
        prompt = "".join(map("".join, before)) + filled[self._response][0]
        after = "".join(map("".join, filled[self._response + 1 :]))
        return Text(response + after, prompt, ends)


# A control token between two characters that no text has: files.py leaves them out
MARKED = "\0{}\0"


def _marked(literal: str, controls: Iterable[str]) -> str:
    if not controls:
        return literal
    any_of_them = "|".join(map(re.escape, sorted(controls, key=len, reverse=True)))
    return re.sub(any_of_them, lambda found: MARKED.format(found[0]), literal)


def parse_template(template: str, response: str | None) -> list[tuple[str, str | None]]:
    r"""A --template as (literal, column behind it), None behind the last; \n and \t are a line
    break and a tab. Raises UserError."""
    template = template.replace("\\n", "\n").replace("\\t", "\t")
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"--template cannot be read ({error}): a brace is {{{{ or }}}}") from error
    for _, name, spec, conversion in parsed:
        if name is not None and (not name or spec or conversion):
            raise UserError(
                "--template takes columns in braces and nothing else there, such as {question}"
            )
    names = [name for _, name, _, _ in parsed if name]
    if not names:
        raise UserError("--template names no column: put one in braces, such as {text}")
    if response and response not in names:
        raise UserError(f"--response_column {response} is not in --template, which has {names}")
    return [(literal, name) for literal, name, _, _ in parsed]


@dataclass(frozen=True)
class Part:
    """One of the things that --dataset names, and of it one split."""

    asked_for: str  # with the flag, as the user gave it
    files: list[File]
    commit: str = ""  # of the data set on the Hub, if it is from there
    is_joined: bool = False  # all of its rows are lines of one text


@dataclass(frozen=True)
class Source:
    """Where the texts of a data set are, and how to read them."""

    said: str  # where they come from, in words
    splits: dict[str, list[Part]]  # "train", and "held_out" where it has texts of its own
    form: Layout
    _states: dict[Path, tuple] = field(default_factory=dict)

    def __post_init__(self):
        for parts in self.splits.values():
            for part in parts:
                for file in part.files:
                    try:
                        self._states[file.path] = _state(file.path)
                    except OSError as error:
                        raise UserError(
                            f"{part.asked_for} cannot be read ({error.strerror or error})"
                        ) from error

    def identity(self) -> list:
        """What no other texts have: SHA-256 of each file, or a commit of the Hub and the files'
        names; and how they are read."""
        known = {}
        for split, parts in self.splits.items():
            known[split] = [
                [part.commit, part.is_joined, *(_identity(file, part) for file in part.files)]
                for part in parts
            ]
        return [known, self.form.columns]

    def size(self, split: str) -> int:
        """Bytes of a split's files."""
        return sum(self._states[f.path][1] for part in self.splits[split] for f in part.files)

    def texts(
        self, split: str, notes: Counter, tell: Callable[[int], None] = lambda _: None
    ) -> Iterator[Text]:
        """Every text of a split; `notes` counts, in words, what was guessed or repaired; `tell` is
        told how many bytes of the split's files are read.

        Raises UserError, with the file and the line, for what cannot be read as it was meant.
        """
        done = 0
        for part in self.splits[split]:
            for file in part.files:
                before = done
                for row in self._rows(part, file, notes, lambda read: tell(before + read)):  # noqa: B023
                    yield self.form.text(row.fields, row.ends and not part.is_joined)
                done += self._states[file.path][1]
                tell(done)
            if part.is_joined:
                yield Text("")

    def _rows(self, part: Part, file: File, notes: Counter, tell) -> Iterator[files.Row]:
        name = part.asked_for
        if not name.endswith(str(file.path)):
            name += f": {file.path.name}"
        try:
            yield from files.rows(file, notes, tell)
        except files.Fault as fault:
            where = f", line {fault.line}: " if fault.line else " "
            raise UserError(f"{name}{where}{fault}") from fault
        except OSError as error:
            raise UserError(f"{name} cannot be read ({error.strerror or error})") from error
        if _state(file.path) != self._states[file.path]:
            # What was read may not be what identity() stands for
            raise UserError(f"{name} was changed while it was read: start again")


def find(plan: Namespace, controls: Iterable[str] = ()) -> Source:
    """The texts that the flags name; those on the Hub are downloaded. `controls`: see Layout.
    Raises UserError."""
    form = Layout(plan, controls)
    found = [_find(f"--dataset {name}", name, plan) for name in plan.dataset]
    config = plan.dataset_config_name
    if config and not any(one.config == config for one in found):
        raise UserError(f"--dataset_config_name {config} is of none of the data sets: leave it out")
    said, train, held_out = [], [], []
    for one in found:
        split = _train_split(one, plan.train_split)
        train.append(one.part(split, form, plan))
        own = _validation_split(one, split, plan)
        if own:
            held_out.append(one.part(own, form, plan))
        aside = [other for other in one.splits if other not in (split, own)]
        words = [one.said]
        if len(one.splits) > 1 or split != "train":
            words.append(f"split {split}")
        words += [f"held out: split {own}"] * bool(own)
        words += [f"left aside: {', '.join(aside)}"] * bool(aside)
        said.append(", ".join(words))
    for flag, split in ("train", plan.train_split), ("validation", plan.validation_split):
        if split not in (None, "none") and not any(split in one.splits for one in found):
            raise UserError(f"--{flag}_split {split} is of none of the data sets: leave it out")
    for name in plan.validation_file or ():
        one = _find(f"--validation_file {name}", name, plan)
        own = next((s for s in ("validation", "test") if s in one.splits), _train_split(one, None))
        held_out.append(one.part(own, form, plan))
        said.append(f"held out: {one.said}" + f", split {own}" * (len(one.splits) > 1))
    splits = {"train": train} | ({"held_out": held_out} if held_out else {})
    return Source("; ".join(said), splits, form)


@dataclass(frozen=True)
class _Found:
    """What one name stands for."""

    asked_for: str
    said: str
    splits: dict[str, list[Path]]
    commit: str = ""
    config: str | None = None
    delimiter: str = ""
    column: str = ""  # where it is known whatever the flags say
    is_joined: bool = False

    def part(self, split: str, form: Layout, plan: Namespace) -> Part:
        """One of its splits."""
        strange = next((path for path in self.splits[split] if not files.kind_of(path)), None)
        if strange:
            what = (
                "an archive: unpack it, and name its file or folder"
                if files.is_archive(strange)
                else f"of a form that is not read: save its texts as one of {files.KINDS}, or one "
                "of these and .gz, .bz2, .xz or .zst"
            )
            raise UserError(f"{self.asked_for}: {strange.name} is {what}")
        own = [
            File(
                path,
                (self.column,) if self.column else form.columns,
                form.has_prompt,
                plan.csv_delimiter or self.delimiter,
                plan.encoding or "",
                bool(plan.block_size),
            )
            for path in self.splits[split]
        ]
        return Part(self.asked_for, own, self.commit, self.is_joined)


def _train_split(one: _Found, asked_for: str | None) -> str:
    if asked_for and asked_for not in one.splits:
        if list(one.splits) == ["train"] and not one.commit:  # a local file has no splits
            return "train"
        raise UserError(
            f"{one.asked_for} has no split '{asked_for}': its splits are {', '.join(one.splits)}; "
            "choose with --train_split"
        )
    return asked_for or ("train" if "train" in one.splits else next(iter(one.splits)))


def _validation_split(one: _Found, train: str, plan: Namespace) -> str | None:
    """The split of its own that a data set is evaluated on."""
    asked_for = plan.validation_split
    has_others = plan.validation_file or not plan.eval_fraction  # other texts, or none are wanted
    if asked_for == "none" or (not asked_for and has_others):
        return None
    if asked_for and asked_for not in one.splits:
        if list(one.splits) == ["train"] and not one.commit:
            return None
        raise UserError(
            f"{one.asked_for} has no split '{asked_for}': its splits are {', '.join(one.splits)}; "
            "choose with --validation_split, or none"
        )
    split = asked_for or "validation"
    return split if split in one.splits and split != train else None


def _find(asked_for: str, name: str, plan: Namespace) -> _Found:
    if os.path.isfile(name):
        return _Found(asked_for, f"local file {name}", {"train": [Path(name)]})
    if os.path.isdir(name):
        return _folder(asked_for, Path(name), plan.dataset_config_name)
    if name == WIKITEXT:
        found = _on_the_hub(asked_for, "Salesforce/wikitext", "wikitext-2-raw-v1")
        return replace(found, column="text", is_joined=True)
    if glob.has_magic(name):
        paths = [Path(path) for path in sorted(glob.glob(name, recursive=True))]
        paths = [path for path in paths if path.is_file()]
        if not paths:
            raise UserError(f"{asked_for}: no file has such a name")
        return _Found(asked_for, f"{len(paths)} local files {name}", {"train": paths})
    looks_local = name.startswith((".", "/", "~")) or files.kind_of(name) or name.count("/") != 1
    if looks_local:
        raise UserError(
            f"{asked_for}: no such file; give a file that ends in {files.KINDS}, a folder, a Hub "
            f"id, or {WIKITEXT}"
        )
    return _on_the_hub(asked_for, name, plan.dataset_config_name, others=len(plan.dataset) > 1)


def _builder(asked_for: str, name: str, config: str | None, others: bool = False):
    """What `datasets` makes of a README and the names of files: configurations, splits, formats."""
    import datasets

    # What it logs of a fault, it raises too
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        return datasets.load_dataset_builder(name, config)
    # Of whatever is wrong with a data set, its readers have exceptions of their own
    except Exception as error:
        try:
            configs = datasets.get_dataset_config_names(name)
        except Exception:  # it is the first that says what is wrong
            configs = []
        if len(configs) == 1 and config and others:
            return _builder(asked_for, name, None)
        if len(configs) > 1 and config not in configs:
            wrong = f"has no configuration '{config}'" if config else "has several configurations"
            raise UserError(
                f"{asked_for} {wrong}: choose one of {', '.join(configs):.300} with "
                "--dataset_config_name"
            ) from error
        raise UserError(f"{asked_for} cannot be read ({in_a_line(error)})") from error


def _folder(asked_for: str, folder: Path, config: str | None) -> _Found:
    """A folder as a repository on the Hub would be read: splits by the files' names, or README,
    which may have several configurations; or what `datasets` has saved."""
    if saved := _saved(asked_for, folder):
        return _Found(asked_for, f"folder {folder}, saved by datasets", saved)
    inside = sorted(folder.rglob("*"))
    there = [path for path in inside if path.is_file() and files.kind_of(path)]
    there = [p for p in there if not any(x.startswith(".") for x in p.relative_to(folder).parts)]
    linked = sum(path.is_symlink() and path.is_dir() for path in inside)
    links = f" ({linked} link{'s' * (linked != 1)} to folders not followed)" * bool(linked)
    if not there:
        raise UserError(f"{asked_for} is a folder without a file that ends in {files.KINDS}{links}")
    if glob.has_magic(str(folder.resolve())):  # `datasets` takes it for a pattern
        raise UserError(
            f"{asked_for}: no folder with *, ? or [ in its name or above it can be read: rename "
            "it, or name its files"
        )
    builder = _builder(asked_for, str(folder.resolve()), config, others=True)
    splits = {
        str(split): [Path(path) for path in paths]
        for split, paths in (builder.config.data_files or {}).items()
    }
    read = {path.resolve() for paths in splits.values() for path in paths}
    aside = [str(p.relative_to(folder)) for p in there if p.resolve() not in read]
    number = sum(map(len, splits.values()))
    said = f"folder {folder}, {number} file{'s' * (number != 1)}"
    if aside:
        first = os.fsencode(aside[0]).decode(errors="backslashreplace")
        said += f" ({len(aside)} of another form or split left aside, {first} the first)"
    said += links
    config = config if config == builder.config.name else None
    said += f", {config}" * bool(config)
    return _Found(asked_for, said, splits, config=config, delimiter=_separator(builder))


def _saved(asked_for: str, folder: Path) -> dict[str, list[Path]]:
    """The splits that `datasets`' save_to_disk has written there, none if it has not: by its own
    list, for its caches may lie beside them."""
    try:
        states = {"train": folder / "state.json"}
        if (of_several := folder / "dataset_dict.json").is_file():
            splits = json.loads(of_several.read_text())["splits"]
            states = {split: folder / split / "state.json" for split in splits}
        elif not (folder / "dataset_info.json").is_file() or not states["train"].is_file():
            return {}
        return {
            split: [
                state.parent / file["filename"]
                for file in json.loads(state.read_text())["_data_files"]
            ]
            for split, state in states.items()
        }
    except PermissionError as error:
        raise UserError(f"{asked_for} cannot be read ({error.strerror})") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{asked_for} is not all of what datasets' save_to_disk writes "
            f"({type(error).__name__}: {error}): save it again"
        ) from error


def _separator(builder) -> str:
    """The delimiter that a data set's README gives its csv files; "" for the usual one."""
    return (getattr(builder.config, "sep", None) or "").replace(",", "")


def _on_the_hub(
    asked_for: str, repository: str, config: str | None, others: bool = False
) -> _Found:
    """`others`: the configuration may be that of another data set; this one has it or has none."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.utils import HfHubHTTPError, RepositoryNotFoundError

    name = hashlib.sha256(f"{repository}/{config}".encode()).hexdigest()[:32]
    note = cache_folder() / f"hub-{name}.json"
    origin = "Hub"
    try:
        HfApi().dataset_info(repository, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{asked_for}: neither a file here nor a data set on the Hub, or a private one"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        found = _noted(note)
        if not found:
            reason = str(error).split("\n")[0]
            raise UserError(
                f"{asked_for}: not a file here and not to be had from the Hub ({reason}); give a "
                "local file"
            ) from error
        origin = "cached from the Hub, which does not answer"
    else:
        remote = _builder(asked_for, repository, config, others)
        found = {
            "config": config if config == remote.config.name else None,
            "commit": remote.hash,
            # hf://datasets/OWNER/NAME@COMMIT/PATH
            "splits": {
                str(split): ["/".join(url.split("/")[5:]) for url in urls]
                for split, urls in remote.config.data_files.items()
            },
            "delimiter": _separator(remote),
        }
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            new = note.with_suffix(f".{os.getpid()}")  # other runs may read it, or write it too
            new.write_text(json.dumps(found))
            new.replace(note)
        except OSError as error:
            raise UserError(
                f"{asked_for}: its files' names cannot be kept ({error}): choose another folder "
                "with XDG_CACHE_HOME"
            ) from error

    def download(paths: list[str]) -> Path:
        how = {"revision": found["commit"], "allow_patterns": paths}
        try:
            folder = snapshot_download(
                repository, repo_type="dataset", local_files_only=origin != "Hub", **how
            )
            if missing := next((p for p in paths if not (Path(folder) / p).is_file()), None):
                raise OSError(f"{missing} is missing")
        except (HfHubHTTPError, OSError, ValueError) as error:
            reason = str(error).split("\n")[0]
            raise UserError(
                f"{asked_for}: its download from the Hub broke off ({reason}): start again"
            ) from error
        return Path(folder)

    config = found["config"]
    said = f"{origin}, {repository}" + f", {config}" * bool(config)
    splits = _Downloads(found["splits"], download)
    return _Found(asked_for, said, splits, found["commit"], config, found["delimiter"])


def _noted(note: Path) -> dict | None:
    """What was kept of a data set when the Hub last answered; None if nothing was, or not whole."""
    try:
        return json.loads(note.read_text())
    except (OSError, ValueError):
        return None


class _Downloads(dict):
    """The files of each split, downloaded when they are asked for."""

    def __init__(self, splits: dict[str, list[str]], download: Callable[[list[str]], Path]):
        super().__init__(splits)
        self._download, self._here = download, {}

    def __getitem__(self, split: str) -> list[Path]:
        if split not in self._here:
            paths = super().__getitem__(split)
            known = all(files.kind_of(path) for path in paths)
            folder = self._download(paths) if known else Path()
            self._here[split] = [folder / path for path in paths]
        return self._here[split]


def _identity(file: File, part: Part) -> list:
    how = [file.delimiter, file.encoding, file.is_one_text, file.columns]
    if part.commit:
        return [file.path.name, *how]
    try:
        with open(file.path, "rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"{part.asked_for} cannot be read ({error.strerror}: {file.path})"
        ) from error
    return [digest, files.ending(file.path), file.path.suffix.lower(), *how]


def _state(file: Path) -> tuple:
    """What changes with a file; its time alone can be set to what it was (tar, rsync and cp -p do),
    its change's time cannot."""
    there = file.stat()
    return there.st_ino, there.st_size, there.st_mtime_ns, there.st_ctime_ns
