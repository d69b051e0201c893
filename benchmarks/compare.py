"""Measure plugins and peers side by side, a process each; write one table and one plot.

    python benchmarks/compare.py                    everything: hours on one GPU
    python benchmarks/compare.py --models 350m --batch_sizes 16 64 --minutes 9
    python benchmarks/compare.py --reference deepspeed_offload \
        --engines "gemini --compile --fused_loss --offload_optim_frac 1" deepspeed_offload
    python benchmarks/compare.py --minutes 0        only the table and the plot of what is there

Arguments that are not its own go to every process: --max_train_steps 10 --warmup_steps 5 --dropout
0. Killed and started again, it goes on where it stopped. benchmarks/README.md says what the engines
are.
"""

import argparse
import contextlib
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks import report  # noqa: E402
from benchmarks.peers import ENGINES  # noqa: E402
from opt.registry import PLUGINS  # noqa: E402

# Each in its best form on a GPU.
DEFAULT_ENGINES = [
    *(f"{plugin} --compile --fused_loss" for plugin in PLUGINS),
    "torch_amp --fused_loss",
    "fsdp2 --fused_loss",
    "hf_trainer",
    "deepspeed_zero2",
    "deepspeed_zero3",
    "gemini --compile --fused_loss --offload_optim_frac 1",
    "deepspeed_offload",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--models",
        nargs="+",
        default=["125m", "350m", "1.3b"],
        help="sizes or directories; default 125m 350m 1.3b",
    )
    parser.add_argument(
        "--batch_sizes",
        nargs="+",
        type=int,
        default=[8, 16, 32, 64],
        help="rows per process; default 8 16 32 64",
    )
    parser.add_argument(
        "--engines",
        nargs="+",
        default=DEFAULT_ENGINES,
        help="plugins and peers, each with flags of its own if in quotes; default "
        f"{', '.join(DEFAULT_ENGINES)}",
    )
    parser.add_argument(
        "--reference",
        default="deepspeed_zero2",
        help="the engine that the ratios are to; default deepspeed_zero2",
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed blocks in each process; default 3"
    )
    parser.add_argument("--nproc", type=int, default=1, help="processes, one a GPU; default 1")
    parser.add_argument(
        "--timeout",
        type=float,
        default=600,
        help="seconds that a combination may take; default 600",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=float("inf"),
        help="start nothing new after so many minutes; default no limit",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE / "results",
        help="folder of the results; default benchmarks/results",
    )
    args, flags = parser.parse_known_args()
    unknown = [engine for engine in args.engines if engine.split()[0] not in (*PLUGINS, *ENGINES)]
    if unknown:
        parser.error(f"--engines {unknown[0]}: not one of {', '.join((*PLUGINS, *ENGINES))}")

    args.out.mkdir(parents=True, exist_ok=True)
    # So that the process under way ends as well
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    measure_all(args, ["--repeats", str(args.repeats), *flags])
    results = report.load(args.out)
    place = {model: i for i, model in enumerate(args.models)}
    results.sort(key=lambda r: -r.get("tokens_per_second", 0))
    results.sort(
        key=lambda r: (
            place.get(r["model"], len(place)),
            r["model"],
            r["world_size"],
            r["batch_size"],
        )
    )
    print(report.write_tables(results, args.out, "comparison", columns(results, args.reference)))
    draw(results, args.reference, args.out / "comparison.png")
    print(f"{args.out}: comparison.csv, comparison.md, comparison.png")


def measure_all(args, flags: list[str]) -> None:
    """Every combination that has no result yet. What is to be compared is measured one after the
    other."""
    combinations = [
        (model, size, engine)
        for model in args.models
        for size in args.batch_sizes
        for engine in args.engines
    ]
    files = {
        combination: args.out / f"{file_name(*combination, args.nproc, flags)}.json"
        for combination in combinations
    }
    missing = [combination for combination, file in files.items() if not is_measured(file)]
    print(
        f"compare: {len(combinations)} combinations, {len(combinations) - len(missing)} of them "
        f"measured before, results in {args.out}/"
    )
    begun = time.monotonic()
    for i, (model, size, engine) in enumerate(missing):
        elapsed = (time.monotonic() - begun) / 60
        if elapsed >= args.minutes:
            print(f"compare: {len(missing) - i} combinations left for another time")
            break
        left = f", about {elapsed * (len(missing) - i) / i + 1:.0f} min left" if i else ""
        print(f"[{i + 1}/{len(missing)}{left}] {model}, {engine}, batch {size}", flush=True)
        file = files[model, size, engine]
        measure(file, model, size, engine, flags, args.nproc, args.timeout)
        result = json.loads(file.read_text())
        if "status" in result:
            print(f"  {result['status']}", flush=True)
        else:
            rate, peak = result["tokens_per_second"], report.peak_bytes(result) / report.GIB
            print(
                f"  {rate:,.0f} tokens/s (spread {spread(result)}), peak {peak:.2f} GiB, loss "
                f"{result['loss']:.4f}",
                flush=True,
            )


def file_name(model: str, batch_size: int, engine: str, nproc: int, flags: list[str]) -> str:
    """A name that holds everything that the result depends on: other arguments are another
    measurement."""
    return re.sub(
        r"[^A-Za-z0-9._-]", "_", "-".join([model, engine, f"bs{batch_size}", f"n{nproc}", *flags])
    )


def is_measured(file: Path) -> bool:
    """Whether there is a result; what was not installed may be so now."""
    return file.is_file() and json.loads(file.read_text()).get("status") != "not installed"


