"""Memory and rate from files to rows on disk; beside it tokenizers' encode_batch and datasets' map.

    python -m benchmarks.corpus --megabytes 1000 --formats jsonl,csv,txt,parquet --out FILE.jsonl

Makes a corpus of that size from the sample's descriptions, in every format and once in 16 files;
runs opt_train_demo.py on each from the launch to the first step, without and with the tokens in the
cache; adds up the anonymous memory of all its processes (RssAnon) twenty times a second.
"""

import argparse
import csv
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

REPO = Path(__file__).resolve().parent.parent
MODEL = REPO / "sample" / "opt-tiny"


def descriptions() -> list[str]:
    """The texts of the sample."""
    with open(REPO / "sample" / "netflix_sample.csv", newline="") as file:
        return [row["description"] for row in csv.DictReader(file)]


def corpus(megabytes: int):
    """Texts of 100 to 1500 characters, no two alike."""
    words = " ".join(descriptions()).split()
    rng, size = random.Random(1), 0
    while size < megabytes * 10**6:
        first = rng.randrange(len(words) - 260)
        text = " ".join(words[first : first + rng.randrange(20, 250)]) + f" {rng.random()}."
        size += len(text) + 1
        yield text


def write(folder: Path, form: str, megabytes: int, parts: int) -> list[Path]:
    """The corpus in a format, in so many files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"part-{i:02}.{form}" for i in range(parts)]
    texts, size = corpus(megabytes), megabytes * 10**6 / parts
    for file in files:
        own, taken = [], 0
        if form == "parquet":
            import pyarrow
            from pyarrow import parquet

            schema = pyarrow.schema([("id", pyarrow.int64()), ("text", pyarrow.string())])
            with parquet.ParquetWriter(file, schema) as out:
                for text in texts:
                    own.append({"id": taken, "text": text})
                    taken += len(text)
                    if len(own) == 10**5:
                        out.write_table(pyarrow.Table.from_pylist(own, schema))
                        own = []
                    if taken >= size:
                        break
                out.write_table(pyarrow.Table.from_pylist(own, schema))
            continue
        with open(file, "w", newline="") as out:
            writer = csv.writer(out)
            if form == "csv":
                writer.writerow(["id", "text"])
            for text in texts:
                if form == "csv":
                    writer.writerow([taken, text])
                else:
                    out.write((json.dumps({"text": text}) if form == "jsonl" else text) + "\n")
                taken += len(text)
                if taken >= size:
                    break
    return files


def anonymous_bytes(process: psutil.Process) -> int:
    """RssAnon of a process and all that it has started."""
    total = 0
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.Error:
        return 0
    for one in family:
        try:
            status = Path(f"/proc/{one.pid}/status").read_text()
        except OSError:  # gone by now
            continue
        for line in status.splitlines():
            if line.startswith("RssAnon"):
                total += int(line.split()[1]) * 1024
    return total


def first_step(files: list[Path], cache: Path) -> dict:
    """One step on these files: seconds from the launch, and the peak of anonymous memory."""
    command = [sys.executable, "opt_train_demo.py", "--model_name_or_path", str(MODEL)]
    command += ["--dataset", *map(str, files), "--max_length", "128", "--batch_size", "8"]
    command += ["--max_train_steps", "1", "--max_eval_samples", "8", "--no_save"]
    command += ["--output_path", str(cache / "out")]
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(
        command,
        cwd=REPO,
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = []
    reader = threading.Thread(target=lambda: said.extend(process.stdout))
    reader.start()
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(psutil.Process(process.pid)))
        time.sleep(0.05)
    reader.join()
    if process.returncode:
        raise SystemExit("".join(said)[-2000:])
    launched = [line for line in said if "first step done" in line][0]
    return {
        "seconds": time.perf_counter() - start,
        "first_step_seconds": float(launched.split("first step done ")[1].split()[0]),
        "anonymous_bytes": peak,
    }


def rates(file: Path) -> dict:
    """Bytes a second of text: ours, encode_batch's, datasets' map's, in turn, three times each."""
    import datasets
    import numpy as np

    from args import train_parser
    from opt.data import tokens

    with open(file) as lines:
        texts = [json.loads(line)["text"] for line in lines]
    size = sum(map(len, texts))
    tokenizer = tokens.load_tokenizer(MODEL)
    found = {"ours": [], "encode_batch": [], "datasets.map": []}

    def ours(folder):
        os.environ["XDG_CACHE_HOME"] = folder
        flags = ["--dataset", str(file), "--max_length", "128", "--eval_fraction", "0"]
        tokens.tokenize(train_parser().parse_args(flags), tokenizer)

    def encode_batch(_):
        for first in range(0, len(texts), 1000):
            batch = texts[first : first + 1000]
            for one in tokenizer.backend_tokenizer.encode_batch(batch, add_special_tokens=False):
                np.array(one.ids, np.int32)

    def mapped(folder):
        rows = datasets.Dataset.from_json(str(file), cache_dir=folder)
        rows.map(
            lambda batch: {"ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]},
            batched=True,
            remove_columns=rows.column_names,
        )

    datasets.disable_progress_bars()
    for _ in range(3):
        for name, work in zip(found, (ours, encode_batch, mapped), strict=True):
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                work(folder)
                found[name].append(size / (time.perf_counter() - start))
    return {name: sorted(values)[1] for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--formats", default="jsonl,csv,txt,parquet")
    parser.add_argument("--folder", type=Path, help="for the corpus; default a temporary one")
    parser.add_argument("--out", type=Path, required=True, help="a line a measurement")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp())
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=REPO, capture_output=True, text=True
    ).stdout.strip()
    about = {"commit": commit, "cores": len(os.sched_getaffinity(0)), "command": " ".join(sys.argv)}

    def record(**values):
        line = json.dumps(about | {"date": time.strftime("%Y-%m-%d")} | values)
        with open(args.out, "a") as out:
            out.write(line + "\n")
        print(line, flush=True)

    if args.megabytes >= 20:
        record(what="rates, bytes a second", **rates(write(folder / "r", "jsonl", 20, 1)[0]))
    runs = {"sample": [REPO / "sample" / "netflix_sample.csv"]}
    runs |= {form: (form, 1) for form in args.formats.split(",")}
    runs["16 files"] = (args.formats.split(",")[0], 16)
    for name, files in runs.items():
        made = isinstance(files, tuple)
        if made:
            files = write(folder / name.replace(" ", "-"), files[0], args.megabytes, files[1])
        size = sum(file.stat().st_size for file in files)
        cache = folder / "cache"
        for what in ("first start", "again"):
            record(what=f"{name}, {what}", bytes=size, **first_step(files, cache))
        shutil.rmtree(cache)
        if made:
            shutil.rmtree(files[0].parent)
    if not args.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
