"""Measure throughput and peak memory of training OPT: the training script's setup and step.

    python opt_benchmark.py --model_name_or_path 125m --plugin low_level_zero --batch_size 32
    torchrun --nproc_per_node 2 opt_benchmark.py --model_name_or_path 1.3b --plugin gemini \
        --json result.json

This is the training loop on synthetic tokens, with everything but the measured step taken out.
run_benchmark.sh sweeps it.
"""

import json
import statistics
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from args import benchmark_parser
from opt import installed

if __name__ == "__main__":  # ahead of the imports below, which take seconds
    installed.check()
    FLAGS = benchmark_parser().parse_args()

import torch
import torch.distributed as dist

from opt import measure
from opt.colossal import processes
from opt.data.batches import SyntheticBatches
from opt.model.lora import Lora
from opt.train import checks, faults, fit, memory
from opt.train import plan as plans
from opt.train.schedule import Steps
from opt_train_demo import boost, train_step


def main(flags, measured_by) -> None:
    """Check, start the processes, measure, print and write the result: the course of
    benchmarks/peers.py as well."""
    here = processes.place()
    flags = checks.with_first_plugin(flags, here)
    plan, config, weights = checks.check_benchmark(flags, here)
    processes.start(here, plan.mem_cap, plan.timeout_minutes)
    if plan.auto:
        case, chosen = fit.choose(case_of(flags, plan, config, here))
        plan = case.plan
        if here.is_main:
            print("\n".join(f"  auto      {line}" for line in chosen), flush=True)
    matmul_rate = measure.matmul_flops(here.device)
    if here.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    result = summarize(plan, here, config, measured_by(plan, here, config, weights), matmul_rate)
    if here.is_main:
        print(describe(result), flush=True)
        if plan.json:
            Path(plan.json).parent.mkdir(parents=True, exist_ok=True)
            Path(plan.json).write_text(json.dumps(result, indent=1) + "\n")
    processes.stop()


def by_training(flags, plan, here, config, weights) -> "Measured":
    """Train on synthetic tokens. Raises UserError for what cannot fit."""
    needed = fit.refuse(case_of(flags, plan, config, here))
    kernels = plans.missing_kernels(plan, here, config, None)
    boosted = boost(plan, here, config, weights, Steps.of_benchmark(plan.learning_rate))
    spread = boosted.plugin.spread
    batches = SyntheticBatches(
        plan.batch_size,
        plan.seq_length,
        config.vocab_size,
        spread.dp_rank,
        spread.dp_size,
        plan.seed,
    )

    def step():
        loss, _ = train_step(
            boosted, [next(batches) for _ in range(plan.gradient_accumulation_steps)]
        )
        return loss

    measured = time_steps(plan, here, step)
    measured.more["predicted_bytes"] = {
        "device": round(needed.device) if needed.is_on_gpu else 0,
        "host": round(needed.host),
    }
    if kernels:
        measured.more["missing_kernels"] = kernels
    if plan.profile:
        profile(step, plan.profile, here)
    return measured


def case_of(flags, plan, config, here) -> fit.Case:
    """What memory is asked for."""
    rows, room = memory.RowLengths(plan.seq_length), memory.find_room(here, plan.mem_cap)
    return fit.Case(flags, plan, config, here, rows, room)


@dataclass
class Measured:
    """What came out of the timed steps."""

    seconds: list[float]  # of each
    loss: float  # of the last
    first_step: float  # seconds from launch to the end of the very first step
    memory: dict[str, int]  # see measure.peak_memory
    more: dict = field(default_factory=dict)  # what else the result is to say


def time_steps(plan, here, step) -> Measured:
    """Time `step()`, which returns this process's share of the step's loss: --repeats blocks, after
    the warm-up."""
    timer, first_step = measure.StepTimer(), None
    for i in range(plan.warmup_steps + plan.repeats * plan.max_train_steps):
        if (i - plan.warmup_steps) % plan.max_train_steps == 0:
            dist.barrier()
        timer.start()
        loss = step()
        timer.stop()
        if first_step is None:
            timer.seconds()
            first_step = measure.seconds_since_launch()
    seconds = timer.seconds()[plan.warmup_steps :]
    dist.all_reduce(loss)
    return Measured(seconds, loss.item(), first_step, measure.peak_memory(here.device))