def measure(
    file: Path,
    model: str,
    batch_size: int,
    engine: str,
    flags: list[str],
    nproc: int,
    timeout: float,
) -> None:
    """Run one engine in a process of its own; write its result, or what became of it, to `file`."""
    name, *own = shlex.split(engine)
    script = (
        [HERE / "peers.py", "--engine", name]
        if name in ENGINES
        else [HERE.parent / "opt_benchmark.py", "--plugin", name]
    )
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc)]
        if nproc > 1
        else []
    )
    part, log = file.with_suffix(".part"), file.with_suffix(".log")
    work = ["--model_name_or_path", model, "--batch_size", str(batch_size), *own, *flags]
    with open(log, "w") as output:
        process = subprocess.Popen(
            [sys.executable, *launcher, *map(str, script), *work, "--json", str(part)],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            status = 124
        finally:
            end(process)
    if status == 0:
        file.write_text(
            json.dumps(json.loads(part.read_text()) | {"engine": engine}, indent=1) + "\n"
        )
    else:
        report.write_failed(file, log, status, model, engine, batch_size, nproc)
    part.unlink(missing_ok=True)


def end(process: subprocess.Popen) -> None:
    """End a process and all that it started, wherever torchrun and the compiler's workers have put
    themselves."""
    if process.poll() is not None:
        return
    own = psutil.Process(process.pid)
    for member in [own, *own.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def spread(result: dict) -> str:
    """How far the repeats lie apart: the slowest block's time less the fastest's, in percent of the
    median."""
    blocks = result["repeats"]
    return f"{(max(blocks) - min(blocks)) / result['step_seconds']['median']:.1%}"


def engine_of(result: dict) -> str:
    """The engine with its flags, as --engines had it."""
    return result.get("engine", result["plugin"])


def references(results: list[dict], reference: str) -> dict:
    """Tokens per second of the reference, by what has to be equal for a ratio."""
    return {
        _work(r): r["tokens_per_second"]
        for r in results
        if engine_of(r) == reference and report.status(r) == "ok"
    }


def _work(result: dict) -> tuple:
    return tuple(result[key] for key in ("model", "batch_size", "world_size", "seq_length"))


def columns(results: list[dict], reference: str) -> dict:
    """The table's columns, as report.py has them: heading, how to read it off a result."""
    base = references(results, reference)
    same = {
        heading: report.COLUMNS[heading]
        for heading in ("ms/step", "TFLOP/s/gpu", "MFU", "peak GiB", "loss")
    }
    return {
        "model": report.COLUMNS["model"],
        "gpus": report.COLUMNS["gpus"],
        "batch": report.COLUMNS["batch"],
        "engine": engine_of,
        "precision": report.COLUMNS["precision"],
        "status": report.COLUMNS["status"],
        "tokens/s": report.COLUMNS["tokens/s"],
        f"x {reference}": lambda r: (
            f"{r['tokens_per_second'] / base[_work(r)]:.2f}" if _work(r) in base else ""
        ),
        "spread": spread,
        **same,
        "first step s": lambda r: f"{r['seconds_to_first_step']:.0f}",
    }


def draw(results: list[dict], reference: str, picture: Path) -> None:
    """Throughput as bars, a panel for each model and batch size; a line on each from its slowest to
    its fastest repeat."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys((r["model"], r["world_size"]) for r in results))
    sizes = sorted({r["batch_size"] for r in results})
    engines = sorted({engine_of(r) for r in results}, key=lambda engine: (_is_peer(engine), engine))
    if not results:
        return
    inches = 2 + 3 * len(sizes), len(models) * (1.2 + 0.22 * len(engines))
    figure, axes = pyplot.subplots(
        len(models), len(sizes), figsize=inches, squeeze=False, sharey=True, layout="constrained"
    )
    for (model, world_size), line in zip(models, axes, strict=True):
        for size, panel in zip(sizes, line, strict=True):
            panel.set_title(
                f"{model}, batch {size}" + f", {world_size} GPUs" * (world_size > 1), fontsize=9
            )
            for r in results:
                if (r["model"], r["world_size"], r["batch_size"]) != (model, world_size, size):
                    continue
                y, status = engines.index(engine_of(r)), report.status(r)
                if status != "ok":
                    panel.text(0, y, f" {status[:40]}", va="center", fontsize=6, color="gray")
                    continue
                rate = r["tokens_per_second"]
                color = "black" if engine_of(r) == reference else f"C{_is_peer(engine_of(r)):d}"
                panel.barh(y, rate / 1000, color=color, alpha=0.8)
                ends = [rate / 1000 * r["step_seconds"]["median"] / block for block in r["repeats"]]
                panel.plot([min(ends), max(ends)], [y, y], color="red", linewidth=1.5)
                panel.text(max(ends), y, f" {rate / 1000:,.1f}", va="center", fontsize=6)
            panel.set_visible(
                any(
                    (r["model"], r["world_size"], r["batch_size"]) == (model, world_size, size)
                    for r in results
                )
            )
            panel.margins(x=0.15)  # room for the figures
            panel.set_xlim(left=0)
            panel.set_yticks(range(len(engines)), engines, fontsize=7)
            panel.tick_params(axis="x", labelsize=7)
            panel.grid(axis="x", alpha=0.3)
        line[0].set_ylim(len(engines) - 0.5, -0.5)
    for panel in axes[-1]:
        panel.set_xlabel("thousand tokens/s", fontsize=8)
    figure.suptitle(
        f"ColossalAI's plugins (blue), peers (orange)\n{reference} (black); red: the repeats",
        fontsize=9,
    )
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def _is_peer(engine: str) -> bool:
    return engine.split()[0] in ENGINES


if __name__ == "__main__":
    main()
