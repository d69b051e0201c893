"""The benchmark's results as a table, results.csv, results.md and two plots.

    python -m benchmarks.report table benchmark_results
        run_benchmark.sh calls it at the end
    python -m benchmarks.report failed FILE --log LOG ...
        writes the row of a combination that did not run
    python -m benchmarks.report picture benchmarks/results/comparison.csv 1.3b 16 docs/speed.png
        the README's picture: a comparison's rows of one model and batch size

benchmarks/compare.py makes its table with the same functions.
"""

import argparse
import csv
import json
import math
import re
from pathlib import Path

from opt.registry import PLUGINS

GIB = 2**30
# heading, how to read it off a result
COLUMNS = {
    "model": lambda r: r["model"],
    "plugin": lambda r: r["plugin"],
    "precision": lambda r: r.get("precision", ""),
    "gpus": lambda r: r["world_size"],
    "batch": lambda r: r["batch_size"],
    "status": lambda r: status(r),
    "ms/step": lambda r: f"{r['step_seconds']['median'] * 1000:.1f}",
    "tokens/s": lambda r: f"{r['tokens_per_second']:.0f}",
    "tokens/s/gpu": lambda r: f"{r['tokens_per_second_per_gpu']:.0f}",
    "TFLOP/s/gpu": lambda r: f"{r['tflops_per_gpu']:.2f}",
    "MFU": lambda r: f"{r['mfu']:.3f}",
    "peak GiB": lambda r: f"{peak_bytes(r) / GIB:.2f}",
    "loss": lambda r: f"{r['loss']:.4f}",
}


def status(result: dict) -> str:
    """What became of a combination: "ok" if it was measured and has trained."""
    return result.get("status") or (
        "ok" if math.isfinite(result["loss"]) else f"loss is {result['loss']}"
    )


def peak_bytes(result: dict) -> int:
    """Peak memory: on the device, or in host memory where there is no other."""
    return result["peak_memory_allocated_bytes"] or result["peak_host_memory_bytes"]


def load(directory: Path) -> list[dict]:
    """The results in a folder, in the order of model, number of GPUs, plugin and batch size."""
    results = [json.loads(file.read_text()) for file in directory.glob("*.json")]
    return sorted(
        results, key=lambda r: (r["model"], r["world_size"], r["plugin"], r["batch_size"])
    )


def rows(results: list[dict], columns: dict) -> list[list[str]]:
    """A row of text for each result; a failed one has its status and nothing measured."""
    return [
        [
            "" if "status" in r and heading not in _KNOWN else str(read(r))
            for heading, read in columns.items()
        ]
        for r in results
    ]


_KNOWN = ("model", "plugin", "engine", "precision", "gpus", "batch", "status")


def lines(file: Path) -> list[dict]:
    """A campaign's results, of each measurement the last; none of a file that is not there. A last
    line that a killed campaign has left unfinished is not one."""
    found = {}
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            result = json.loads(line)
        except ValueError:
            continue
        found[result["commit"], result["command"]] = result
    return list(found.values())


def spread(result: dict) -> str:
    """How far the repeats lie apart: the slowest block's time less the fastest's, in percent of the
    median."""
    blocks = result["repeats"]
    return f"{(max(blocks) - min(blocks)) / result['step_seconds']['median']:.1%}"


def in_a_line(result: dict) -> str:
    """What came out, for the terminal."""
    if status(result) != "ok":
        return status(result)
    if "tokens_per_second" not in result:
        return f"{result['step_seconds']['median'] * 1000:.1f} ms a step, loss {result['loss']:.4f}"
    return (
        f"{result['tokens_per_second']:,.0f} tokens/s (spread {spread(result)}), peak "
        f"{peak_bytes(result) / GIB:.2f} GiB, loss {result['loss']:.4f}"
    )


def reason(log: Path, status: int) -> str:
    """Why a measurement ended with this exit status, by what it printed."""
    lines = (
        [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        if log.is_file()
        else []
    )
    if status == 124:
        return "took too long"
    if status == 137:
        return "killed, most likely for host memory"
    if any("out of memory" in line.lower() for line in lines):
        return "out of memory"
    # Errors of ours are one line; otherwise the first line that names an exception, without torch's
    # "[rank0]: ".
    errors = [
        re.sub(r"^\[rank\d+\]: *", "", line)
        for line in lines
        if ": error: " in line or "Error: " in line
    ]
    said = errors[0].split("error: ")[-1] if errors else f"exit status {status}"
    return f"failed: {said}"[:130]


def write_failed(
    file: Path, log: Path, status: int, model: str, plugin: str, batch_size: int, world_size: int
) -> None:
    """Record a combination that did not run, with the reason that its log gives."""
    result = {
        "model": model,
        "plugin": plugin,
        "batch_size": batch_size,
        "world_size": world_size,
        "status": reason(log, status),
    }
    file.write_text(json.dumps(result, indent=1) + "\n")


def write_tables(
    results: list[dict], directory: Path, name: str = "results", columns: dict = COLUMNS
) -> str:
    """`name`.csv and `name`.md; returns the table for the terminal."""
    table = [list(columns), *rows(results, columns)]
    with open(directory / f"{name}.csv", "w", newline="") as f:
        csv.writer(f).writerows(table)
    lines = [table[0], ["---"] * len(columns), *table[1:]]
    (directory / f"{name}.md").write_text(
        conditions(results) + "".join(f"| {' | '.join(line)} |\n" for line in lines)
    )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in table
    )