# Of the plan, what tables tell results apart by; all of it is in "arguments"
_SETTINGS = (
    *("plugin", "precision", "batch_size", "seq_length", "gradient_accumulation_steps", "tp_size"),
    *("pp_size", "zero_stage", "grad_checkpoint", "compile", "activation_memory_budget"),
    *("cuda_graph", "fused_loss", "fp8", "optim", "offload_optim_frac", "lora_r", "load_in_4bit"),
)


def summarize(plan, here, config, measured, matmul_rate) -> dict:
    """The result's JSON object."""
    seconds, size = measured.seconds, plan.max_train_steps
    blocks = [statistics.median(seconds[i : i + size]) for i in range(0, len(seconds), size)]
    median = statistics.median(blocks)
    deciles = (
        statistics.quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else seconds * 9
    )
    rows = (
        plan.batch_size
        * plan.gradient_accumulation_steps
        * here.world_size
        // (plan.tp_size * plan.pp_size)
    )
    rate = rows * plan.seq_length / median
    a_token = measure.flops_per_token(config, plan.seq_length, Lora.of(plan))
    flops = rate / here.world_size * a_token
    return {
        "model": plan.model_name_or_path,
        **{name: getattr(plan, name) for name in _SETTINGS},
        "world_size": here.world_size,
        "dropout": config.dropout,
        "step_seconds": {"median": median, "p10": deciles[0], "p90": deciles[-1]},
        "repeats": blocks,
        "samples_per_second": rate / plan.seq_length,
        "tokens_per_second": rate,
        "tokens_per_second_per_gpu": rate / here.world_size,
        "tflops_per_gpu": flops / 1e12,
        "mfu": flops / matmul_rate,
        "matmul_tflops": matmul_rate / 1e12,
        **measured.memory,
        "predicted_bytes": None,  # of the device and the host, for what is not a peer
        "memory_limit_bytes": measure.memory_limit(here.device),
        "loss": measured.loss,
        "seconds_to_first_step": measured.first_step,
        "seed": plan.seed,
        "arguments": {k: v for k, v in vars(plan).items() if k not in ("json", "profile")},
        "device": measure.device_name(here.device),
        "versions": measure.versions(),
        "commit": installed.commit(),
        **measured.more,
    }


def profile(step, directory, here) -> None:
    """Trace three steps; open the file at https://ui.perfetto.dev, or read the table of the
    costliest operations beside it."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as trace:
        for _ in range(3):
            step()
    trace.export_chrome_trace(f"{directory}/rank{here.rank}.json.gz")
    by = "self_cuda_time_total" if here.device.type == "cuda" else "self_cpu_time_total"
    Path(directory, f"rank{here.rank}.txt").write_text(
        trace.key_averages().table(sort_by=by, row_limit=40)
    )


def describe(result) -> str:
    """The result in a few lines."""
    step, gib = result["step_seconds"], 2**30
    where = (
        "allocated on the device at the peak"
        if result["peak_memory_allocated_bytes"]
        else "in host memory at the peak"
    )
    peak = result["peak_memory_allocated_bytes"] or result["peak_host_memory_bytes"]
    if predicted := result["predicted_bytes"]:
        predicted = predicted["device"] or predicted["host"]
        where += f", {predicted / gib:.2f} predicted"
    kernels = f"\n  kernels   {result['missing_kernels']}" if "missing_kernels" in result else ""
    return (
        f"  {result['model']} {result['plugin']} {result['precision']}, {result['batch_size']} x "
        f"{result['seq_length']} tokens, "
        f"{result['world_size']} x {result['device']}\n"
        f"  step      {step['median'] * 1000:,.1f} ms (p10 {step['p10'] * 1000:,.1f}, p90 "
        f"{step['p90'] * 1000:,.1f})\n"
        f"  rate      {result['tokens_per_second']:,.0f} tokens/s, "
        f"{result['samples_per_second']:,.2f} samples/s, "
        f"{result['tflops_per_gpu']:,.2f} TFLOP/s each, MFU {result['mfu']:.1%} of "
        f"{result['matmul_tflops']:,.1f}\n"
        f"  memory    {peak / gib:.2f} GiB {where}\n"
        f"  loss      {result['loss']:.4f}; first step {result['seconds_to_first_step']:.1f} s "
        f"after launch{kernels}"
    )


def run(flags) -> None:
    """All of it; benchmarks/campaign.py calls it in processes that it has forked."""
    with faults.reported(flags):
        main(flags, partial(by_training, flags))


if __name__ == "__main__":
    run(FLAGS)
