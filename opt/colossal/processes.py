"""Processes and devices: who am I, what do I compute on, how do I talk to the others."""

import errno
import functools
import itertools
import os
import random
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import psutil
import torch
import torch.distributed as dist

from opt import limits
from opt.errors import UserError


@dataclass(frozen=True)
class Place:
    """This process among the others, from the variables that torchrun and `colossalai run` set."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0


@dataclass(frozen=True)
class Spread:
    """How the processes share the work, and this one's place among them. All but hybrid_parallel
    are data parallel alone."""

    dp_rank: int
    dp_size: int
    tp_rank: int = 0
    tp_size: int = 1
    tp_group: dist.ProcessGroup | None = None
    pp_rank: int = 0
    pp_size: int = 1
    is_last_stage: bool = True

    def counted(self, loss: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        """`loss`, or 0 where another process speaks for this data-parallel rank when losses are
        added up over all processes."""
        counts = self.is_last_stage and self.tp_rank == 0
        return loss.detach() if counts else torch.zeros((), device=device)


def place() -> Place:
    """Read the launcher's environment; without a launcher this is the only process. Raises
    UserError."""
    rank, world_size, local_rank = (
        _variable("RANK", 0),
        _variable("WORLD_SIZE", 1),
        _variable("LOCAL_RANK", 0),
    )
    if rank >= world_size:
        raise UserError(
            f"the environment says RANK {rank} of WORLD_SIZE {world_size}: ranks count from 0"
        )
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return Place(rank, world_size, local_rank, device)


def _variable(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or name == "WORLD_SIZE" and int(text) == 0:
        raise UserError(
            f"the environment variable {name} is '{text:.40}', not a number of processes: a "
            "launcher sets it"
        )
    return int(text)


def start(here: Place, mem_cap_gib: float = 0, timeout_minutes: float = 10) -> None:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and make this process's device
    ColossalAI's. Raises UserError.

    A collective that some process does not come to ends with an error after `timeout_minutes`, on
    every other one. So it does in groups that are made later: dist.new_group is replaced.
    """
    alone = _as_launched(here)
    _take_device(here, mem_cap_gib)
    global _timeout
    _timeout = 60 * timeout_minutes
    timeout = timedelta(minutes=timeout_minutes)
    if here.device.type == "cuda":
        dist.init_process_group("nccl", device_id=here.device, timeout=timeout, **alone)
    else:
        dist.init_process_group("gloo", timeout=timeout, **alone)
    # [F32] A new group does not take over the first one's timeout, and ColossalAI makes its groups
    # without naming any: they would wait for 30 minutes (gloo) or 10 (NCCL), whatever was asked
    # for.
    dist.new_group = functools.partial(dist.new_group, timeout=timeout)
    _introduce(here.world_size)


def _as_launched(here: Place) -> dict:
    """See that the environment has what a launcher sets; of the only process of a run without one,
    set it. What init_process_group is to be given besides."""
    variables = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
    missing = [name for name in variables if name not in os.environ]
    if not missing:
        if not os.environ["MASTER_PORT"].isdecimal():
            raise UserError(
                f"the environment variable MASTER_PORT is '{os.environ['MASTER_PORT']:.40}', not a "
                "port: a launcher sets it"
            )
        return {}
    if here.world_size > 1:  # MASTER_ADDR alone may be what a job's script says to all it starts
        raise UserError(
            f"WORLD_SIZE is {here.world_size}, but of the environment's variables "
            f"{' and '.join(missing)} {'are' if missing[1:] else 'is'} not set: use torchrun "
            "or colossalai run"
        )
    # It has its port from now on: of runs that begin side by side, two would find the same one
    # free, seconds before either takes it.
    store = dist.TCPStore("127.0.0.1", 0, world_size=1, is_master=True)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "RANK": "0",
        "WORLD_SIZE": "1",
    }
    return {"store": store, "rank": 0, "world_size": 1}


def _take_device(here: Place, mem_cap_gib: float) -> None:
    """Compute on this process's GPU, within `mem_cap_gib` if that is over 0, or on its share of the
    cores."""
    from colossalai.accelerator import set_accelerator

    from opt.colossal.cpu import use_cpu

    if here.device.type == "cuda":
        set_accelerator("cuda")
        torch.cuda.set_device(here.device)
        if mem_cap_gib:
            total = torch.cuda.get_device_properties(here.device).total_memory
            torch.cuda.set_per_process_memory_fraction(
                min(1.0, mem_cap_gib * 2**30 / total), here.device
            )
    else:
        use_cpu()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(threads(limits.cores(), processes, here.device.type))


