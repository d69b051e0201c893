"""ColossalAI's optimizers for bf16 weights with fp32 copies, without what holds up small steps and wastes memory (0.5.0).

LowLevelZeroOptimizer and MixedPrecisionOptimizer go through the parameters one by one: widen a gradient, scale it, take its
norm, update, narrow the weight, put it into a buffer. Here each of these is one kernel for all, the norm never comes to the
host, and a single data-parallel process has no buckets to fill. The update stays what it was; its state is kept where
HybridAdam keeps it.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import MethodType

import torch
import torch.distributed as dist
from colossalai.amp.naive_amp.mixed_precision_mixin import BF16MixedPrecisionMixin
from colossalai.amp.naive_amp.mixed_precision_optimizer import MixedPrecisionOptimizer
from colossalai.tensor.d_tensor.api import is_distributed_tensor
from colossalai.zero.low_level import LowLevelZeroOptimizer

from opt.colossal import reduction
from opt.colossal.adam import sum_of_squares
from opt.train.graphs import GraphedUpdate


def speed_up(model, optimizer, dp_size: int, own_update: bool = True, recorded: bool = False) -> None:
    """Apply to a boosted optimizer of `model`, in place, if it is one of these. Without `own_update` HybridAdam makes the update.

    `recorded`: forward, backward and update are CUDA graphs, see record().
    """
    if isinstance(optimizer, LowLevelZeroOptimizer):
        own_update = own_update and isinstance(optimizer.mixed_precision_mixin, BF16MixedPrecisionMixin)
        if not own_update or _is_model_parallel(optimizer):
            reduction.bucket_a_group(optimizer)
        elif dp_size == 1:
            reduction.reduce_nothing(optimizer)
        else:
            optimizer.reduction = reduction.LayerwiseZero(optimizer, model.unwrap(), recorded)
    elif isinstance(optimizer, MixedPrecisionOptimizer):
        own_update = own_update and isinstance(optimizer.mixed_precision, BF16MixedPrecisionMixin)
    else:
        return
    if own_update:
        optimizer.rows = {}
        optimizer.update = _Update(optimizer)
        optimizer.step = MethodType(_step, optimizer)


def _is_model_parallel(optimizer) -> bool:
    return _size(optimizer, "tp_pg") * _size(optimizer, "pp_pg") > 1


def _size(optimizer, group: str) -> int:
    group = getattr(optimizer, group, None)  # LowLevelZeroOptimizer has none, hybrid_parallel's optimizers may
    return 1 if group is None else dist.get_world_size(group)


@torch.no_grad()
def _step(self, closure=None) -> None:
    """Clip by the global norm, update the fp32 copies and the weights."""
    if isinstance(self, LowLevelZeroOptimizer) and not self.require_grad_sync:
        return
    self._current_grad_norm = self.update()
    self.optim._opt_called = True  # or the schedule warns: it watches HybridAdam.step


class _Update:
    """What _step does: collect() and count() on the host, run() on the device. Recorded, run() alone is replayed."""

    def __init__(self, optimizer):
        self._optimizer, self._is_zero = optimizer, isinstance(optimizer, LowLevelZeroOptimizer)
        self._reduction = getattr(optimizer, "reduction", None)
        self._graph: GraphedUpdate | None = None
        self._shares: list[list[_Share]] = []

    def record(self, pool, stream) -> None:
        """From now on, replay it."""
        self._graph = GraphedUpdate(self.run, pool, stream)

    def __call__(self) -> torch.Tensor | None:
        """The gradient's norm before clipping, if it was asked for."""
        is_recorded = self._graph is not None and self._graph.is_recorded
        if self._reduction:
            self._reduction.finish()
        if not is_recorded:
            self.collect()
        elif self._reduction:
            self._reduction.grads.clear()  # they are where they have been collected
        for number, group in enumerate(self._optimizer.optim.param_groups):
            masters = [master for part in self._shares for master in part[number].masters]
            if masters:
                self._optimizer.optim.count(group, masters)
        norm = self._graph() if self._graph else self.run()
        if not self._graph:
            self._shares = []  # their gradients can go
        return norm

    def collect(self) -> None:
        """What this process updates: a list of shares, one a parameter group, for each part."""
        self._parts = _update_parts(self._optimizer)
        self._shares = [_shares(self._optimizer, part) for part in self._parts]

    def run(self) -> torch.Tensor | None:
        """Update what was collected, and bring all weights together."""
        optimizer, divisor, norm = self._optimizer, 1.0, None
        max_norm = optimizer._clip_grad_norm if self._is_zero else optimizer.max_norm
        if max_norm > 0:
            norm = _grad_norm(optimizer, list(itertools.chain.from_iterable(self._shares)))
            divisor = ((norm + 1e-6) / max_norm).clamp(min=1.0)
        for number, part in enumerate(self._shares):
            for group, share in zip(optimizer.optim.param_groups, part, strict=True):
                if share.parameters:
                    optimizer.optim.update_group(group, share.masters, share.grads, share.outputs, divisor)
            if self._reduction:
                self._reduction.gather(number, *_all_rows(optimizer, itertools.chain.from_iterable(self._parts[number])))
        if self._is_zero and not self._reduction:
            for process_group, parameters in optimizer.pg_to_param_list.items():
                if dist.get_world_size(process_group) > 1:
                    reduction.gather(*_all_rows(optimizer, parameters), process_group)
        return norm


