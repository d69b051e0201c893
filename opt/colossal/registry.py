"""--plugin -> the class that answers for it."""

from argparse import Namespace
from importlib import import_module

import torch

from opt.colossal.plugin import Plugin

_CLASSES = {
    "torch_ddp": "ddp.DDPPlugin",
    "torch_ddp_fp16": "ddp.DDPPlugin",
    "low_level_zero": "zero.ZeroPlugin",
    "gemini": "gemini.OptGeminiPlugin",
    "hybrid_parallel": "hybrid.HybridPlugin",
}


def plugin_class(name: str) -> type[Plugin]:
    """The class of --plugin `name`; it can be asked what needs no processes."""
    module, attribute = _CLASSES[name].split(".")
    return getattr(import_module(f"opt.colossal.{module}"), attribute)


def new_plugin(plan: Namespace, device: torch.device, num_parameters: int) -> Plugin:
    """The plugin that the plan asks for, for a model of so many parameters. Needs the process
    group."""
    return plugin_class(plan.plugin)(plan, device, num_parameters)
