"""Measure throughput and peak memory of training OPT: the training script's setup on synthetic tokens.

    python opt_benchmark.py --model_name_or_path 125m --plugin low_level_zero --batch_size 32
    torchrun --nproc_per_node 2 opt_benchmark.py --model_name_or_path 1.3b --plugin gemini --json result.json

This is the training loop with everything but the measured step taken out. run_benchmark.sh sweeps it.
"""

import json
import statistics
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from args import benchmark_parser
from opt import installed


def main() -> None:
    run(benchmark_parser().parse_args(), measure)


def run(args, measure) -> None:
    """Check, start the processes, `measure`, print and write the result: the course of benchmarks/peers.py as well."""
    installed.check()

    from opt.train import faults  # after the arguments: the libraries below take seconds to import

    with faults.reported(args):
        _run(args, measure)


def _run(args, measure) -> None:
    import torch

    from opt import measure
    from opt.colossal import processes
    from opt.train.checks import check_benchmark

    here = processes.place()
    config, contents = check_benchmark(args, here)
    processes.start(here, args.mem_cap, args.timeout_minutes)
    matmul_rate = measure.matmul_flops(here.device)
    if here.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    result = summarize(args, here, config, measure(args, here, config, contents), matmul_rate)
    if here.is_main:
        print(describe(result), flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    processes.stop()


def measure(args, here, config, contents) -> "Measured":
    """Train on synthetic tokens."""
    from opt.colossal.build import build
    from opt.data.batches import SyntheticBatches
    from opt.train import plan, step

    kernels = plan.missing_kernels(args, here, config, None)
    built = build(args, here, config, contents, args.learning_rate, 0, 10**9)
    parallel = built.parallel
    batches = SyntheticBatches(args.batch_size, args.seq_length, config.vocab_size, parallel.dp_rank, parallel.dp_size, args.seed)

    def train_step():
        group = [next(batches) for _ in range(args.gradient_accumulation_steps)]
        loss, _ = step.train_step(parallel, built.model, built.optimizer, built.schedule, group)
        return loss

    measured = time_steps(args, here, train_step)
    if kernels:
        measured.more["missing_kernels"] = kernels
    if args.profile:
        profile(train_step, args.profile, here)
    return measured


@dataclass
class Measured:
    """What came out of the timed steps."""

    seconds: list[float]  # of each
    loss: float  # of the last
    first_step: float  # seconds from launch to the end of the very first step
    memory: dict[str, int]  # see metrics.peak_memory
    more: dict = field(default_factory=dict)  # what else the result is to say


def time_steps(args, here, train_step) -> Measured:
    """Time `train_step()`, which returns this process's share of the step's loss: --repeats blocks, after the warm-up."""
    import torch.distributed as dist

    from opt import measure

    timer, first_step = measure.StepTimer(), None
    for i in range(args.warmup_steps + args.repeats * args.max_train_steps):
        if (i - args.warmup_steps) % args.max_train_steps == 0:
            dist.barrier()
        timer.start()
        loss = train_step()
        timer.stop()
        if first_step is None:
            timer.seconds()
            first_step = measure.seconds_since_launch()
    seconds = timer.seconds()[args.warmup_steps :]
    dist.all_reduce(loss)
    return Measured(seconds, loss.item(), first_step, measure.peak_memory(here.device))


def summarize(args, here, config, measured, matmul_rate) -> dict:
    """The result's JSON object."""
    from opt import measure

    seconds, size = measured.seconds, args.max_train_steps
    blocks = [statistics.median(seconds[i : i + size]) for i in range(0, len(seconds), size)]
    median = statistics.median(blocks)
    deciles = statistics.quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else seconds * 9
    rows = args.batch_size * args.gradient_accumulation_steps * here.world_size // (args.tp_size * args.pp_size)
    rate = rows * args.seq_length / median
    flops = rate / here.world_size * measure.flops_per_token(config, args.seq_length)
    return {
        "plugin": args.plugin,
        "model": args.model_name_or_path,
        "precision": args.precision,
        "batch_size": args.batch_size,
        "seq_length": args.seq_length,
        "world_size": here.world_size,
        "tp_size": args.tp_size,
        "pp_size": args.pp_size,
        "zero_stage": args.zero_stage,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "grad_checkpoint": args.grad_checkpoint,
        "compile": args.compile,
        "cuda_graph": args.cuda_graph,
        "fused_loss": args.fused_loss,
        "fp8": args.fp8,
        "offload_optim_frac": args.offload_optim_frac,
        "dropout": config.dropout,
        "step_seconds": {"median": median, "p10": deciles[0], "p90": deciles[-1]},
        "repeats": blocks,
        "samples_per_second": rate / args.seq_length,
        "tokens_per_second": rate,
        "tokens_per_second_per_gpu": rate / here.world_size,
        "tflops_per_gpu": flops / 1e12,
        "mfu": flops / matmul_rate,
        "matmul_tflops": matmul_rate / 1e12,
        **measured.memory,
        "memory_limit_bytes": measure.memory_limit(here.device),
        "loss": measured.loss,
        "seconds_to_first_step": measured.first_step,
        "device": measure.device_name(here.device),
        "versions": measure.versions(),
        "commit": commit(),
        **measured.more,
    }


def profile(train_step, directory, here) -> None:
    """Trace three steps; open the file at https://ui.perfetto.dev, or read the table of the costliest operations beside it."""
    import torch

    Path(directory).mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as trace:
        for _ in range(3):
            train_step()
    trace.export_chrome_trace(f"{directory}/rank{here.rank}.json.gz")
    by = "self_cuda_time_total" if here.device.type == "cuda" else "self_cpu_time_total"
    Path(directory, f"rank{here.rank}.txt").write_text(trace.key_averages().table(sort_by=by, row_limit=40))


def describe(result) -> str:
    """The result in a few lines."""
    step, gib = result["step_seconds"], 2**30
    where = "allocated on the device" if result["peak_memory_allocated_bytes"] else "in host memory"
    peak = result["peak_memory_allocated_bytes"] or result["peak_host_memory_bytes"]
    kernels = f"\n  kernels   {result['missing_kernels']}" if "missing_kernels" in result else ""
    return (
        f"  {result['model']} {result['plugin']} {result['precision']}, {result['batch_size']} x {result['seq_length']} tokens, "
        f"{result['world_size']} x {result['device']}\n"
        f"  step      {step['median'] * 1000:,.1f} ms (p10 {step['p10'] * 1000:,.1f}, p90 {step['p90'] * 1000:,.1f})\n"
        f"  rate      {result['tokens_per_second']:,.0f} tokens/s, {result['samples_per_second']:,.2f} samples/s, "
        f"{result['tflops_per_gpu']:,.2f} TFLOP/s each, MFU {result['mfu']:.1%} of {result['matmul_tflops']:,.1f}\n"
        f"  memory    {peak / gib:.2f} GiB {where} at the peak\n"
        f"  loss      {result['loss']:.4f}; first step {result['seconds_to_first_step']:.1f} s after launch{kernels}"
    )


def commit() -> str:
    """The commit of this code, "+" behind it where files have changed since; empty outside a git checkout."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--abbrev=12"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return done.stdout.strip()


if __name__ == "__main__":
    main()
