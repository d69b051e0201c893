"""The benchmark's results as tables and plots.

python -m benchmarks.report campaign 2026-11-27
    a campaign's, by the beginning of its files' names in benchmarks/results: 2026-11-27.md and
    .png beside them, all rows, each with its floor by arithmetic; and the rows that carry the
    claim, as a table for the README and as docs/speed.png
python -m benchmarks.report table benchmark_results
    results.csv, results.md and two plots: run_benchmark.sh calls it at the end
python -m benchmarks.report failed FILE --log LOG ...
    writes the row of a combination that did not run
"""

import argparse
import csv
import json
import math
import re
from pathlib import Path

from benchmarks.peers import ENGINES
from benchmarks.records import GIB, by_measurement, gpu_of, lines
from opt.errors import report_user_error

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "benchmarks" / "results"
# Of a step: blocks of steps that wait for the GPU alone lie within a percent
HOST_DECIDES = 0.03
# Bytes a second of a device's memory, as its maker's data sheet has it
BANDWIDTH = {"H100 80GB HBM3": 3.35e12, "H200": 4.8e12, "A100-SXM4-80GB": 2.04e12}
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


def spread(result: dict) -> str:
    """How far the repeats lie apart: the slowest block's time less the fastest's, in percent of the
    median."""
    return "" if len(result["repeats"]) < 2 else f"{apart(result):.1%}"


def apart(result: dict) -> float:
    """The same as a number."""
    return (max(result["repeats"]) - min(result["repeats"])) / result["step_seconds"]["median"]


def is_decided_by_host(result: dict) -> bool:
    """Whether its blocks lie so far apart that the GPU alone cannot have been waited for."""
    return len(result.get("repeats", ())) > 1 and apart(result) > HOST_DECIDES


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
    """What the results were measured on and with, a line for each device; empty if nothing was
    measured."""
    measured = [r for r in results if "status" not in r]
    found = []
    for device in sorted({r["device"] for r in measured}):
        here = [r for r in measured if r["device"] == device]
        versions = {name: version for r in here for name, version in r.get("versions", {}).items()}
        said = [device, ", ".join(f"{k} {v}" for k, v in versions.items())]
        said.append(f"commit {', '.join(sorted({r['commit'] for r in here}))}")
        found.append("; ".join(said) + "\n")
    return "\n".join([*found, ""]) if found else ""


