"""From arguments to something that trains: the order in which ColossalAI wants its parts."""

from argparse import Namespace
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import OPTConfig

from opt.colossal import gemini, mixed_precision, plugins, processes, state
from opt.colossal.adam import build_optimizer
from opt.colossal.new_model import build_model
from opt.model import fp8, linear, weights
from opt.model.config import DTYPES
from opt.model.kernel_probe import has_kernel
from opt.model.opt import compile_layers
from opt.train import graphs, step
from opt.train.schedule import build_schedule


@dataclass
class Built:
    """A boosted model with its weights in place, the optimizer that updates it, and how the work is spread."""

    parallel: plugins.Parallel
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    shapes: dict[str, torch.Size]  # of the named parameters in the whole model, unsplit and unpadded


def build(
    args: Namespace,
    here: processes.Place,
    config: OPTConfig,
    contents: weights.Weights,
    learning_rate: float,
    warmup_steps: int,
    total_steps: int,
) -> Built:
    """Booster, model, optimizer, schedule, boost, weights; needs the process group. `args`: resolved by args.resolve."""
    parallel = plugins.build_booster(args, here.device, contents.num_parameters)
    # The ranks of a tensor-parallel group hold parts of the same activations and must drop the same ones; all others differ.
    processes.seed_everything(args.seed + parallel.dp_rank * parallel.pp_size + parallel.pp_rank)
    dtype = DTYPES["fp32" if args.plugin.startswith("torch_ddp") else args.precision]
    model = build_model(config, args.plugin, dtype, here.device, args.grad_checkpoint, args.fused_loss)
    adam = build_optimizer(model, learning_rate, args.weight_decay, args.adam_kernel)
    schedule = build_schedule(adam, warmup_steps, total_steps)
    model, adam = parallel.boost(model, adam)
    gemini.speed_up(model)
    mixed_precision.speed_up(model, adam, parallel.dp_size, own_update=args.adam_kernel == "torch", recorded=args.cuda_graph)
    if parallel.knows_grad_norm:
        adam.optim.find_norm = adam.get_grad_norm
    if args.fp8:
        fp8.use_fp8(model.unwrap().own_layers)
    elif here.device.type == "cuda" and not args.compile:
        linear.speed_up(model.unwrap().own_layers)
    if args.compile:
        compile_layers(model.unwrap(), saves_memory=not args.cuda_graph)  # recorded steps are short ones
    # After boost: only now does the plugin know this process's share of each tensor.
    weights.place(model, contents)
    model.train()
    shapes = {name: torch.Size(contents.shape(name)) for name in contents}
    built = Built(parallel, model, adam, schedule, shapes)
    state.fill_copies(built, contents)
    if args.cuda_graph:
        run = partial(step.forward_backward, parallel.booster, model, adam)
        parallel.graphed = graphs.GraphedBackward(run, list(model.parameters()), getattr(adam, "reduction", None))
        if hasattr(adam, "update") and has_kernel("update", here.device, dtype, dtype) and has_kernel("norm", here.device, dtype):
            adam.update.record(parallel.graphed.pool, parallel.graphed.stream)
    return built