@dataclass
class _Share:
    """What this process updates of a parameter group."""

    parameters: list = field(default_factory=list)  # the model's own
    grads: list = field(default_factory=list)  # of this process's part of each
    masters: list = field(default_factory=list)  # their fp32 copies
    outputs: list = field(default_factory=list)  # the same parts in the model

    def add(self, parameter, grad, master, output) -> None:
        self.parameters.append(parameter)
        self.grads.append(grad)
        self.masters.append(master)
        self.outputs.append(output)


def _update_parts(optimizer) -> list[list[list[torch.Tensor]]]:
    """What is updated together, one after the other: the parameters of each group, by ZeRO the model's own, else their fp32 copies."""
    if hasattr(optimizer, "reduction"):
        return optimizer.reduction.parts
    if isinstance(optimizer, LowLevelZeroOptimizer):
        return [[optimizer._working_param_groups[number] for number in range(len(optimizer.optim.param_groups))]]
    return [[group["params"] for group in optimizer.optim.param_groups]]


def _shares(optimizer, part: list[list[torch.Tensor]]) -> list[_Share]:
    """A share for each parameter group of a part, of the parameters that have a gradient."""
    shares = [_Share() for _ in part]
    for number, (parameters, share) in enumerate(zip(part, shares, strict=True)):
        for parameter in parameters:
            if isinstance(optimizer, LowLevelZeroOptimizer):
                grad = _reduced_grad(optimizer, parameter, number)
                if grad is not None:
                    share.add(parameter, grad, optimizer.working_to_master_param[id(parameter)], _rows(optimizer, parameter)[1])
            else:
                working = optimizer.master_to_working_map[parameter]
                if working.grad is not None:
                    share.add(working, working.grad, parameter, working.data)
    return shares


def _reduced_grad(optimizer: LowLevelZeroOptimizer, working: torch.Tensor, group: int) -> torch.Tensor | None:
    if hasattr(optimizer, "reduction"):
        return optimizer.reduction.grads.pop(working, None)
    store = optimizer.pid_to_grad_store[id(working)]
    by_rank = store.get_partitioned_gradients_by_param_id(group, id(working))
    if not by_rank:
        return working.grad  # see reduction.reduce_nothing
    return by_rank[0 if optimizer._partition_grads else store.local_rank]


def _rows(optimizer: LowLevelZeroOptimizer, working: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight with a row for each process, and the row that this process updates: views, made once, or the host would be busy with
    them for milliseconds a step."""
    if working not in optimizer.rows:
        store = optimizer.pid_to_grad_store[id(working)]
        rows = optimizer._working_param_to_padded_working_param[working].view(store.world_size, -1)
        optimizer.rows[working] = rows, rows[store.local_rank]
    return optimizer.rows[working]


def _all_rows(optimizer: LowLevelZeroOptimizer, parameters: Iterable[torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
    """All weights as _rows() gives them, and all rows that this process updates."""
    return zip(*(_rows(optimizer, working) for working in parameters), strict=True)


def _grad_norm(optimizer, shares: list["_Share"]) -> torch.Tensor:
    """The L2 norm of the whole gradient over all processes, an fp32 scalar on the device."""
    grads = [grad for share in shares for grad in share.grads]
    groups = list(optimizer.pg_to_param_list) if isinstance(optimizer, LowLevelZeroOptimizer) else []
    if _is_model_parallel(optimizer):
        copies = [_copies(optimizer, parameter) for share in shares for parameter in share.parameters]
        squares = torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32)).square()
        square = (squares / torch.tensor(copies, dtype=torch.float32).to(squares.device, non_blocking=True)).sum()
        groups += [group for group in (optimizer.tp_pg, optimizer.pp_pg) if group is not None]
    else:
        square = sum_of_squares(grads)
    for group in groups:
        dist.all_reduce(square, group=group)
    return square.sqrt()


def _copies(optimizer, parameter: torch.Tensor) -> int:
    """How many processes of the tensor- and pipeline-parallel groups hold this very gradient."""
    copies = 1 if is_distributed_tensor(parameter) else _size(optimizer, "tp_pg")
    for shared in optimizer.shared_params:  # the tied embedding, on the first stage and the last
        if shared.get(optimizer.stage_manager.stage) is parameter:
            copies *= len(shared)
    return copies
