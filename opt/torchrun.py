"""torchrun, which ends with the exit code of the process that failed, and without a report.

    python -m opt.torchrun --standalone --nproc_per_node 4 opt_train_demo.py ...

[F35] The processes say themselves what is wrong, once a node, and torchrun's 30 lines would bury
it. One that was killed says nothing; its exit code is 137, as in a shell. [F52] SIGUSR1, which
torchrun would die of, goes to the processes: they save, and all ends with exit code 0.
"""

import logging
import os
import signal
import sys

import psutil
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(arguments: list[str]) -> int:
    """The exit code."""
    args = run.parse_args(arguments)
    signal.signal(signal.SIGUSR1, _hand_on)
    # Or torchrun says so, and sets it to 1. What the processes compute with they choose by their
    # number, see processes.start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.disable(logging.ERROR)
    try:
        run.run(args)
    except ChildFailedError as error:
        # Those that were only left by others end with 1, or by torchrun's SIGTERM.
        rank, failure = min(
            error.failures.items(),
            key=lambda item: (item[1].exitcode in (1, -signal.SIGTERM), item[0]),
        )
        if failure.exitcode == -signal.SIGKILL:
            print(
                f"torchrun: rank {rank} (process {failure.pid}) was killed (exit code 137)",
                file=sys.stderr,
            )
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


def _hand_on(number: int, _) -> None:
    processes = psutil.Process().children()
    if not processes:
        raise SignalException("no process has started", signal.Signals(number))
    for process in processes:
        process.send_signal(number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
