"""How LowLevelZeroOptimizer's gradients come together over the data-parallel processes (ColossalAI 0.5.0).

ColossalAI takes gradients one by one, each in a Python hook of its own, 388 a step for OPT-350m: it puts them into a bucket, cuts
them, flattens the bucket, reduces the whole of it on every process (stage 1), and has the host wait for the GPU at the end. Here a
decoder layer's gradients are taken at once and reduced to the process that updates them, half of what went over the wire, and nobody
waits: a step of one of two processes, on one H100 with collectives that do nothing, takes 99 to 105 ms instead of 114 (OPT-350m,
16 x 1024 tokens; 89 for a process alone).
"""

import torch
import torch.distributed as dist
from torch import nn
from . import light_imports  # noqa: F401  before colossalai
from colossalai.accelerator import get_accelerator
from colossalai.zero.low_level import LowLevelZeroOptimizer
from colossalai.zero.low_level.bookkeeping import BucketStore
from torch.nn import functional as F


class LayerReduction:
    """Averages the gradients of a decoder layer as soon as backward has them, beside the backward of the layer before.

    `grads`: parameter -> this process's part of its gradient, flat and padded as ColossalAI cuts it; complete after backward, on the
    stream that backward was called in. Of several backwards without no_sync between two updates it is the sum.
    """

    def __init__(self, optimizer: LowLevelZeroOptimizer, model: nn.Module):
        """`model`: an OPTForCausalLM whose parameters `optimizer` updates, all of them in one data-parallel group."""
        stop_hooks(optimizer)
        (self.group,) = optimizer.pg_to_param_list
        self.grads: dict[torch.Tensor, torch.Tensor] = {}
        self._optimizer, self._stream = optimizer, get_accelerator().Stream()
        model.on_layer_grads = self._on_layer_grads
        optimizer._reduce_grad = self._finish

    def _on_layer_grads(self, layer: nn.Module, _) -> None:
        if self._optimizer.require_grad_sync:
            self._reduce(list(layer.parameters()))

    def _finish(self, partition_grad) -> None:
        """Take what is in no layer, and wait for all on the device."""
        self._reduce(self._optimizer.pg_to_param_list[self.group])
        get_accelerator().current_stream().wait_stream(self._stream)

    @torch.no_grad()
    def _reduce(self, parameters: list[torch.Tensor]) -> None:
        parameters = [p for p in parameters if p.grad is not None]
        if not parameters:
            return
        size = dist.get_world_size(self.group)
        # One row for each process: its part of every gradient.
        grads = [self._padded(p).view(size, -1) for p in parameters]
        parts = torch.cat(grads, dim=1)
        for parameter in parameters:
            parameter.grad = None
        self._stream.wait_stream(get_accelerator().current_stream())
        if parts.is_cuda:
            parts.record_stream(self._stream)
        with get_accelerator().stream(self._stream):
            own = parts.new_empty(parts.shape[1])
            dist.reduce_scatter_tensor(own, parts.div_(size).view(-1), group=self.group)
            for parameter, part in zip(parameters, own.split([grad.shape[1] for grad in grads]), strict=True):
                if parameter in self.grads:
                    self.grads[parameter].add_(part)
                else:
                    self.grads[parameter] = part

    def _padded(self, parameter: torch.Tensor) -> torch.Tensor:
        grad, padding = parameter.grad.reshape(-1), self._optimizer.get_param_padding_size(parameter)
        return F.pad(grad, (0, padding)) if padding else grad


def reduce_nothing(optimizer: LowLevelZeroOptimizer) -> None:
    """Leave gradients where backward puts them: there is no other process to reduce them with."""
    stop_hooks(optimizer)
    optimizer._partition_grads = False
    optimizer._reduce_grad = lambda partition_grad: None


def stop_hooks(optimizer: LowLevelZeroOptimizer) -> None:
    """Take away ColossalAI's hooks on parameters, and the host's wait for its stream after backward."""
    for hook in optimizer.grad_handles:
        hook.remove()
    optimizer._overlap_communication = False


def bucket_a_group(optimizer: LowLevelZeroOptimizer) -> None:
    """Give each parameter group a gradient bucket of its own, where ColossalAI's hooks stay.

    There is one for all, reduced whenever a gradient comes from another group than the last: with biases and matrices in
    different groups that is an all-reduce a parameter, 292 a step for OPT-350m.
    """
    for group, parameters in optimizer._working_param_groups.items():
        if group == 0:
            continue  # keeps the one that is there
        for process_group in list(optimizer.pg_to_param_list):
            own = [p for p in parameters if optimizer.param_to_pg[p] is process_group]
            store = BucketStore(process_group, optimizer._reduce_bucket_size)
            optimizer.pg_to_bucket_store[(process_group, group)] = store
            optimizer.pid_to_bucket_store |= {id(p): store for p in own}
