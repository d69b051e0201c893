"""LowLevelZeroOptimizer without the per-parameter overhead that holds up small steps (ColossalAI 0.5.0).

Measured on one H100, OPT-350m, 32 short rows a step: of a 390 ms step the GPU computed for 28 ms.
"""

from types import MethodType

import torch
import torch.distributed as dist

from . import light_imports  # noqa: F401  before colossalai
from colossalai.zero.low_level import LowLevelZeroOptimizer
from colossalai.zero.low_level.bookkeeping import BucketStore


def speed_up(optimizer) -> None:
    """Apply to a boosted optimizer, in place, if it is one of ZeRO's. The update stays what it was."""
    if not isinstance(optimizer, LowLevelZeroOptimizer):
        return
    _bucket_a_group(optimizer)
    if type(optimizer) is LowLevelZeroOptimizer:  # hybrid_parallel's own norm also knows about tensor parallelism
        optimizer._compute_grad_norm = MethodType(_grad_norm, optimizer)


def _bucket_a_group(optimizer: LowLevelZeroOptimizer) -> None:
    """Give each parameter group a gradient bucket of its own.

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


def _grad_norm(self, dp_pg, gradients, norm_type: int = 2) -> float:
    """The L2 norm of `gradients` over the processes of `dp_pg`: three kernels for all of them, not four for each."""
    if not gradients:
        return 0.0
    # In fp32: a bf16 sum of squares would be good to two digits.
    norms = torch._foreach_norm(gradients, norm_type, dtype=torch.float32)
    square = torch.stack(norms).square().sum()
    dist.all_reduce(square, group=dp_pg)
    return square.sqrt().item()
