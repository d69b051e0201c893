"""How gradients, and ZeRO's weights, come together over the data-parallel processes: a decoder
layer at a time.

[C2] ColossalAI 0.5.0's LowLevelZeroOptimizer takes gradients one by one, each in a Python hook of
its own, 388 a step for OPT-350m: it puts them into a bucket, cuts them, flattens the bucket,
reduces the whole of it on every process (stage 1), and has the host wait for the GPU at the end.
Here a decoder layer's gradients are taken at once and reduced to the process that updates them,
half of what went over the wire, and nobody waits: a step of one of two processes, on one H100 with
collectives that do nothing, takes 91 ms instead of 114 (OPT-350m, 16 x 1024 tokens; 89 for a
process alone).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator
from colossalai.zero.low_level import LowLevelZeroOptimizer
from torch import nn
from torch.distributed.distributed_c10d import _coalescing_manager


class LayerwiseDDP:
    """What DistributedDataParallel does for a model, without its buckets: gradients are averaged as
    soon as backward has them, those of a decoder layer beside the backward of the layer before.

    [C14] A bucket is memory that forward has to do without: with torch_ddp on two H100 OPT-1.3b
    needs 33.9 GiB instead of 38.8 and is up to 2 % faster (16 x 1024 tokens a GPU).
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | None):
        """`model`: an OPTForCausalLM, in which the processes of `group` hold the same weights;
        None: all processes."""
        self._model, self._group, self._operation = model, group, _average(group)
        self._is_deferred, self._left, self._works = False, {}, []
        model.between_layers = self._between_layers

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let the gradients of backwards add up in each process, to be averaged with those of one
        outside of this."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def _between_layers(self, _, layer: nn.Module | None, hidden_states: torch.Tensor) -> None:
        if hidden_states.requires_grad and not self._is_deferred:
            hidden_states.register_hook(lambda _: self._reduce_layer(layer))

    def _reduce_layer(self, layer: nn.Module | None) -> None:
        if layer is None:  # behind the last one, where backward comes first
            self._left = dict.fromkeys(self._model.parameters())
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        else:
            self._reduce([p for p in layer.parameters() if p.grad is not None])

    def _finish(self) -> None:
        self._reduce([p for p in self._left if p.grad is not None])
        for work in self._works:
            work.wait()
        self._works.clear()

    @torch.no_grad()
    def _reduce(self, parameters: list[torch.Tensor]) -> None:
        if not parameters:  # of frozen ones there is nothing
            return
        for parameter in parameters:
            del self._left[parameter]
        grads = [p.grad for p in parameters]
        if self._operation == dist.ReduceOp.SUM:
            torch._foreach_div_(grads, dist.get_world_size(self._group))
        # In one call of NCCL, each where it is: to put them side by side first is a pass over
        # memory that the backward of the layer before waits for.
        with _coalescing_manager(self._group, async_ops=True) as work:
            for grad in grads:
                dist.all_reduce(grad, self._operation, self._group)
        self._works.append(work)


def _average(group: dist.ProcessGroup | None) -> dist.ReduceOp:
    """How `group` averages; gloo knows only sums, of what has been divided before."""
    return dist.ReduceOp.AVG if dist.get_backend(group) == "nccl" else dist.ReduceOp.SUM