def draw(results: list[dict], directory: Path) -> bool:
    """throughput.png and memory.png: by batch size, a line for each plugin, a panel for each model
    and number of GPUs. False where no combination was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = [r for r in results if status(r) == "ok"]
    if not good:
        return False
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
    return True


# ---- campaigns


def campaign(name: str, folder: Path = RESULTS) -> list[dict]:
    """The results whose files' names begin so, of the commit that was measured last, in the order
    of GPUs, model, rows and rate; what was measured on two hosts once, with the other's seconds as
    `elsewhere`. Records of before there were campaigns only by a file's whole name, and of all
    their commits."""
    files = sorted(folder.glob(f"{name}*.jsonl"))
    found = [line for file in files for line in lines(file) if "file" not in line]
    if found:
        commit = max(found, key=lambda line: line["date"])["commit"]
        found = [line for line in found if line["commit"] == commit]
    # What failed once and was measured later is what was measured
    found.sort(key=lambda line: (status(line) != "ok", line["date"]))
    together = by_measurement(found)
    for line, *others in together:
        for other in others:
            if status(other) == "ok":
                line["elsewhere"] = other["step_seconds"]["median"]
    found = [line for line, *_ in together]
    found += [line for line in lines(folder / f"{name}.jsonl") if "file" in line]
    return sorted(found, key=lambda r: (*group(r), -r.get("tokens_per_second", 0)))


def group(result: dict) -> tuple:
    """What has to be equal for rates to be compared: GPUs, model, rows of one step, their length.
    Models by size."""
    from opt.model.sizes import PRESETS  # which takes seconds: the sweep's table does without

    sizes = list(PRESETS)
    model = result["model"]
    place = sizes.index(model) if model in sizes else -1
    length = result.get("seq_length", 0 if result["plugin"] == "demo" else 1024)
    about = result["world_size"], place, model, result["batch_size"], length
    return *about, gpu_of(result)


def alone(result: dict, results: list[dict]) -> dict | None:
    """Of `results` what that of several GPUs is to be compared with: one GPU of the same kind, with
    the same engine and rows; where layers or stages are cut over the GPUs with low_level_zero, and
    as many rows or 16. None where it was not measured."""
    if result["world_size"] == 1 or status(result) != "ok" or "seq_length" not in result:
        return None
    engine, sizes = words(result), [result["batch_size"]]
    if result["tp_size"] * result["pp_size"] > 1:
        is_compiled = result["compile"] or is_peer(result)
        engine = "--compile --fused_loss" if is_compiled else "--fused_loss --cuda_graph"
        engine, sizes = f"low_level_zero {engine}", [*sizes, 16]
    for rows in sizes:
        wanted = 1, result["model"], rows, result["seq_length"], gpu_of(result), engine
        for other in results:
            place = other["world_size"], other["model"], other["batch_size"]
            about = other.get("seq_length"), gpu_of(other), words(other)
            if (*place, *about) == wanted and status(other) == "ok":
                return other
    return None


def share_of_one(result: dict, results: list[dict]) -> float | None:
    """Its rate a GPU as a share of that of `alone`."""
    other = alone(result, results)
    return other and result["tokens_per_second_per_gpu"] / other["tokens_per_second_per_gpu"]


def is_peer(result: dict) -> bool:
    return result["engine"].split()[0] in ENGINES


def words(result: dict) -> str:
    """The engine and those of its flags that are not the same for all."""
    given = result["engine"].split()
    shown, skipped = [], False
    for word, following in zip(given, [*given[1:], "--"], strict=True):
        if word in _SAME_FOR_ALL:
            skipped = not following.startswith("--")
        elif skipped:
            skipped = False
        else:
            shown.append(word)
    return " ".join(shown)


_SAME_FOR_ALL = ("--model_name_or_path", "--batch_size", "--repeats", "--max_train_steps")
_SAME_FOR_ALL += ("--warmup_steps", "--seq_length", "--lora_alpha")


def floor(result: dict) -> dict[str, float] | None:
    """Seconds of a step that no program could do without, on this device: its operations at the
    rate of the matrix product that was measured beside it, and what the update has to read and
    write at the memory's rate. None where one of them is not known.

    Operations are the model's (opt.measure.flops_per_token), none twice; with --fp8 those of the
    layers' matrices at twice the rate. The update of a parameter moves 28 bytes: its gradient, in
    and out the fp32 weight and two means, the 16-bit weight (without one an fp32 gradient), spread
    over the GPUs by ZeRO; without fp32 weights 14 with both means in bf16, 10 in 8 bits. Adapters'
    is nothing.
    Communication is not in it.
    """
    from opt.model.sizes import PRESETS, layer_matrices, num_parameters, preset_config

    if "mfu" not in result or result["model"] not in PRESETS:
        return None
    config = preset_config(result["model"])
    operations = result["mfu"] * result["step_seconds"]["median"]
    if result.get("fp8"):
        share = 6 * layer_matrices(config)
        if result.get("lora_r"):
            share = 4 * layer_matrices(config)
        rate = result["matmul_tflops"] * 1e12
        tokens = result["tokens_per_second_per_gpu"] * result["step_seconds"]["median"]
        operations -= tokens * share / rate / 2
    bandwidth = next((b for name, b in BANDWIDTH.items() if name in result["device"]), None)
    if bandwidth is None or result.get("offload_optim_frac"):
        return None  # the host's memory decides
    bytes_each = {"adamw_8bit": 10, "adamw_bnb_8bit": 10, "adamw_anyprecision": 14}
    bytes_each = bytes_each.get(result.get("optim"), 28)
    parameters = 0 if result.get("lora_r") else num_parameters(config)
    parts = result["world_size"] if is_sharded(result) else result["tp_size"] * result["pp_size"]
    return {"operations": operations, "update": bytes_each * parameters / parts / bandwidth}


def is_sharded(result: dict) -> bool:
    """Whether each GPU updates a part of the parameters."""
    return result["plugin"] == "gemini" or bool(result.get("zero_stage"))


def columns_of_campaign(results: list[dict]) -> dict:
    """Heading, how to read it off one of `results`."""

    def ms(seconds: float) -> str:
        return f"{1000 * seconds:.1f}"

    def least(r, *parts) -> str:
        found = floor(r)
        return ms(sum(found[part] for part in parts)) if found else ""

    def left(r) -> str:
        found = floor(r)
        return ms(r["step_seconds"]["median"] - sum(found.values())) if found else ""

    def first(r) -> str:
        known = r.get("seconds_to_first_step") if r.get("started") == "launched" else None
        return f"{known:.1f}" if known else ""

    def predicted(r) -> str:
        said = r.get("predicted_bytes")
        return f"{(said['device'] or said['host']) / GIB:.1f}" if said else ""

    def of_one(r) -> str:
        share = share_of_one(r, results)
        return f"{share:.2f}" if share else ""

    return {
        "engine": lambda r: f"*{words(r)}*" if is_peer(r) else words(r),
        "tokens/s/gpu": lambda r: f"{r['tokens_per_second_per_gpu']:,.0f}",
        "of one GPU": of_one,
        "spread": lambda r: spread(r) + "†" * is_decided_by_host(r),
        "ms": lambda r: ms(r["step_seconds"]["median"]),
        "another host's ms": lambda r: ms(r["elsewhere"]) if "elsewhere" in r else "",
        "operations": lambda r: least(r, "operations"),
        "update": lambda r: least(r, "update"),
        "left": left,
        "MFU": lambda r: f"{r['mfu']:.3f}",
        "GiB": lambda r: f"{peak_bytes(r) / GIB:.1f}",
        "predicted": predicted,
        "host GiB": lambda r: f"{r['peak_host_memory_bytes'] / GIB:.1f}",
        "loss": lambda r: f"{r['loss']:.3f}",
        "first step s": first,
    }


def tables_of_campaign(results: list[dict]) -> str:
    """Every row in markdown, in a table for each number of GPUs, model and rows."""
    columns = columns_of_campaign(results)
    text = [f"{conditions(results)}{_ABOUT}"]
    groups = {}
    for r in results:
        groups.setdefault(group(r), []).append(r)
    for members in groups.values():
        text.append(f"\n### {heading(members[0])}\n\n")
        measured = [r for r in members if status(r) == "ok" and "tokens_per_second" in r]
        if measured:
            used = {h: c for h, c in columns.items() if any(c(r) for r in measured)}
            text += [f"| {' | '.join(used)} |\n", "|---" * len(used) + "|\n"]
            text += [f"| {' | '.join(c(r) for c in used.values())} |\n" for r in measured]
        others = [r for r in members if r not in measured]
        text += [f"\n- {words(r)}: {others_line(r)}\n" for r in others]
    return "".join(text)


def heading(result: dict) -> str:
    """What `group` has of it, in words."""
    gpus, _, model, rows_each, length, kind = group(result)
    rows = f"{rows_each} row{'s' * (rows_each > 1)}" + f" of {length}" * (length > 0)
    places = f"{gpus} {kind or 'GPU' + 's' * (gpus > 1)}"
    if result.get("device", "").startswith("CPU"):
        places = f"{gpus} CPU process" + "es" * (gpus > 1)
    return f"{model}, {rows}, {places}"


_ABOUT = """\
Peers in italics. *ms*: a step, the median of the blocks; *spread*: the slowest block less the
fastest, over 3 % with a †: there the host decides, and another host has another figure. *of one
GPU*: the rate a GPU as a share of one GPU's with the same engine and rows; where layers or stages
are cut over the GPUs, which then have these rows together, of low_level_zero's, of as many rows or
16. The floor by arithmetic, ms: *operations* of the model at the matrix rate measured beside it,
*update*: what Adam reads and writes at the memory's rate; *left* is what is between. It has no
communication in it, and no host: where Adam is in host memory there is none.
"""


def others_line(result: dict) -> str:
    """A failure, or the demo, which has no rate of full rows."""
    if status(result) != "ok":
        return status(result)
    losses, first = result["held_out_losses"], result["seconds_to_first_step"]
    return (
        f"{result['wall_seconds']:.1f} s from launch to the saved model, "
        f"{result['seconds_of_all_steps']:.1f} of them {result['steps']} steps, median "
        f"{1000 * result['step_seconds']['median']:.2f} ms; first step after {first} s; held-out "
        f"loss {losses[0]:.4f}, at the end {losses[-1]:.4f}"
    )


def claim(results: list[dict]) -> list[dict]:
    """The rows that carry the claim: one GPU, 1.3b, 16 rows, all parameters by the same
    AdamW, nothing in host memory, nothing computed again but by default; the fastest first. Of the
    kind of GPU of which there are most, of two the first by name."""
    found = [
        r
        for r in results
        if (r["world_size"], r["model"], r["batch_size"]) == (1, "1.3b", 16)
        and status(r) == "ok"
        and not r.get("offload_optim_frac")
        and not r.get("lora_r")
        and not {"--grad_checkpoint", "--activation_memory_budget"} & set(r["engine"].split())
        and r.get("started") != "launched"
        and r.get("optim", "adamw_torch") == "adamw_torch"
    ]
    kinds = [gpu_of(r) for r in found]
    return [r for r in found if gpu_of(r) == max(kinds, key=kinds.count)]


def short(result: dict) -> str:
    """`words` without what all plugins have; a peer with Liger's loss says so."""
    own = {"--compile": None, "--fused_loss": "+ Liger" if is_peer(result) else None}
    return " ".join(filter(None, (own.get(word, word) for word in words(result).split())))


