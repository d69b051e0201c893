"""The plan's memory beside what was measured: a table of campaigns' results.

    python -m benchmarks.predicted benchmarks/results/2026-11-27-*.jsonl
    python -m benchmarks.predicted result.json ...      what opt_benchmark.py --json wrote

Predicted is what the result says (opt_benchmark.py --json has it), or else what the plan says
today.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from args import Settings, benchmark_parser, resolve
from benchmarks.records import GIB, lines
from opt.model.sizes import PRESETS, preset_config
from opt.registry import PLUGINS
from opt.train.memory import Estimate, RowLengths, estimate

# The flags that a result has, by their names; those of the second line only where they are not off
_FLAGS = """plugin precision batch_size seq_length gradient_accumulation_steps compile cuda_graph
fused_loss fp8 grad_checkpoint optim activation_memory_budget lora_r load_in_4bit""".split()
_SIZES = "tp_size pp_size num_microbatches zero_stage offload_optim_frac".split()


def results(*files: Path) -> Iterator[tuple[str, dict]]:
    """Name and result of those that the plan has an estimate for: of a plugin and a published
    size."""
    found = []
    for file in files:
        if file.suffix == ".json":
            found.append((file.stem, json.loads(file.read_text())))
        else:
            found += [(result.get("file", result["name"]), result) for result in lines(file)]
    for name, result in found:
        if result["plugin"] in PLUGINS and result["model"] in PRESETS and "status" not in result:
            yield name, result


def plan_of(result: dict) -> Settings:
    """The plan that it was measured by."""
    result = result.get("arguments", {}) | result
    given = {name: result[name] for name in _FLAGS if result.get(name) is not None}
    of_one = {"tp_size": 1, "pp_size": 1}  # which not every plugin takes
    given |= {
        name: result[name]
        for name in _SIZES
        if result.get(name) and result[name] != of_one.get(name)
    }
    flags = benchmark_parser().parse_args([]).but(**given)
    plan = resolve(flags, device_type(result), True)
    return plan.but(dp_size=result["world_size"] // (plan.tp_size * plan.pp_size))


def device_type(result: dict) -> str:
    """What it was measured on."""
    return "cuda" if result["peak_memory_allocated_bytes"] else "cpu"


def predicted(result: dict) -> Estimate:
    """What the plan says today."""
    config = preset_config(result["model"])
    return estimate(plan_of(result), config, RowLengths(result["seq_length"]), device_type(result))


def table(found: list[tuple[str, dict]]) -> str:
    """A row for each result, GiB."""
    lines = ["| result | predicted | measured | ratio | predicted, host | measured, host | ratio |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, result in found:
        needed = predicted(result)
        said = result.get("predicted_bytes") or {"device": needed.device, "host": needed.host}
        cells = [name]
        measured = {
            "device": result["peak_memory_allocated_bytes"],
            "host": result["peak_host_memory_bytes"],
        }
        for place, peak in measured.items():
            if peak:
                cells += [
                    f"{said[place] / GIB:.2f}",
                    f"{peak / GIB:.2f}",
                    f"{said[place] / peak:.2f}",
                ]
            else:
                cells += [""] * 3
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="of campaigns, or results")
    print(table(list(results(*parser.parse_args().files))))
