"""Train a hundred steps with each technique that is to make them faster; write the loss curves.

    python benchmarks/curves.py --model_name_or_path facebook/opt-350m
        every technique, into benchmarks/results/curves/
    python benchmarks/curves.py --techniques "--compile --cuda_graph" --model_name_or_path ...
    python benchmarks/curves.py --techniques
        only table and plot of what is there

The first technique is what the others are compared with. Arguments that it does not know go to
opt_train_demo.py. A technique that has its curve is not run again.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent

TECHNIQUES = [
    "--precision fp32 --no-padding_free",
    "--precision fp32",
    "--precision bf16",
    "--compile",
    "--fused_loss",
    "--cuda_graph",
    "--compile --cuda_graph",
    "--cuda_graph --fused_loss",
    "--plugin low_level_zero",
    "--plugin low_level_zero --cuda_graph",
    "--plugin low_level_zero --cuda_graph --fused_loss",
    "--plugin low_level_zero --cuda_graph --fused_loss --no-padding_free",
    "--plugin low_level_zero --compile --fused_loss",
    "--plugin low_level_zero --compile --fused_loss --fp8",
    "--plugin hybrid_parallel --compile --fused_loss",
    "--plugin gemini",
    "--plugin gemini --compile --fused_loss",
    "--plugin torch_ddp_fp16",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--techniques",
        nargs="*",
        default=TECHNIQUES,
        help="flags of opt_train_demo.py, in quotes; default those of TECHNIQUES",
    )
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps; default 100")
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE / "results" / "curves",
        help="folder; default benchmarks/results/curves",
    )
    args, flags = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for technique in args.techniques:
        file = args.out / f"{re.sub('[^a-z0-9_]+', '-', technique).strip('-')}.jsonl"
        if not file.is_file():
            print(technique, flush=True)
            file.write_text(
                json.dumps({"technique": technique})
                + "\n"
                + train([*technique.split(), *flags], args.steps)
            )
    curves = read(args.out)
    table = compare(curves)
    (args.out / "curves.md").write_text(table)
    print(table)
    draw(curves, args.out / "curves.png")


def train(flags: list[str], steps: int) -> str:
    """The metrics.jsonl of a run without dropout, with which no two ways of drawing random numbers
    would agree."""
    with tempfile.TemporaryDirectory() as output:
        fixed = [
            "--max_train_steps",
            str(steps),
            "--dropout",
            "0",
            "--eval_fraction",
            "0",
            "--no_save",
            "--output_path",
            output,
        ]
        subprocess.run(
            [sys.executable, HERE.parent / "opt_train_demo.py", *fixed, *flags], check=True
        )
        return Path(output, "metrics.jsonl").read_text()


def read(folder: Path) -> dict[str, list[dict]]:
    """{technique: its lines of metrics.jsonl}, in the order of TECHNIQUES."""
    curves = {}
    for file in folder.glob("*.jsonl"):
        first, *lines = map(json.loads, file.read_text().splitlines())
        curves[first["technique"]] = lines
    order = {technique: i for i, technique in enumerate(TECHNIQUES)}
    return dict(sorted(curves.items(), key=lambda item: order.get(item[0], len(order))))


def compare(curves: dict[str, list[dict]]) -> str:
    """A Markdown table: how far each curve is from the first, and how fast it went."""
    rows = [
        "| technique | largest difference | mean difference | last loss | ms/step "
        "| real tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    reference = [line["loss"] for line in next(iter(curves.values()), [])]
    for technique, lines in curves.items():
        apart = [abs(line["loss"] - loss) for line, loss in zip(lines, reference, strict=True)]
        step = statistics.median(line["seconds"] for line in lines)
        rate = statistics.median(line["tokens"] / line["seconds"] for line in lines)
        last = lines[-1]["loss"]
        rows.append(
            f"| `{technique}` | {max(apart):.4f} | {statistics.mean(apart):.4f} | {last:.4f} | "
            f"{step * 1000:.1f} | {rate:,.0f} |"
        )
    return "\n".join(rows) + "\n"


def draw(curves: dict[str, list[dict]], picture: Path) -> None:
    """Loss by step, a line for each technique."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for technique, lines in curves.items():
        axes.plot(
            [line["step"] for line in lines],
            [line["loss"] for line in lines],
            linewidth=0.9,
            label=technique,
        )
    axes.set(xlabel="optimizer step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
