"""One optimizer step and one evaluation, for every plugin, with pipeline stages and without."""

from contextlib import nullcontext

import torch
import torch.distributed as dist

from opt.colossal.plugins import Parallel
from opt.data.batches import Batch, Batches


def train_step(parallel: Parallel, model, optimizer, schedule, batches: list[Batch], max_norm: float = 0.0):
    """Forward and backward over `batches` (gradient accumulation), then one update.

    Every target token of the step weighs the same, whichever rank, batch or micro-batch it is in: each sum of losses is
    divided by the step's number of targets over all ranks, times the data-parallel size that the plugin's average divides by.
    With a `max_norm`, be it infinite, a step whose gradient is not finite changes nothing.

    Returns:
        (loss, grad_norm): this process's share of the step's mean loss before the update, a scalar on the device, to be
        summed over all processes; the global gradient norm before clipping, or None where the plugin does not give it.
    """
    share = torch.zeros((), device=_device())
    targets = sum(batch.targets for batch in batches)
    for i, batch in enumerate(batches):
        with parallel.accumulate(model, optimizer, is_last_batch=i == len(batches) - 1):
            loss = _forward(parallel, model, batch, parallel.dp_size / targets, optimizer)
        share += loss / parallel.dp_size
    if parallel.clips_in_step:
        grad_norm = optimizer.step(max_norm)
    else:
        optimizer.step()
        grad_norm = optimizer.get_grad_norm() if parallel.knows_grad_norm else None
    schedule.step()
    if parallel.graphed:
        parallel.graphed.zero_grad()
    else:
        optimizer.zero_grad()
    return share, grad_norm


@torch.no_grad()
def evaluate(parallel: Parallel, model, batches: Batches) -> float:
    """The mean loss over all target tokens of `batches`, the same value on every process."""
    model.eval()
    total, targets = torch.zeros((), device=_device(), dtype=torch.float64), 0
    # ColossalAI 0.5.0's execute_pipeline reduces the tied weights' gradients even where there are none, but for no_sync.
    with model.no_sync() if parallel.pp_size > 1 else nullcontext():
        for batch in batches.epoch():
            total += _forward(parallel, model, batch, 1.0)
            targets += batch.targets
    model.train()
    dist.all_reduce(total)
    return total.item() / targets


def _forward(parallel: Parallel, model, batch: Batch, weight: float, optimizer=None) -> torch.Tensor:
    """The batch's summed loss times `weight`, and its backward if there is an optimizer; 0 where this process does not
    count (see Parallel.counts_loss)."""
    if parallel.pp_size > 1:
        # The schedule takes the mean over the micro-batches; ours is a sum.
        microbatches = parallel.booster.plugin.scheduler.num_microbatches
        # Of a batch to be evaluated the last micro-batch may have fewer rows.
        parallel.expect_shape(batch.inputs["input_ids"].shape if optimizer is not None else None)
        result = parallel.booster.execute_pipeline(
            iter([batch.inputs]),
            model,
            lambda outputs, _: outputs["loss"] * (weight * microbatches),
            optimizer,
        )
        loss = result["loss"]
    elif parallel.graphed and optimizer is not None:
        loss = parallel.graphed(batch.inputs, weight)
    else:
        inputs = {name: t.to(_device(), non_blocking=True) for name, t in batch.inputs.items()}
        loss = forward_backward(parallel.booster, model, optimizer, inputs, weight)
    return loss.detach() if parallel.counts_loss else torch.zeros((), device=_device())


def forward_backward(booster, model, optimizer, inputs: dict[str, torch.Tensor], weight) -> torch.Tensor:
    """The loss of a batch on the device, summed and times `weight`; and its backward, if there is an optimizer."""
    loss = model(**inputs)["loss"] * weight
    if optimizer is not None:
        booster.backward(loss, optimizer)
    return loss.detach()


def _device() -> torch.device:
    from colossalai.accelerator import get_accelerator

    return get_accelerator().get_current_device()