def conditions(results: list[dict]) -> str:
    """What the results were measured on and with, a line; empty if nothing was measured."""
    measured = [r for r in results if "status" not in r]
    if not measured:
        return ""
    devices = " and ".join(sorted({r["device"] for r in measured}))
    versions = {name: version for r in measured for name, version in r["versions"].items()}
    commits = ", ".join(sorted({r["commit"] for r in measured}))
    return f"{devices}; {', '.join(f'{k} {v}' for k, v in versions.items())}; commit {commits}\n\n"


def draw(results: list[dict], directory: Path) -> None:
    """throughput.png and memory.png: by batch size, a line for each plugin, a panel for each model
    and number of GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = [r for r in results if status(r) == "ok"]
    if not good:
        return
    panels = sorted({(r["model"], r["world_size"]) for r in good})
    plugins = sorted({r["plugin"] for r in good})
    quantities = {
        "throughput": ("tokens/s", lambda r: r["tokens_per_second"]),
        "memory": ("peak memory (GiB)", lambda r: peak_bytes(r) / GIB),
    }
    for name, (label, read) in quantities.items():
        figure, axes = pyplot.subplots(
            1, len(panels), figsize=(max(6, 4.5 * len(panels)), 4.2), squeeze=False
        )
        for panel, (model, world_size) in zip(axes[0], panels, strict=True):
            here = [r for r in good if (r["model"], r["world_size"]) == (model, world_size)]
            for i, plugin in enumerate(plugins):
                line = sorted((r["batch_size"], read(r)) for r in here if r["plugin"] == plugin)
                if line:
                    panel.plot(
                        *zip(*line, strict=True),
                        marker="os^Dvx*P"[i % 8],
                        label=plugin,
                        color=f"C{i}",
                    )
            if name == "memory":
                limit = here[0]["memory_limit_bytes"] / GIB
                panel.axhline(
                    limit,
                    color="black",
                    linestyle="--",
                    linewidth=1,
                    label=f"the device's {limit:.0f} GiB",
                )
            sizes = sorted({r["batch_size"] for r in here})
            panel.set_xscale("log", base=2)
            panel.set_xticks(sizes, [str(s) for s in sizes])
            panel.minorticks_off()
            panel.set_ylim(bottom=0)
            panel.set_title(f"{model}, {world_size} process{'es' * (world_size > 1)}")
            panel.set(xlabel="batch size (rows per data-parallel rank)", ylabel=label)
            panel.grid(alpha=0.3)
        axes[0][0].legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(directory / f"{name}.png", dpi=110)
        pyplot.close(figure)


def draw_rows(comparison: Path, model: str, batch_size: int, picture: Path) -> None:
    """A bar for each row of a comparison.csv of one model, batch size and GPU: tokens/s, with the
    peak memory beside it."""
    from matplotlib import pyplot

    with open(comparison, newline="") as file:
        rows = [
            r
            for r in csv.DictReader(file)
            if (r["model"], r["batch"], r["gpus"], r["status"])
            == (model, str(batch_size), "1", "ok")
            and "offload" not in r["engine"]
        ]
    rows.sort(key=lambda r: int(r["tokens/s"]))
    ours = [r["engine"].split()[0] in PLUGINS for r in rows]
    figure, panel = pyplot.subplots(figsize=(8, 0.4 * len(rows) + 1))
    bars = panel.barh(
        [" ".join(re.sub("--(compile|fused_loss)?", "", r["engine"]).split()) for r in rows],
        [int(r["tokens/s"]) / 1000 for r in rows],
        color=["tab:blue" if is_ours else "silver" for is_ours in ours],
    )
    labels = [f"{int(r['tokens/s']) / 1000:.1f}k, {float(r['peak GiB']):.1f} GiB" for r in rows]
    panel.bar_label(bars, labels, padding=3)
    panel.set(xlabel="thousand tokens/s, and peak memory", xlim=(0, 1.25 * bars[-1].get_width()))
    panel.set_title(f"OPT-{model}, {batch_size} rows of 1,024 tokens, one H100: plugins in blue")
    panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(picture, dpi=90)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("table", help="write the tables and plots of a folder of results")
    table.add_argument("directory", type=Path)
    failed = commands.add_parser("failed", help="write the row of a combination that did not run")
    failed.add_argument("file", type=Path)
    failed.add_argument("--log", type=Path, required=True)
    for flag, kind in (
        ("status", int),
        ("model", str),
        ("plugin", str),
        ("batch_size", int),
        ("world_size", int),
    ):
        failed.add_argument(f"--{flag}", type=kind, required=True)
    picture = commands.add_parser("picture", help="draw rows of a comparison.csv")
    picture.add_argument("comparison", type=Path)
    picture.add_argument("model")
    picture.add_argument("batch_size", type=int)
    picture.add_argument("picture", type=Path)
    args = parser.parse_args()
    if args.command == "picture":
        draw_rows(args.comparison, args.model, args.batch_size, args.picture)
        return
    if args.command == "failed":
        write_failed(
            args.file,
            args.log,
            args.status,
            args.model,
            args.plugin,
            args.batch_size,
            args.world_size,
        )
        return
    results = load(args.directory)
    print(write_tables(results, args.directory))
    draw(results, args.directory)
    print(f"{args.directory}: results.csv, results.md, throughput.png, memory.png")


if __name__ == "__main__":
    main()
