"""opt_train_demo.py in processes that share a GPU: NCCL wants a GPU for each, so they talk by gloo,
in host memory."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch.distributed as dist  # noqa: E402


def in_host_memory(collective):
    def run(output, own, *args, async_op=False, **kwargs):
        result = output.cpu()
        collective(result, own.cpu(), *args, **kwargs)
        output.copy_(result)
        return SimpleNamespace(wait=lambda: None)

    return run


if __name__ == "__main__":
    os.environ["LOCAL_RANK"] = "0"
    join = dist.init_process_group
    dist.init_process_group = lambda backend, timeout, **_: join("gloo", timeout=timeout)
    dist.reduce_scatter_tensor = in_host_memory(dist.reduce_scatter_tensor)
    dist.all_gather_into_tensor = in_host_memory(dist.all_gather_into_tensor)

    import opt_train_demo
    from args import train_parser

    opt_train_demo.main(train_parser().parse_args())