class LayerwiseZero:
    """Averages gradients over the processes, those of a decoder layer as soon as backward has them,
    beside the backward of the layer before; and gathers the updated weights, beside the rest of the
    update and the next forward.

    With `recorded` what it does is part of CUDA graphs (opt/train/graphs.py), of which one ends
    with backward and another with the update: the gradients are always in the same place, and
    weights are all there when the update ends.

    `grads`: parameter -> this process's part of its gradient, flat and padded as ColossalAI cuts
    it; complete after finish(), on the stream that it was called in. Of several backwards without
    no_sync it is the sum. `parts`: all parameters, in parts that are to be updated and gathered in
    this order, each a list for each parameter group.
    """

    def __init__(self, optimizer: LowLevelZeroOptimizer, model: nn.Module, recorded: bool):
        """`model`: an OPTForCausalLM whose parameters `optimizer` updates, all of them in one
        data-parallel group."""
        (self.group,) = optimizer.pg_to_param_list
        self.grads: dict[torch.Tensor, torch.Tensor] = {}
        self._optimizer, self._stream, self._recorded = (
            optimizer,
            get_accelerator().Stream(),
            recorded,
        )
        # Where gradients that are reduced together always come to
        self._places: dict[tuple, torch.Tensor] = {}
        self._in_use: list[torch.Tensor] = []  # what the stream reads, until finish()
        parts, self._part_of_layer = _parts(model)
        groups = [
            set(optimizer._working_param_groups[number])
            for number in range(len(optimizer.optim.param_groups))
        ]
        self.parts = [[[p for p in part if p in group] for group in groups] for part in parts]
        self._arrivals = {}
        self._operation = _average(self.group)
        model.register_forward_pre_hook(lambda *_: self._await_weights(None))
        model.between_layers = self._between_layers

    def _between_layers(self, _, layer: nn.Module | None, hidden_states: torch.Tensor) -> None:
        if layer is not None:
            self._await_weights(layer)
            if hidden_states.requires_grad:
                hidden_states.register_hook(lambda _: self._reduce_layer(layer))

    def _reduce_layer(self, layer: nn.Module) -> None:
        parameters = [p for p in layer.parameters() if p.grad is not None]
        if parameters and self.is_on:
            self._reduce(parameters)

    @property
    def is_on(self) -> bool:
        """Whether backward reduces: not with those batches of an accumulating step of ZeRO stage 1
        that come before its last."""
        return self._optimizer.require_grad_sync

    def take_places(self) -> None:
        """After a backward that may have been replayed: its gradients are in their places."""
        for parameters, place in self._places.items():
            self._split(place, parameters)

    def finish(self) -> None:
        """Take what backward has left, and wait for all on the device."""
        left = [p for p in self._optimizer.pg_to_param_list[self.group] if p.grad is not None]
        for first, end in _runs([p.numel() for p in left]):
            self._reduce(left[first:end])
        get_accelerator().current_stream().wait_stream(self._stream)
        self._in_use.clear()

    @torch.no_grad()
    def _reduce(self, parameters: list[torch.Tensor]) -> None:
        """Average the gradients of `parameters`, each of which has one."""
        size = dist.get_world_size(self.group)
        # A row for each process: its part of every gradient, padded with zeros as ColossalAI pads
        # the parameter.
        parts = torch._chunk_cat([p.grad.flatten() for p in parameters], dim=0, num_chunks=size)
        for parameter in parameters:
            parameter.grad = None
        self._stream.wait_stream(get_accelerator().current_stream())
        if self._recorded:
            self._in_use.append(parts)
        elif parts.is_cuda:
            parts.record_stream(self._stream)
        with get_accelerator().stream(self._stream):
            adds = parameters[0] in self.grads
            own = (
                self._place(parameters, parts)
                if self._recorded and not adds
                else parts.new_empty(parts.shape[1])
            )
            if self._operation == dist.ReduceOp.SUM:
                parts.div_(size)
            dist.reduce_scatter_tensor(own, parts.view(-1), self._operation, self.group)
            if adds:
                for parameter, part in zip(
                    parameters, own.split(self._sizes(parameters)), strict=True
                ):
                    self.grads[parameter].add_(part)
            else:
                self._split(own, parameters)

    def _place(self, parameters: list[torch.Tensor], parts: torch.Tensor) -> torch.Tensor:
        key = tuple(parameters)
        if key not in self._places:
            self._places[key] = parts.new_empty(parts.shape[1])
        return self._places[key]

    def _split(self, own: torch.Tensor, parameters: Sequence[torch.Tensor]) -> None:
        self.grads |= zip(parameters, own.split(self._sizes(parameters)), strict=True)

    def _sizes(self, parameters: Sequence[torch.Tensor]) -> list[int]:
        size = dist.get_world_size(self.group)
        return [-(-p.numel() // size) for p in parameters]

    def gather(
        self, part: int, weights: Sequence[torch.Tensor], own_rows: Sequence[torch.Tensor]
    ) -> None:
        """Complete the weights of one of the parts, see gather(), before the first layer that needs
        them runs again."""
        self._stream.wait_stream(get_accelerator().current_stream())
        with get_accelerator().stream(self._stream):
            if self._recorded:
                # [C15] All in one call, each into its place: no copies (OPT-350m, two H100: 1.5 ms
                # instead of 2.3), and a host that has no part in it when it is replayed.
                with _coalescing_manager(self.group):
                    for weight, row in zip(weights, own_rows, strict=True):
                        dist.all_gather_into_tensor(weight.view(-1), row, self.group)
            else:
                gather(weights, own_rows, self.group)
                self._arrivals[part] = get_accelerator().Event()
                self._arrivals[part].record()
        if self._recorded and part == len(self.parts) - 1:
            get_accelerator().current_stream().wait_stream(self._stream)

    def _await_weights(self, layer: nn.Module | None) -> None:
        arrival = self._arrivals.pop(self._part_of_layer[layer], None)
        if arrival:
            arrival.wait()


def _parts(model: nn.Module) -> tuple[list[list[torch.Tensor]], dict[nn.Module | None, int]]:
    """`model`'s parameters in up to four parts of about the same size in the order in which forward
    needs them; and which of the parts a decoder layer needs, or, by None, what is outside the
    layers."""
    layers = list(model.own_layers)
    of_layers = {p for layer in layers for p in layer.parameters()}
    units = {None: [p for p in model.parameters() if p not in of_layers]} | {
        layer: list(layer.parameters()) for layer in layers
    }
    units = {unit: [p for p in all_ if p.requires_grad] for unit, all_ in units.items()}
    total = sum(p.numel() for parameters in units.values() for p in parameters)
    parts, part_of_unit, before = [], {}, 0
    for unit, parameters in units.items():
        if before * 4 >= total * len(parts):
            parts.append([])
        parts[-1] += parameters
        part_of_unit[unit] = len(parts) - 1
        before += sum(p.numel() for p in parameters)
    return parts, part_of_unit


@torch.no_grad()
def gather(
    weights: Sequence[torch.Tensor], own_rows: Sequence[torch.Tensor], group: dist.ProcessGroup
) -> None:
    """Fill `weights`, each with a row for each process of `group`, with what is in these;
    `own_rows`: this process's of each.

    [C15] Many tensors a call: one by one, even in one call of NCCL, OPT-350m's 388 keep the host
    busy for milliseconds. What one call has brought is put in its place while the next one is under
    way.
    """
    before = None
    for first, end in _runs([weight.numel() for weight in weights]):
        own = torch.cat(own_rows[first:end])
        gathered = own.new_empty(dist.get_world_size(group), own.numel())
        work = dist.all_gather_into_tensor(gathered.view(-1), own, group=group, async_op=True)
        if before:
            _put_in_place(*before)
        before = work, gathered, weights[first:end]
    _put_in_place(*before)


def _put_in_place(work: dist.Work, gathered: torch.Tensor, weights: Sequence[torch.Tensor]) -> None:
    work.wait()
    torch.split_with_sizes_copy(
        gathered, [weight.shape[1] for weight in weights], dim=1, out=weights
    )


RUN = 32 * 2**20  # elements


def _runs(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """Cut a list of tensors of so many elements each: (first, end) of what goes together, RUN
    elements or just over it."""
    first, elements = 0, 0
    for i, size in enumerate(sizes):
        elements += size
        if elements >= RUN or i == len(sizes) - 1:
            yield first, i + 1
            first, elements = i + 1, 0
