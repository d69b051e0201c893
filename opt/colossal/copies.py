"""The form of 16-bit weights with fp32 copies, which Adam updates: ColossalAI's
MixedPrecisionOptimizer, of hybrid_parallel without ZeRO.

[C4] In 0.5.0 it goes through the parameters one by one: widens a gradient, scales it, takes its
norm, updates, narrows the weight. Here each of these is one kernel for all, and the norm never
comes to the host. The update stays what it was; its state is kept where HybridAdam keeps it.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.distributed as dist
from colossalai.amp.naive_amp.mixed_precision_mixin import BF16MixedPrecisionMixin
from colossalai.tensor.d_tensor.api import is_distributed_tensor

from opt.colossal.adam import sums_of_squares
from opt.colossal.pieces import Form, Piece


@dataclass
class Updates:
    """What this process updates of a parameter group in one go."""

    parameters: list = field(default_factory=list)  # the model's own
    grads: list = field(default_factory=list)  # of this process's piece of each
    masters: list = field(default_factory=list)  # their fp32 copies
    outputs: list = field(default_factory=list)  # the same pieces in the model

    def add(self, parameter, grad, master, output) -> None:
        self.parameters.append(parameter)
        self.grads.append(grad)
        self.masters.append(master)
        self.outputs.append(output)


class Copies(Form):
    """Whole fp32 copies. In bf16 step() is ours; in fp16 it stays ColossalAI's."""

    def __init__(self, model, optimizer):
        super().__init__(model, optimizer)
        # Parts that are updated one after the other, by parameter group
        self._collected: list[list[Updates]] = []
        if self.is_bf16:
            optimizer.step = self.step

    @property
    def is_bf16(self) -> bool:
        """Whether gradients come without a loss scale."""
        return isinstance(self.optimizer.mixed_precision, BF16MixedPrecisionMixin)

    @property
    def max_norm(self) -> float:
        """What the global norm is clipped to; 0: it is not even taken."""
        return self.optimizer.max_norm

    def pieces(self) -> Iterator[Piece]:
        """Whole parameters, of this tensor-parallel rank."""
        for name, working in self.trained():
            key = self.optimizer.working_to_master_map[working]
            yield Piece(name, working.shape, 0, key.numel(), key, key.data.view(-1), None)

    # ---- the update

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Clip by the global norm, update the fp32 copies and the weights."""
        # What is to be updated, on the host; once run() is recorded it is always the same.
        if self.replay is None or not self.replay.is_recorded:
            self._collected = self.collect()
        adam = self.optimizer.optim
        adam.settle()
        for number, group in enumerate(adam.param_groups):
            masters = [master for part in self._collected for master in part[number].masters]
            if masters:
                adam.count(group, masters)
        norm = self.replay() if self.replay else self.run()
        if norm is not None:
            adam.counted_by(norm)
        self.optimizer._current_grad_norm = norm
        if self.replay is None:
            self._collected = []  # the gradients can go
        adam._opt_called = True  # or the schedule warns: it watches HybridAdam.step

    def run(self) -> torch.Tensor | None:
        """On the device: update what was collected. Returns the gradient's norm before clipping, if
        it is asked for."""
        divisor, norm, adam = 1.0, None, self.optimizer.optim
        if self.max_norm > 0:
            norm = self._norm()
            divisor = ((norm + 1e-6) / self.max_norm).clamp(min=1.0)
        for number, part in enumerate(self._collected):
            for group, batch in zip(adam.param_groups, part, strict=True):
                if batch.parameters:
                    adam.update_group(group, batch.masters, batch.grads, batch.outputs, divisor)
            self.updated(number)
        return norm

    def collect(self) -> list[list[Updates]]:
        """All parameters that have a gradient, in one part."""
        batches = []
        for group in self.optimizer.optim.param_groups:
            batches.append(Updates())
            for master in group["params"]:
                working = self.optimizer.master_to_working_map[master]
                if working.grad is not None:
                    batches[-1].add(working, working.grad, master, working.data)
        return [batches]

    def updated(self, part: int) -> None:
        """After the update of one of the parts."""

    # ---- the norm

    def _norm(self) -> torch.Tensor:
        """The L2 norm of the whole gradient over all processes, an fp32 scalar on the device."""
        batches = list(itertools.chain.from_iterable(self._collected))
        grads = [grad for batch in batches for grad in batch.grads]
        groups = self.norm_groups()
        squares = sums_of_squares(grads)
        if self.is_model_parallel:
            copies = tuple(
                self._holders(parameter) for batch in batches for parameter in batch.parameters
            )
            squares /= _on_device(copies, squares.device)
            groups += [
                group for group in (self.optimizer.tp_pg, self.optimizer.pp_pg) if group is not None
            ]
        square = squares.sum()
        for group in groups:
            dist.all_reduce(square, group=group)
        return square.sqrt()

    def norm_groups(self) -> list[dist.ProcessGroup]:
        """The data-parallel groups that gradients are spread over."""
        return []

    @property
    def is_model_parallel(self) -> bool:
        """Whether there are several tensor-parallel ranks or pipeline stages."""
        return self._size("tp_pg") * self._size("pp_pg") > 1

    def _size(self, group: str) -> int:
        # LowLevelZeroOptimizer has none, hybrid_parallel's optimizers may
        group = getattr(self.optimizer, group, None)
        return 1 if group is None else dist.get_world_size(group)

    def _holders(self, parameter: torch.Tensor) -> int:
        """How many processes of the tensor- and pipeline-parallel groups hold this very
        gradient."""
        holders = 1 if is_distributed_tensor(parameter) else self._size("tp_pg")
        for shared in self.optimizer.shared_params:
            # The tied embedding, on the first stage and the last
            if shared.get(self.optimizer.stage_manager.stage) is parameter:
                holders *= len(shared)
        return holders


@lru_cache(maxsize=4)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """As fp32; made once: while an update is recorded nothing can come from the host."""
    return torch.tensor(numbers, dtype=torch.float32).to(device, non_blocking=True)
