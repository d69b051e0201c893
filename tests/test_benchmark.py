"""The benchmark: what it counts, the sweep, its tables and plots, and the peers beside the
plugins."""

import csv
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import OPTConfig

from benchmarks import compare, report
from opt.measure import flops_per_token
from opt.model.opt import meta_model
from opt.model.sizes import PRESETS, preset_config

from .conftest import REPO, SAMPLE_MODEL, run, workers

# Large steps, no dropout: whoever updates other weights, or with another decay, has another loss
# after the third.
WORK = (
    "--precision",
    "fp32",
    "--dropout",
    0,
    "--learning_rate",
    0.01,
    "--seq_length",
    64,
    "--warmup_steps",
    1,
    "--max_train_steps",
    2,
)
DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
KEYS = """plugin model precision batch_size seq_length world_size tp_size pp_size step_seconds samples_per_second tokens_per_second
tokens_per_second_per_gpu tflops_per_gpu mfu peak_memory_allocated_bytes peak_memory_reserved_bytes peak_host_memory_bytes loss
seconds_to_first_step device versions commit""".split()


# ---- the FLOP formula


@pytest.mark.parametrize(
    "sizes",
    [{"word_embed_proj_dim": 64}, {"word_embed_proj_dim": 32, "do_layer_norm_before": False}],
)
def test_flops_are_what_pytorch_counts(sizes):
    config = OPTConfig(
        vocab_size=512,
        hidden_size=64,
        ffn_dim=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        **sizes,
    )
    # Eager attention: its two products are counted (as bmm) on every device, which a fused kernel's
    # are not on a CPU.
    config._attn_implementation = "eager"
    model = transformers.OPTForCausalLM(config)
    length = 128
    ids = torch.randint(4, 512, (2, length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    counts = {
        operation: flops / ids.numel()
        for operation, flops in counter.get_flop_counts()["Global"].items()
    }
    # Eager attention computes the whole square; a causal kernel, and so the formula, the (length +
    # 1) / 2 of length positions seen.
    attention = counts.pop(torch.ops.aten.bmm) * (length + 1) / (2 * length)

    ours = flops_per_token(config, length)
    # The part that grows with length + 1, once more
    ours_attention = flops_per_token(config, 2 * length + 1) - ours
    assert ours_attention > 0.05 * ours  # not lost in the 2 % of the whole
    assert ours_attention == pytest.approx(attention, rel=0.02)
    assert ours - ours_attention == pytest.approx(sum(counts.values()), rel=0.02)
    assert ours == pytest.approx(sum(counts.values()) + attention, rel=0.02)


# The published weights' own counts; of the largest what their names say.
PUBLISHED = {
    "125m": 125_239_296,
    "350m": 331_196_416,
    "1.3b": 1_315_758_080,
    "2.7b": 2_651_596_800,
    "6.7b": 6_658_473_984,
}
PUBLISHED |= {
    "13b": 12_853_473_280,
    "30b": pytest.approx(30e9, rel=0.01),
    "66b": pytest.approx(66e9, rel=0.01),
}
PUBLISHED |= {"175b": pytest.approx(175e9, rel=0.01)}


def test_presets_have_as_many_parameters_as_the_published_models():
    assert {
        size: sum(p.numel() for p in meta_model(preset_config(size)).parameters())
        for size in PRESETS
    } == PUBLISHED


# ---- the sweep, with a combination that fails, killed and started again


def of_a_sweep(**settings) -> dict[str, str]:
    """The environment of run_benchmark.sh, for one process on a CPU."""
    given = {"MODEL": SAMPLE_MODEL, "BS": 2, "GPUNUM": 1, "PYTHON": sys.executable} | settings
    given |= {"INSTALL": 0, "CUDA_VISIBLE_DEVICES": ""}
    return os.environ | {name: str(value) for name, value in given.items()}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """run_benchmark.sh over gemini, which refuses fp32, and torch_ddp: killed while it measures the
    second, started again.

    Returns the results' folder, the files that were there when it was killed with their times, and
    the second run's output.
    """
    out = tmp_path_factory.mktemp("sweep")
    env = of_a_sweep(OUT=out, PLUGIN="gemini torch_ddp")
    command = ["bash", str(REPO / "run_benchmark.sh"), *map(str, WORK)]
    first = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    wait_for(lambda: list(out.glob("*torch_ddp*.log")))
    before = {file: file.stat().st_mtime_ns for file in out.glob("*.json")}
    first.send_signal(signal.SIGTERM)
    first.wait(60)
    assert not any(str(out) in command_line for command_line in command_lines()), (
        "the measurement goes on without the sweep"
    )

    second = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert second.returncode == 0, second.stdout[-2000:] + second.stderr[-2000:]
    return out, before, second.stdout


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def command_lines() -> list[str]:
    lines = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            lines.append(open(f"/proc/{process}/cmdline").read().replace("\0", " "))
        except OSError:  # over by now
            pass
    return lines


def test_a_killed_sweep_measures_only_what_is_missing(sweep):
    out, before, printed = sweep
    assert [("gemini" in file.name) for file in before] == [True]
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert "gemini, batch" not in printed and "torch_ddp, batch" in printed
    assert "1 combinations were there already" in printed


def test_a_combination_that_fails_is_a_row_that_says_so(sweep):
    out, _, printed = sweep
    with open(out / "results.csv", newline="") as f:
        rows = {row["plugin"]: row for row in csv.DictReader(f)}
    assert rows["gemini"]["status"].startswith("failed: gemini computes in bf16 or fp16 only")
    assert rows["gemini"]["tokens/s"] == ""
    assert rows["torch_ddp"]["status"] == "ok" and float(rows["torch_ddp"]["tokens/s"]) > 0
    assert "failed: gemini computes" in printed  # in the terminal's table
    assert_picture(out / "throughput.png")
    assert_picture(out / "memory.png")


def test_a_combination_that_is_killed_is_a_row_that_says_so(tmp_path):
    """As the kernel does it for want of host memory: without a word of the process itself."""
    env = of_a_sweep(OUT=tmp_path, PLUGIN="torch_ddp")
    command = ["bash", str(REPO / "run_benchmark.sh"), "--max_train_steps", "1000000"]
    sweep = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for(lambda: workers(sweep, "opt_benchmark.py"))
    workers(sweep, "opt_benchmark.py")[0].kill()
    printed, _ = sweep.communicate(timeout=60)
    assert sweep.returncode == 0
    with open(tmp_path / "results.csv", newline="") as f:
        (row,) = csv.DictReader(f)
    assert row["status"] == "killed, most likely for host memory"
    assert "failed, killed, most likely for host memory: " in printed


def test_result_is_complete_and_consistent(sweep):
    result = result_of(sweep[0], "torch_ddp")
    assert [key for key in KEYS if key not in result] == []
    step = result["step_seconds"]
    assert 0 < step["p10"] <= step["median"] <= step["p90"]
    assert result["tokens_per_second"] == pytest.approx(2 * 64 / step["median"])
    assert result["samples_per_second"] == pytest.approx(2 / step["median"])
    assert result["tflops_per_gpu"] == pytest.approx(result["mfu"] * result["matmul_tflops"])
    assert result["repeats"] == [step["median"]]
    assert result["loss"] == pytest.approx(math.log(2048), abs=0.5)  # random tokens
    assert {"torch", "colossalai", "transformers"} <= result["versions"].keys()


def result_of(directory, name) -> dict:
    (file,) = directory.glob(f"*{name}*.json")
    return json.loads(file.read_text())


# ---- the peers beside the plugins


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """What benchmarks/compare.py finds: {engine: result}. Nothing is compiled, which takes long on
    two cores."""
    out = tmp_path_factory.mktemp("comparison")
    engines = ["torch_ddp", "torch_amp --no_compile", "fsdp2 --no_compile"]
    if not DEEPSPEED:  # which compiles for minutes before its first step on a CPU
        engines.append("deepspeed_zero2")
    arguments = (
        "--models",
        SAMPLE_MODEL,
        "--batch_sizes",
        16,
        "--engines",
        *engines,
        "--reference",
        "torch_ddp",
        "--repeats",
        2,
    )
    done = run(
        REPO / "benchmarks" / "compare.py",
        *arguments,
        "--out",
        out,
        *WORK,
        env={"CUDA_VISIBLE_DEVICES": ""},
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "x torch_ddp" in done.stdout
    assert_picture(out / "comparison.png")
    return {compare.engine_of(result).split()[0]: result for result in report.load(out)}


@pytest.mark.parametrize("engine", ["torch_amp", "fsdp2"])
def test_peers_do_the_same_work(comparison, engine):
    ours, peer = comparison["torch_ddp"], comparison[engine]
    if "requires CUDA" in peer.get("status", ""):
        pytest.skip("FSDP2 of PyTorch 2.5 is for CUDA devices alone")
    assert peer["loss"] == pytest.approx(ours["loss"], abs=1e-4)
    assert [key for key in ours if key not in peer] == []
    assert len(peer["repeats"]) == 2 and min(peer["repeats"]) <= peer["step_seconds"][
        "median"
    ] <= max(peer["repeats"])


@pytest.mark.skipif(DEEPSPEED, reason="deepspeed is installed here")
def test_a_peer_that_is_not_installed_is_a_row_that_says_so(comparison):
    assert comparison["deepspeed_zero2"]["status"] == "not installed"


def test_peak_memory_grows_with_batch_size(sweep, comparison):
    small, large = result_of(sweep[0], "torch_ddp"), comparison["torch_ddp"]
    assert (small["batch_size"], large["batch_size"]) == (2, 16)
    logits = (16 - 2) * 64 * 2048 * 4  # bytes, of the rows that are more
    assert large["peak_host_memory_bytes"] > small["peak_host_memory_bytes"] + logits


# ---- tables and plots from recorded results


@pytest.fixture
def recorded(tmp_path):
    """A folder of results as the scripts write them, one of them a failure, and one measured but
    wrong."""
    for model, speed in (("125m", 4.0), ("350m", 1.0)):
        for plugin, faster in (
            ("torch_ddp", 1.0),
            ("deepspeed_zero2", 0.5),
            ("fsdp2 --fused_loss", 2.0),
        ):
            for batch_size in (8, 16):
                result = recorded_result(model, plugin, batch_size, 50_000 * speed * faster)
                (tmp_path / f"{model}-{plugin}-{batch_size}.json").write_text(json.dumps(result))
    log = tmp_path / "x.log"
    log.write_text("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n")
    report.write_failed(tmp_path / "failed.json", log, 1, "350m", "gemini", 16, 1)
    (tmp_path / "nan.json").write_text(
        json.dumps(recorded_result("350m", "gemini", 8, 10_000) | {"loss": float("nan")})
    )
    return tmp_path


def recorded_result(model, engine, batch_size, rate):
    median = batch_size * 1024 / rate
    return {
        "plugin": engine.split()[0],
        "engine": engine,
        "model": model,
        "precision": "bf16",
        "batch_size": batch_size,
        "seq_length": 1024,
        "world_size": 1,
        "step_seconds": {"median": median, "p10": 0.9 * median, "p90": 1.1 * median},
        "repeats": [0.99 * median, median, 1.01 * median],
        "tokens_per_second": rate,
        "tokens_per_second_per_gpu": rate,
        "tflops_per_gpu": 123.4,
        "mfu": 0.25,
        "peak_memory_allocated_bytes": batch_size * 2**30,
        "peak_host_memory_bytes": 2**30,
        "memory_limit_bytes": 80 * 2**30,
        "loss": 10.8765,
        "seconds_to_first_step": 12.3,
        "device": "NVIDIA H100",
        "versions": {"torch": "2.11.0"},
        "commit": "abc",
    }


def test_tables_and_plots_from_recorded_results(recorded):
    done = run(REPO / "benchmarks" / "report.py", "table", recorded, env={"PYTHONPATH": str(REPO)})
    assert done.returncode == 0, done.stderr
    with open(recorded / "results.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 14
    found = {(row["model"], row["plugin"], row["batch"]): row for row in rows}
    row = found["125m", "torch_ddp", "8"]
    assert (row["tokens/s"], row["peak GiB"], row["loss"], row["MFU"]) == (
        "200000",
        "8.00",
        "10.8765",
        "0.250",
    )
    assert found["350m", "gemini", "16"]["status"] == "out of memory"
    assert found["350m", "gemini", "16"]["tokens/s"] == ""
    assert found["350m", "gemini", "8"]["status"] == "loss is nan"
    markdown = (recorded / "results.md").read_text().splitlines()
    assert markdown[0] == "NVIDIA H100; torch 2.11.0; commit abc"
    assert len([line for line in markdown if line.startswith("|")]) == 16
    assert "out of memory" in done.stdout
    assert_picture(recorded / "throughput.png")
    assert_picture(recorded / "memory.png")


def test_comparison_from_recorded_results(recorded):
    # No minute to measure in: the table and the plot of what is there.
    done = run(REPO / "benchmarks" / "compare.py", "--out", recorded, "--minutes", 0)
    assert done.returncode == 0, done.stderr
    with open(recorded / "comparison.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 14
    # The fastest first
    assert [row["engine"] for row in rows[:3]] == [
        "fsdp2 --fused_loss",
        "torch_ddp",
        "deepspeed_zero2",
    ]
    assert [row["x deepspeed_zero2"] for row in rows[:3]] == ["4.00", "2.00", "1.00"]
    assert {row["spread"] for row in rows} == {"2.0%", ""}
    assert_picture(recorded / "comparison.png")


def assert_picture(file):
    content = file.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(content) > 10_000


def test_curves_are_compared_and_kept(tmp_path):
    """Two ways to the same losses; and no run is made again."""
    model = REPO / "sample" / "opt-tiny"
    flags = [
        "--model_name_or_path",
        model,
        "--dataset",
        REPO / "sample" / "netflix_sample.csv",
        "--steps",
        3,
        "--out",
        tmp_path,
    ]
    techniques = ["--techniques", "--precision fp32", "--plugin low_level_zero"]
    done = run(
        REPO / "benchmarks" / "curves.py", *flags, *techniques, env={"CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (tmp_path / "curves.md").read_text().splitlines()
    header, _, *rows = ([cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines)
    table = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert list(table) == ["--precision fp32", "--plugin low_level_zero"]
    assert float(table["--plugin low_level_zero"]["largest difference"]) < 1e-3
    assert (
        5 < float(table["--precision fp32"]["last loss"]) < 9
        and float(table["--precision fp32"]["real tokens/s"].replace(",", "")) > 0
    )
    assert_picture(tmp_path / "curves.png")

    files = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.jsonl")}
    assert run(REPO / "benchmarks" / "curves.py", *flags, *techniques).returncode == 0
    assert files == {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.jsonl")}
