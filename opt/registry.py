"""--plugin -> the class that answers for it: a line here and a file in opt/colossal make a plugin.

Nothing heavy is imported before a class is asked for: args.py reads the names.
"""

from collections.abc import Iterator
from importlib import import_module

PLUGINS = {
    "torch_ddp": "ddp.DDPPlugin",
    "torch_ddp_fp16": "ddp.DDPPlugin",
    "low_level_zero": "zero.ZeroPlugin",
    "gemini": "gemini.OptGeminiPlugin",
    "hybrid_parallel": "hybrid.HybridPlugin",
}


def plugin_class(name: str) -> type:
    """The subclass of opt.colossal.plugin.Plugin for --plugin `name`; it can be asked what needs no
    processes."""
    module, attribute = PLUGINS[name].split(".")
    return getattr(import_module(f"opt.colossal.{module}"), attribute)


def new_plugin(plan, device, num_parameters: int):
    """The plugin that the plan asks for, on this process's torch.device, for a model of so many
    parameters. Needs the process group."""
    return plugin_class(plan.plugin)(plan, device, num_parameters)


def ways_to_hold(gpus: int, bf16: bool) -> Iterator[tuple[str, dict, str]]:
    """(plugin, its flags, why): where weights, gradients and optimizer can be, on so many GPUs in
    all, the fastest first (docs/measured.md)."""
    in_chunks = {"cuda_graph": False}  # which move in memory
    if not bf16:
        yield "torch_ddp", {}, "the fastest without bf16"
    yield "low_level_zero", {}, "the fastest"
    if gpus > 1:
        yield "low_level_zero", {"zero_stage": 2}, "gradients are spread too"
        yield "gemini", in_chunks, "weights are spread too"
    if gpus & (gpus - 1) == 0:  # or its processes would cut moments within a scale's block
        yield (
            "low_level_zero",
            {"optim": "adamw_8bit"},
            "without fp32 copies, its moments in 8 bits",
        )
    on_host = in_chunks | {"offload_optim_frac": 1.0}
    yield "gemini", on_host, "Adam is in host memory"
    yield (
        "gemini",
        on_host | {"optim": "adamw_anyprecision"},
        "Adam is in host memory, without fp32 copies, its moments in 16 bits",
    )
    for size in (2, 4, 8):
        if gpus % size == 0:
            yield "hybrid_parallel", {"tp_size": size}, "each GPU has a part of each layer"
