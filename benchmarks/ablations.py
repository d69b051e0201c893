"""What each of the project's own parts is worth, alone: the same run with a library's in its place.

    python benchmarks/ablations.py --out FILE.jsonl --demo_model DIR --demo_dataset FILE
    python benchmarks/ablations.py --out FILE.jsonl --work 350m,1.3b --only update,liger

On one GPU: OPT-350m and 1.3b, 16 rows of 1,024 tokens (opt_benchmark.py, compiled, fused loss), and
the demo's step (opt_train_demo.py on short rows, CUDA graphs), each with everything, and with one
part replaced. A process for each, one after the other; one with everything first and last.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
WITHOUT = {
    "nothing": "",
    "update": "torch._fused_adamw_, gradients widened before and weights narrowed behind it",
    "loss": "PyTorch's log_softmax on chunks of logits",
    "liger": "Liger's fused linear cross-entropy",
    "attention": "FlashAttention on packed rows",
    "residual": "PyTorch's dropout, sum and norm, by compiled layers with a memory budget of 0.9",
    "few_tokens": "PyTorch's linear map, and its sum for a bias's gradient",
}
FEW = ["--max_train_steps", "8", "--warmup_steps", "4", "--repeats", "3", "--batch_size", "16"]
BENCHMARK = ["--plugin", "low_level_zero", "--compile", "--fused_loss", *FEW]
DEMO = ["--plugin", "low_level_zero", "--fused_loss", "--cuda_graph", "--batch_size", "32"]
DEMO += ["--max_train_steps", "600", "--eval_fraction", "0", "--no_save"]


def replace(part: str) -> None:
    """Put the library's in the place of one of WITHOUT, in this process."""
    from opt.model import kernel_probe, linear, opt

    if part in kernel_probe.WORK:

        def none(*_):
            raise RuntimeError("left out by benchmarks/ablations.py")

        kernel_probe._TRIALS[part] = none
    elif part == "few_tokens":
        linear.few_tokens = linear.plain
    elif part == "liger":
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        def loss(hidden, weight, targets, split):
            given = (hidden, weight, targets, None, None, -100, 0.0, 0.0, "sum")
            return LigerFusedLinearCrossEntropyFunction.apply(*given)[0]

        opt.fused_linear_cross_entropy = loss


def run_one(part: str, script: str, flags: list[str]) -> None:
    """In a process of its own: the script, with `part` replaced."""
    sys.path.insert(0, str(REPO))
    replace(part)
    if script == "opt_benchmark":
        import opt_benchmark
        from args import benchmark_parser

        opt_benchmark.run(benchmark_parser().parse_args(flags))
    else:
        import opt_train_demo
        from args import train_parser

        opt_train_demo.main(train_parser().parse_args(flags))


def measure(part: str, work: str, script: str, flags: list[str]) -> dict:
    """Milliseconds a step and the peak on the device; or what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        if script == "opt_benchmark":
            flags = [*flags, "--json", f"{folder}/result.json"]
        else:
            flags = [*flags, "--output_path", folder]
        command = [sys.executable, __file__, "--one", part, script, *flags]
        found = {"work": work, "without": part, "instead": WITHOUT[part], "flags": flags}
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, timeout=180)
        except subprocess.TimeoutExpired as error:
            return found | {"failed": str(error)}
        if done.returncode:
            return found | {"failed": (done.stdout + done.stderr)[-600:]}
        if script == "opt_benchmark":
            result = json.loads(Path(folder, "result.json").read_text())
            return found | {
                "milliseconds": [1000 * seconds for seconds in result["repeats"]],
                "peak_bytes": result["peak_memory_allocated_bytes"],
                "loss": result["loss"],
                **{name: result[name] for name in ("device", "versions", "commit")},
            }
        lines = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
        steps = [line for line in lines if "seconds" in line]
        seconds = [line["seconds"] for line in steps[100:]]
        return found | {
            "milliseconds": [1000 * statistics.median(seconds)],
            "loss": statistics.mean(line["loss"] for line in steps[-50:]),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a line a measurement")
    parser.add_argument("--only", default=",".join(WITHOUT), help="which parts")
    parser.add_argument("--work", default="demo,350m,1.3b", help="on what")
    parser.add_argument("--demo_model", help="a folder with opt-350m's configuration")
    parser.add_argument("--demo_dataset", help="the descriptions")
    args = parser.parse_args()
    if "demo" in args.work.split(",") and not (args.demo_model and args.demo_dataset):
        parser.error("--work demo needs --demo_model and --demo_dataset")
    works = {
        name: ("opt_benchmark", ["--model_name_or_path", name, *BENCHMARK])
        for name in ("350m", "1.3b")
    }
    given = ["--model_name_or_path", args.demo_model, "--dataset", args.demo_dataset]
    works["demo"] = ("opt_train_demo", [*given, *DEMO])
    for work in args.work.split(","):
        for part in ["nothing", *(p for p in args.only.split(",") if p != "nothing"), "nothing"]:
            if (part == "attention") and work != "demo":
                continue  # rows of 1,024 tokens never come to it
            if part == "few_tokens" and work != "demo":
                continue  # compiled layers neither
            found = measure(part, work, *works[work])
            with open(args.out, "a") as out:
                out.write(json.dumps(found) + "\n")
            print(work, part, found.get("milliseconds"), found.get("failed", "")[-200:], flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        run_one(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        main()
