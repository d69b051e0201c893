"""The form of 16-bit (or fp32) weights whose fp32 copies and Adam's moments are spread over the
data-parallel ranks, a slice of each parameter on each rank: ColossalAI's LowLevelZeroOptimizer, of
low_level_zero and of hybrid_parallel with ZeRO."""

import itertools
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from colossalai.amp.naive_amp.mixed_precision_mixin import BF16MixedPrecisionMixin
from colossalai.zero.low_level.bookkeeping import BucketStore

from opt.colossal import reduction
from opt.colossal.copies import Copies, Updates
from opt.colossal.pieces import Piece


class Sharded(Copies):
    """Slices of fp32 copies. In bf16 step() is ours, and a decoder layer's gradients are reduced
    together (reduction.LayerwiseZero)."""

    def __init__(self, model, optimizer, dp_size: int, recorded: bool):
        """`recorded`: forward, backward and update are CUDA graphs."""
        super().__init__(model, optimizer)
        self._rows_of: dict[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] = {}
        self.reduction = None
        if not self.is_bf16 or self.is_model_parallel:
            _bucket_a_group(optimizer)
        elif dp_size == 1:
            # Gradients stay where backward puts them: there is no other process to reduce them with
            _stop_hooks(optimizer)
            optimizer._partition_grads = False
        else:
            _stop_hooks(optimizer)
            self.reduction = reduction.LayerwiseZero(optimizer, model.unwrap(), recorded)

    @property
    def is_bf16(self) -> bool:
        """Whether gradients come without a loss scale, and are not fp32."""
        return isinstance(self.optimizer.mixed_precision_mixin, BF16MixedPrecisionMixin)

    @property
    def max_norm(self) -> float:
        """What the global norm is clipped to; 0: it is not even taken."""
        return self.optimizer._clip_grad_norm

    def pieces(self) -> Iterator[Piece]:
        """A slice of each parameter, which may reach past its end."""
        for name, working in self.trained():
            key, group = (
                self.optimizer.working_to_master_param[id(working)],
                self.optimizer.param_to_pg[working],
            )
            yield Piece(
                name,
                working.shape,
                dist.get_rank(group) * key.numel(),
                key.numel(),
                key,
                key.data.view(-1),
                group,
            )

    # ---- the update

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Clip by the global norm, update the slices, and bring all weights together."""
        if not self.optimizer.require_grad_sync:
            return
        if self.reduction:
            self.reduction.finish()
        super().step()
        if self.reduction and self.replay:
            self.reduction.grads.clear()  # taken by collect() when it was recorded

    def collect(self) -> list[list[Updates]]:
        """What this process updates: by part, and by parameter group."""
        groups = range(len(self.optimizer.optim.param_groups))
        self._parts = (
            self.reduction.parts
            if self.reduction
            else [[self.optimizer._working_param_groups[number] for number in groups]]
        )
        collected = []
        for part in self._parts:
            collected.append([Updates() for _ in groups])
            for number, parameters in enumerate(part):
                for parameter in parameters:
                    grad = self._reduced_grad(parameter, number)
                    if grad is not None:
                        master = self.optimizer.working_to_master_param[id(parameter)]
                        collected[-1][number].add(parameter, grad, master, self._rows(parameter)[1])
        return collected

    def updated(self, part: int) -> None:
        """Bring the part's weights together, from all processes."""
        if self.reduction:
            self.reduction.gather(
                part, *self._all_rows(itertools.chain.from_iterable(self._parts[part]))
            )
            return
        for group, parameters in self.optimizer.pg_to_param_list.items():
            if dist.get_world_size(group) > 1:
                reduction.gather(*self._all_rows(parameters), group)

    def norm_groups(self) -> list[dist.ProcessGroup]:
        """The data-parallel groups that gradients are spread over."""
        return list(self.optimizer.pg_to_param_list)

    def _reduced_grad(self, working: torch.Tensor, group: int) -> torch.Tensor | None:
        if self.reduction:
            return self.reduction.grads.pop(working, None)
        store = self.optimizer.pid_to_grad_store[id(working)]
        by_rank = store.get_partitioned_gradients_by_param_id(group, id(working))
        if not by_rank:
            return working.grad  # of the only process
        return by_rank[0 if self.optimizer._partition_grads else store.local_rank]

    def _rows(self, working: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A weight with a row for each process, and the row that this process updates: views, made
        once, or the host would be busy with them for milliseconds a step."""
        if working not in self._rows_of:
            store = self.optimizer.pid_to_grad_store[id(working)]
            rows = self.optimizer._working_param_to_padded_working_param[working].view(
                store.world_size, -1
            )
            self._rows_of[working] = rows, rows[store.local_rank]
        return self._rows_of[working]

    def _all_rows(self, parameters: Iterable[torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
        """All weights as _rows() gives them, and all rows that this process updates."""
        return zip(*(self._rows(working) for working in parameters), strict=True)


def _stop_hooks(optimizer) -> None:
    """[C2] Take away ColossalAI's hooks on parameters, and what follows backward: the rest of the
    reduction, the host's wait for its stream."""
    optimizer._reduce_grad = lambda partition_grad: None
    for hook in optimizer.grad_handles:
        hook.remove()
    optimizer._overlap_communication = False


def _bucket_a_group(optimizer) -> None:
    """Give each parameter group a gradient bucket of its own, where ColossalAI's hooks stay.

    [C3] There is one for all, reduced whenever a gradient comes from another group than the last:
    with biases and matrices in different groups that is an all-reduce a parameter, 292 a step for
    OPT-350m.
    """
    for group, parameters in optimizer._working_param_groups.items():
        if group == 0:
            continue  # keeps the one that is there
        for process_group in list(optimizer.pg_to_param_list):
            own = [p for p in parameters if optimizer.param_to_pg[p] is process_group]
            store = BucketStore(process_group, optimizer._reduce_bucket_size)
            optimizer.pg_to_bucket_store[(process_group, group)] = store
            optimizer.pid_to_bucket_store |= {id(p): store for p in own}
