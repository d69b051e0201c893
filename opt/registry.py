"""--plugin -> the class that answers for it: a line here and a file in opt/colossal make a plugin.

Nothing heavy is imported before a class is asked for: args.py reads the names.
"""

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
