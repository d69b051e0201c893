"""Between two steps: signals that stop a run, and what all processes decide together."""

import os
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist

from opt.colossal.processes import Place

# USR1: what SLURM can send some time before it ends a job
STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGUSR1,
)
# torchrun hands a signal on to processes that Ctrl-C, or a scheduler, has sent it to as well:
# within this time it is the same.
_SAME_SIGNAL_SECONDS = 2.0
_NO_MORE = 0  # no signal's number


class Control:
    """Made by all processes together. From then on the first signal is a wish, which agree() passes
    on; a second one stops the process at once, also in the middle of a collective that hangs. Until
    close()."""

    def __init__(self, here: Place):
        # On the host and apart from the training's own: nothing here waits for a GPU.
        self.group = dist.new_group(backend="gloo") if here.world_size > 1 else None
        self.signal: signal.Signals | None = None
        self._received_at = 0.0
        read, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        signal.set_wakeup_fd(self._pipe)
        # The pipe has them; without a handler of Python's it would not
        self._before = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
        self._watcher = threading.Thread(target=self._watch, args=(read,), daemon=True)
        self._watcher.start()

    def agree(self, **values: int) -> dict[str, int]:
        """The largest of each value over all processes."""
        if self.group is None:
            return values
        largest = torch.tensor(list(values.values()))
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        return dict(zip(values, largest.tolist(), strict=True))

    def gather(self, value) -> list:
        """Every process's `value`, by rank."""
        if self.group is None:
            return [value]
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self.group)
        return values

    def close(self) -> signal.Signals | None:
        """Once all is saved: from now on a signal does what it did before. Returns the one that
        came too late for agree(), after which nothing more is to be begun."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.write(self._pipe, bytes([_NO_MORE]))  # behind what has come and is not read yet
        self._watcher.join()
        return self.signal

    def _watch(self, pipe: int) -> None:
        """Runs in a thread of its own, since Python calls handlers only when the main thread comes
        back from C."""
        while (number := os.read(pipe, 1)[0]) != _NO_MORE:
            now = time.monotonic()
            if number not in STOP_SIGNALS:
                continue
            number = signal.Signals(number)
            if self.signal is None:
                self.signal, self._received_at = number, now
            elif now - self._received_at > _SAME_SIGNAL_SECONDS:
                print(
                    f"second signal ({number.name}): stopped at once, nothing saved",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(128 + number)