def threads(cores: int, processes: int, device_type: str) -> int:
    """How many a process computes with on the CPU, where so many share so many cores.

    [C22] torchrun's own answer, one each, leaves cores idle, beside GPUs as well: an offloaded Adam
    works on them. There one core in eight is left to backward's thread and the driver. As many
    threads as cores wait for each other's turns: 7.7 ms for 8 Mi parameters that take 1.4 on half
    of the cores (64 beside an H200).
    """
    share = max(1, cores // processes)
    return share if device_type == "cpu" else share - share // 8


@dataclass(frozen=True)
class _Process:
    """One of the run's processes, and where it can be asked for."""

    host: str
    number: int  # on its host
    started: float
    address: str
    port: int


# By rank: known while all are there, asked for when one is lost.
_processes: list[_Process] = []
# A socket that nobody ever accepts from: the kernel answers for it as long as this process lives.
_ear: list[socket.socket] = []
_timeout = 600.0  # seconds that a collective waits


def _introduce(world_size: int) -> None:
    address, port = "", 0
    if world_size > 1:
        address, family = _own_address()
        _ear[:] = [socket.create_server((address, 0), family=family, backlog=512)]
        port = _ear[0].getsockname()[1]
    started = psutil.Process().create_time()
    own = _Process(socket.gethostname(), os.getpid(), started, address, port)
    _processes[:] = [own] * world_size
    if world_size > 1:
        dist.all_gather_object(_processes, own)


def _own_address() -> tuple[str, int]:
    """The address that this host has towards the first one, and its family. Nothing is sent."""
    goal = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    family, _, _, _, target = socket.getaddrinfo(*goal, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as s:
        s.connect(target)
        return s.getsockname()[0], family


def leave_word() -> None:
    """Before this process ends: that it has said why."""
    _in_time(lambda store: store.set(f"opt_has_said/{dist.get_rank()}", ""))


def silent_nodes() -> str | None:
    """Which nodes do not answer at all, in words; None if all do."""
    ranks_of: dict[str, list[int]] = {}
    for rank, process in enumerate(_processes):
        ranks_of.setdefault(process.host, []).append(rank)
    answers = _ask_all()
    silent = [
        f"{host} (rank {', '.join(map(str, ranks))})"
        for host, ranks in ranks_of.items()
        if all(answers[rank] == "silence" for rank in ranks)
    ]
    if not silent:
        return None
    do, its = ("does", "the node's") if len(silent) == 1 else ("do", "the nodes'")
    return f"{' and '.join(silent)} {do} not answer: {its} power or network is gone"


def killed_processes() -> str | None:
    """Which processes were killed, in words, None if none was; waits up to a second for one to be
    gone."""
    end = time.monotonic() + 1
    while True:
        gone = [rank for rank, answer in enumerate(_ask_all()) if answer == "gone"]
        if gone or time.monotonic() > end:
            break
        time.sleep(0.05)
    have_said = _in_time(
        lambda store: [rank for rank in gone if store.check([f"opt_has_said/{rank}"])]
    )
    silent = [rank for rank in gone if rank not in (have_said or ())]
    if not silent:
        return None
    here = socket.gethostname()
    names = " and ".join(
        f"rank {rank} (process {p.number}{'' if p.host == here else f' on {p.host}'})"
        for rank, p in ((rank, _processes[rank]) for rank in silent)
    )
    if have_said is None:  # the store is gone as well, as it is where rank 0 keeps it
        names += f" {'is' if len(silent) == 1 else 'are'} gone; what has not said why"
    return f"{names} was killed, most likely for host memory"


def _ask_all() -> list[str]:
    """Of each process: "there", "gone", or "silence" where its host does not answer in 2 s."""
    here = socket.gethostname()
    answers = [
        ("there" if _is_there(p.number, p.started) else "gone") if p.host == here else "silence"
        for p in _processes
    ]
    with selectors.DefaultSelector() as asked:
        for rank, process in enumerate(_processes):
            if process.host != here:
                family = socket.AF_INET6 if ":" in process.address else socket.AF_INET
                s = socket.socket(family, socket.SOCK_STREAM)
                s.setblocking(False)
                # Known at once to be out of reach, it would say so here alone.
                if s.connect_ex((process.address, process.port)) in (0, errno.EINPROGRESS):
                    asked.register(s, selectors.EVENT_WRITE, rank)
        end = time.monotonic() + 2
        while asked.get_map() and (left := end - time.monotonic()) > 0:
            for key, _ in asked.select(left):
                error = key.fileobj.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if error in (0, errno.ECONNREFUSED, errno.ECONNRESET):
                    answers[key.data] = "gone" if error else "there"
                asked.unregister(key.fileobj)
                key.fileobj.close()
        for key in list(asked.get_map().values()):
            key.fileobj.close()
    return answers


def _in_time(ask):
    """What `ask(store)` returns; None if the store of the process group does not answer within a
    second, or not at all."""
    answer = []

    def work():
        try:
            answer.append(ask(dist.distributed_c10d._get_default_store()))
        except RuntimeError:  # the process that kept it is gone
            pass

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(1)
    return answer[0] if answer else None


def _is_there(number: int, started: float) -> bool:
    try:
        process = psutil.Process(number)
        return process.create_time() == started and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


# [F37] What has to go before the process group: a CUDA graph with collectives of NCCL's in it, or
# that waits for ever to be taken down.
before_stop: list[Callable[[], None]] = []


def stop() -> None:
    """Leave the process group."""
    for let_go in before_stop:
        let_go()
    before_stop.clear()
    # [F36] torch 2.5.1 destroys a gloo group with Python's lock held, and waits for threads of the
    # group which may need that lock to free the last collective's tensors: destroyed within a
    # millisecond of a collective, two processes hang in one of 20 tries.
    time.sleep(0.1)
    dist.destroy_process_group()


def seed_everything(seed: int) -> None:
    """Seed every generator that dropout and shuffling draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def node_first(here: Place, work):
    """Run `work()` on the first process of each node; every process of the node gets its result, or
    its exception. The others wait for it as long as it takes.

    The result travels between processes, so it should be small: a path, not the data.
    """
    outcome = None
    with _at_work(here.world_size):
        if here.local_rank == 0 or not dist.is_initialized():
            try:
                outcome = (work(), None)
            except Exception as error:
                # Handed to the node's other processes, which would wait for ever otherwise
                outcome = (None, error)
    if dist.is_initialized():  # a dry run is one process, whatever the number that it plans for
        outcomes = [None] * here.world_size
        dist.all_gather_object(outcomes, outcome)
        # One node's failure ends every node's run.
        outcome = next((o for o in outcomes if o and o[1]), outcomes[here.rank - here.local_rank])
    result, error = outcome
    if error is not None:
        raise error
    return result


_BEAT = 5.0  # seconds between signs of life of a process at work
_works = itertools.count()


@contextmanager
def _at_work(world_size: int):
    """Within it this process gives signs of life; behind it, it has waited for all others: for
    hours, if they give such signs, and no longer than a collective waits if they do not. Then the
    collective that follows says what is wrong."""
    if world_size == 1 or not dist.is_initialized():
        yield
        return
    store = dist.distributed_c10d._get_default_store()
    name, done = f"opt_work/{next(_works)}", threading.Event()

    def beat():
        with suppress(RuntimeError):  # the process that keeps the store is gone
            while not done.wait(_BEAT):
                store.add(f"{name}/beats", 1)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    with suppress(RuntimeError):
        store.add(f"{name}/done", 1)
        _wait_for_all(store, name, world_size)


def _wait_for_all(store, name: str, world_size: int) -> None:
    beats, pause = 0, 0.002
    heard = asked = time.monotonic()
    while time.monotonic() - heard < _timeout and store.add(f"{name}/done", 0) < world_size:
        now = store.add(f"{name}/beats", 0)
        if now != beats:
            beats, heard = now, time.monotonic()
        elif time.monotonic() - asked > 1:
            if "gone" in _ask_all():
                return  # nobody has to wait for one that was killed
            asked = time.monotonic()
        time.sleep(pause)
        pause = min(1.5 * pause, 0.1)