def table_of_claim(results: list[dict]) -> str:
    """For the README, in markdown."""
    left = columns_of_campaign(results)["left"]
    rows = [
        f"{f'*{short(r)}*' if is_peer(r) else short(r)} | {r['tokens_per_second']:,.0f} "
        f"| {peak_bytes(r) / GIB:.1f} | {left(r)}"
        for r in results
    ]
    head = ["| tokens/s | GiB | ms not by arithmetic", "---|---|---|---"]
    return "".join(f"| {row} |\n" if row != head[1] else f"|{row}|\n" for row in [*head, *rows])


def draw_claim(results: list[dict], picture: Path) -> None:
    """Two bars for each: tokens/s and peak memory. Plugins in blue."""
    from matplotlib import pyplot

    shown = list(reversed(results))
    names = [short(r) for r in shown]
    colors = ["silver" if is_peer(r) else "tab:blue" for r in shown]
    figure, panels = pyplot.subplots(
        1, 2, figsize=(9, 0.36 * len(shown) + 1.1), sharey=True, width_ratios=(3, 2)
    )
    rates = [r["tokens_per_second"] / 1000 for r in shown]
    peaks = [peak_bytes(r) / GIB for r in shown]
    kinds = ((rates, "thousand tokens/s: more is better"), (peaks, "peak GiB: less is better"))
    for panel, (values, label) in zip(panels, kinds, strict=True):
        bars = panel.barh(range(len(shown)), values, color=colors)
        panel.bar_label(bars, [f"{value:.1f}" for value in values], padding=3)
        panel.set(xlabel=label, xlim=(0, 1.2 * max(values)))
        panel.set_yticks(range(len(shown)), names)
        panel.spines[["top", "right"]].set_visible(False)
    first = shown[0]
    device = re.sub(r" \d+GB.*", "", first["device"])
    figure.suptitle(
        f"OPT-{first['model']}, {first['batch_size']} rows of {first['seq_length']:,} tokens, one "
        f"{device}: ColossalAI's plugins here in blue"
    )
    figure.tight_layout()
    figure.savefig(picture, dpi=90)
    pyplot.close(figure)


