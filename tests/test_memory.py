"""The memory that the plan says a run takes, what there is of it, and what is refused."""

from pathlib import Path

import pytest

from benchmarks import predicted
from opt.model.opt import meta_model
from opt.model.sizes import PRESETS, num_parameters, preset_config

from .conftest import REPO

RECORDS = REPO / "benchmarks" / "results"


@pytest.mark.parametrize(
    "changes",
    [
        *({"size": size} for size in PRESETS),
        {"word_embed_proj_dim": 512},
        {"do_layer_norm_before": False},
        {"_remove_final_layer_norm": True},
        {"enable_bias": False},
        {"layer_norm_elementwise_affine": False},
        {"tie_word_embeddings": False},
    ],
)
def test_parameters_are_counted_from_the_configuration(changes):
    config = preset_config(changes.pop("size", "125m"))
    for name, value in changes.items():
        setattr(config, name, value)
    assert num_parameters(config) == sum(p.numel() for p in set(meta_model(config).parameters()))


def measured() -> list[tuple[Path, dict]]:
    folders = [RECORDS, *(path for path in RECORDS.rglob("*") if path.is_dir())]
    return [
        (file, result)
        for file, result in predicted.results(*folders)
        if result["peak_memory_allocated_bytes"] and not is_of_older_code(file, result)
    ]


def is_of_older_code(file: Path, result: dict) -> bool:
    """DistributedDataParallel's buckets, in whose place came reduction.LayerwiseDDP; and graphs
    that were recorded before Adam had its moments: PyTorch counts a graph's memory only then."""
    had_buckets = ("0054b1c50131", "c09c85ea5aef", "3fb0c6f14a68", "6ca7ee8d3e7a", "8cdd768b1492")
    is_ddp = result["plugin"] == "torch_ddp" and result["world_size"] > 1
    return (is_ddp and result["commit"] in had_buckets) or (
        bool(result.get("cuda_graph")) and file.parent == RECORDS
    )


def test_the_estimate_is_near_every_measured_peak():
    """Every plugin, 125m to 66b, 4 to 64 rows of 1,024 tokens, one GPU and two, tensor parallel and
    in stages, compiled or not, with and without the fused loss, LoRA, 4 bits, fp8, graphs, offload,
    checkpointing: within 10 %, most within 5 %."""
    ratios = {
        str(file.relative_to(RECORDS)): predicted.predicted(result).device
        / result["peak_memory_allocated_bytes"]
        for file, result in measured()
    }
    assert len(ratios) > 150
    outside = {name: ratio for name, ratio in ratios.items() if not 0.9 < ratio < 1.1}
    # fp8 compiled by torch 2.5.1, which keeps less of 350m and more of 1.3b than 2.11 does
    assert list(outside) == ["two_stacks/users.350m.fp8.json"] and max(outside.values()) < 1.2
    near = [ratio for ratio in ratios.values() if 0.95 < ratio < 1.05]
    assert len(near) > 0.7 * len(ratios)
