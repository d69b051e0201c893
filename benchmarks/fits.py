"""The tables of docs/memory.md: what fits on one GPU, by the plan's estimate and as measured.

    python -m benchmarks.fits               writes them anew

What was measured is taken from the campaigns on one GPU in benchmarks/results; times with its name.
"""

import re
from pathlib import Path

from args import OPTIMS, benchmark_parser, resolve
from benchmarks.predicted import plan_of, results
from benchmarks.records import GIB, by_measurement, gpu_of
from opt.model.sizes import PRESETS, num_parameters, preset_config
from opt.train.memory import RowLengths, estimate

RECORDS = Path(__file__).parent / "results"
DOCUMENT = Path(__file__).parent.parent / "docs" / "memory.md"
LENGTH = 1024
# The least that a way takes, and the fastest
LEAST = "--batch_size 1 --grad_checkpoint"
FASTEST = "--batch_size 8"
WAYS = {
    "all, fp32 Adam": "--plugin low_level_zero --compile --fused_loss",
    "all, 8-bit Adam": "--plugin low_level_zero --optim adamw_8bit --compile --fused_loss",
    "all, Adam in host memory": "--plugin gemini --offload_optim_frac 1 --compile --fused_loss",
    "the same in 16 bits": "--plugin gemini --offload_optim_frac 1 --optim adamw_anyprecision "
    "--compile --fused_loss",
    "LoRA": "--plugin low_level_zero --compile --fused_loss --lora_r 16",
    "LoRA, 4 bits": "--plugin low_level_zero --fused_loss --lora_r 16 --load_in_4bit",
}
COSTS = {
    "nothing computed again": "--activation_memory_budget 1",
    "the default, `--activation_memory_budget 0.92`": "",
    **{
        f"`--activation_memory_budget {f}`": f"--activation_memory_budget {f}"
        for f in (0.8, 0.5, 0.2, 0)
    },
    **{f"`--grad_checkpoint {n}`": f"--grad_checkpoint {n}" for n in (4, 2, 1)},
}
# Of a plan, what memory and rate depend on
_SAME = """plugin precision batch_size gradient_accumulation_steps grad_checkpoint compile
fused_loss fp8 cuda_graph optim offload_optim_frac activation_memory_budget lora_r load_in_4bit
zero_stage""".split()


class Found:
    """What was measured on one GPU, rows of LENGTH tokens."""

    def __init__(self):
        found = results(*sorted(RECORDS.glob("????-??-??-one-h?00.jsonl")))
        self.records = [
            (plan_of(result), result)
            for result, *_ in by_measurement(result for _, result in found)
            if result["world_size"] == 1 and result["seq_length"] == LENGTH
        ]
        # Of a day's, those of the larger GPU, which a table then has side by side
        self.records.sort(key=lambda r: (r[1]["date"][:10], gpu_of(r[1]), r[1]["date"]))

    def of(self, model: str, plan) -> dict | None:
        """The newest result of this plan; None if it was not measured."""
        wanted = [getattr(plan, name) for name in _SAME]
        for other, result in reversed(self.records):
            if result["model"] == model and [getattr(other, name) for name in _SAME] == wanted:
                return result
        return None


def settled(flags: str):
    """A plan for one GPU that has bf16."""
    given = benchmark_parser().parse_args([*flags.split(), "--seq_length", str(LENGTH)])
    return resolve(given, "cuda", True).but(dp_size=1)


def cell(found: Found, model: str, flags: str) -> str:
    """GiB on the GPU, bold where it was measured, and in host memory where state is there."""
    plan = settled(flags)
    needed = estimate(plan, preset_config(model), RowLengths(LENGTH), "cuda")
    measured = found.of(model, plan)
    said = f"{needed.device / GIB:.1f}"
    if measured:
        said = f"**{measured['peak_memory_allocated_bytes'] / GIB:.1f}**"
    if needed.host_optimizer:
        said += f" + {needed.host / GIB:.0f} host"
    return said


def table(found: Found, batches: str) -> list[str]:
    """A row for each size, a column for each way."""
    lines = [f"| | {' | '.join(WAYS)} |", "|---" * (len(WAYS) + 1) + "|"]
    for model in PRESETS:
        cells = [cell(found, model, f"{flags} {batches}") for flags in WAYS.values()]
        size = num_parameters(preset_config(model)) / 1e9
        lines.append(f"| {model} ({size:.3g} B) | {' | '.join(cells)} |")
    return lines


def costs(found: Found) -> list[str]:
    """What is kept for backward against what is computed again."""
    lines = ["| | GiB, computed | measured | ms a step | on |", "|---|---|---|---|---|"]
    for what, flags in COSTS.items():
        plan = settled(f"{WAYS['all, fp32 Adam']} --batch_size 16 {flags}")
        needed = estimate(plan, preset_config("1.3b"), RowLengths(LENGTH), "cuda")
        result = found.of("1.3b", plan)
        measured = ["", "", ""]
        if result:
            peak, median = result["peak_memory_allocated_bytes"], result["step_seconds"]["median"]
            measured = [f"{peak / GIB:.1f}", f"{median * 1000:.0f}", gpu_of(result)]
        lines.append(f"| {what} | {needed.device / GIB:.1f} | {' | '.join(measured)} |")
    return lines


def measured(found: Found) -> list[str]:
    """Those of the largest sizes, with their rates; of each way the newest."""
    lines = {}
    for plan, result in found.records:
        if result["model"] in PRESETS[3:]:
            way = [f"{plan.batch_size} rows", plan.plugin]
            switches = ("compile", "cuda_graph", "fp8", "load_in_4bit")
            way += [f"--{name}" for name in switches if getattr(plan, name)]
            way += [f"--optim {plan.optim}"] * (plan.optim != OPTIMS[0])
            way += [
                f"--{name} {getattr(plan, name):g}"
                for name in ("lora_r", "grad_checkpoint", "offload_optim_frac")
                if getattr(plan, name)
            ]
            peak, rate = result["peak_memory_allocated_bytes"], result["tokens_per_second"]
            name = f"{result['model']}, {', '.join(way)}"
            numbers = f"{peak / GIB:.1f} | {rate / 1000:.1f}"
            lines[name] = f"| {name} | {numbers} | {gpu_of(result)} | {result['commit'][:7]} |"
    head = ["| | GiB | thousand tokens/s | on | commit |", "|---|---|---|---|---|"]
    return head + [lines[name] for name in sorted(lines, key=size_and_name)]


def size_and_name(name: str) -> tuple:
    """The largest last."""
    return PRESETS.index(name.split(",")[0]), name


def written(document: str) -> str:
    """The document with its tables as they are today: each stands behind a line <!-- its name -->,
    up to an empty line."""
    found = Found()
    commands = [f"| {way} | `{flags}` |" for way, flags in WAYS.items()]
    tables = {
        "least": table(found, LEAST),
        "fastest": table(found, FASTEST),
        "flags": ["| | |", "|---|---|", *commands],
        "costs": costs(found),
        "measured": measured(found),
    }
    for name, rows in tables.items():
        new = "\n".join([f"<!-- {name} -->", *rows, ""])
        document, times = re.subn(
            rf"<!-- {name} -->\n(?:\|.*\n)*", lambda _, new=new: new, document
        )
        assert times == 1, f"one line <!-- {name} -->"
    return document


def write() -> None:
    """The document anew."""
    DOCUMENT.write_text(written(DOCUMENT.read_text()))


if __name__ == "__main__":
    write()