def draw_campaign(results: list[dict], picture: Path) -> None:
    """Throughput as bars, a panel for each GPUs, model and rows; a line on each bar from its
    slowest to its fastest repeat."""
    from matplotlib import pyplot

    groups = {}
    for r in results:
        if status(r) == "ok" and "tokens_per_second" in r:
            groups.setdefault(group(r), []).append(r)
    if not groups:
        return
    width = min(2, len(groups))
    sizes = [len(members) for members in groups.values()]
    most = [max(sizes[i : i + width]) for i in range(0, len(sizes), width)]  # in a line of panels
    heights = [0.9 + 0.18 * size for size in most]
    figure, axes = pyplot.subplots(
        len(heights),
        width,
        figsize=(7.5 * width, sum(heights) + 0.5),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for panel in axes.flat[len(groups) :]:
        panel.set_visible(False)
    for i, (panel, members) in enumerate(zip(axes.flat, groups.values(), strict=False)):
        panel.set_title(heading(members[0]), fontsize=9)
        for y, r in enumerate(members):
            rate = r["tokens_per_second_per_gpu"] / 1000
            ends = [rate * r["step_seconds"]["median"] / block for block in r["repeats"]]
            panel.barh(y, rate, color="silver" if is_peer(r) else "tab:blue")
            panel.plot([min(ends), max(ends)], [y, y], color="red", linewidth=1.5)
            label = f" {rate:,.1f}, {peak_bytes(r) / GIB:.1f} GiB"
            if share := share_of_one(r, results):
                label += f", {share:.2f} of one GPU"
            panel.text(max(ends), y, label, va="center", fontsize=6)
        # What is measured from its launch is there once more, forked
        names = [short(r)[:60] + ", launched" * (r.get("started") == "launched") for r in members]
        panel.set_yticks(range(len(members)), names, fontsize=6)
        panel.set_ylim(most[i // width] - 0.5, -0.5)  # as thick bars in all
        panel.set_xlim(0, 1.6 * members[0]["tokens_per_second_per_gpu"] / 1000)  # and the figures
        panel.tick_params(axis="x", labelsize=7)
    figure.supxlabel(
        "thousand tokens/s a GPU, peak memory; plugins in blue; red: the repeats", fontsize=9
    )
    figure.savefig(picture, dpi=90)
    pyplot.close(figure)


def report_campaign(name: str, folder: Path, docs: Path | None) -> None:
    """NAME.md and NAME.png in `folder`; into the README and docs/ of `docs`, where it is given.
    Prints the table of the claim."""
    results = campaign(name, folder)
    if not results:
        report_user_error(f"{folder} has no campaign {name}*.jsonl")
    text = tables_of_campaign(results)
    (folder / f"{name}.md").write_text(f"# Campaign {name}\n\n{text}")
    draw_campaign(results, folder / f"{name}.png")
    print(f"{folder}: {name}.md, {name}.png of {len(results)} measurements")
    shown = claim(results)
    if docs:
        fill(docs / "docs" / "measured.md", "campaign", text)
    if not shown:
        print(f"{name}: nothing of the README's table is measured, which stays as it is")
        return
    print(table_of_claim(shown))
    if docs:
        fill(docs / "README.md", "claim", table_of_claim(shown))
        draw_claim(shown, docs / "docs" / "speed.png")


def fill(file: Path, name: str, text: str) -> None:
    """Put `text` in the place of what stands between the marks of that name."""
    marks = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before, _, rest = file.read_text().partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not end:
        report_user_error(f"{file} has no {marks[0].strip()} and {marks[1].strip()}")
    file.write_text(f"{before}{marks[0]}{text}{end}{after}")


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
    whole = commands.add_parser("campaign", help="tables and plots of a campaign")
    whole.add_argument("name", help="what its files' names begin with, such as 2026-11-27")
    whole.add_argument(
        "--results", type=Path, default=RESULTS, help="their folder; default benchmarks/results"
    )
    whole.add_argument("--docs", action="store_true", help="fill README.md and docs/ as well")
    args = parser.parse_args()
    if args.command == "campaign":
        report_campaign(args.name, args.results, REPO if args.docs else None)
        if args.docs:
            from benchmarks import fits  # which takes seconds

            fits.write()
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
    is_measured = draw(results, args.directory)
    plots = ", throughput.png, memory.png" if is_measured else "; no combination has a result"
    print(f"{args.directory}: results.csv, results.md{plots}")
    if not is_measured:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
