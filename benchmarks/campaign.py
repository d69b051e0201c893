"""Measure the list in benchmarks/measurements.py, plugins and peers, on the machine that is here.

    python benchmarks/campaign.py                               all that its GPUs have room for
    python benchmarks/campaign.py --minutes 9 --side_by_side    a part, one on each GPU at a time
    python benchmarks/campaign.py --only '1.3b-16-*' '*lora*'   by name (measurements.py)
    python benchmarks/campaign.py --list                        what is left to measure

A result is one line of benchmarks/results/DATE-one-h100.jsonl (-two-, -four-: the GPUs it used), a
failure too. What is there of this commit is not measured again: ended by Ctrl-C, by --minutes or
by the machine's end, the same command goes on. On another machine of the same GPUs it begins with
what the host decides, and measures that once more. benchmarks/report.py draws tables and plots.
"""

import argparse
import contextlib
import datetime
import fnmatch
import importlib
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a fork is safe ahead of CUDA alone
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")  # as torch has it from 2.6 on

HERE = Path(__file__).resolve().parent
REPO = HERE.parent
sys.path.insert(0, str(REPO))

import psutil  # noqa: E402

from benchmarks import records, report  # noqa: E402
from benchmarks.measurements import MEASUREMENTS, Measurement  # noqa: E402
from benchmarks.peers import ENGINES  # noqa: E402
from opt import installed  # noqa: E402

COUNTS = {1: "one", 2: "two", 4: "four", 8: "eight"}
OPT_IN_TRANSFORMERS = "transformers.models.opt.modeling_opt"
BOOT = Path("/proc/sys/kernel/random/boot_id")
# Seconds, by GPUs, within which nothing would come out that has not begun
AT_LEAST = {1: 15, 2: 20, 4: 30, 8: 40}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="PATTERN",
        default=["*"],
        help="names of what is measured, with * and ?; default all",
    )
    parser.add_argument(
        "--side_by_side",
        action="store_true",
        help="one measurement on each GPU at a time, with its share of the cores: sooner done, "
        "where the host decides slower; default one after the other",
    )
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="end by then; default no limit"
    )
    parser.add_argument(
        "--timeout", type=float, default=150, help="seconds that each may take; default 150"
    )
    parser.add_argument(
        "--retry", action="store_true", help="measure what has failed once more; default off"
    )
    parser.add_argument(
        "--out", type=Path, default=HERE / "results", help="folder; default benchmarks/results"
    )
    parser.add_argument(
        "--logs",
        type=Path,
        default=REPO / "benchmark_results" / "campaign",
        help="folder of what each printed; default benchmark_results/campaign",
    )
    parser.add_argument(
        "--commit", help="of this code; default git's, which a copy without .git does not have"
    )
    parser.add_argument(
        "--demo_model", default="facebook/opt-350m", help="the demo's; default facebook/opt-350m"
    )
    parser.add_argument(
        "--demo_dataset",
        default="hugginglearners/netflix-shows",
        help="the demo's; default hugginglearners/netflix-shows",
    )
    parser.add_argument(
        "--flags",
        default="",
        help="more for every process but the demo's, in quotes: '--dropout 0'; default none",
    )
    parser.add_argument(
        "--launch",
        action="store_true",
        help="start each as a user does, not forked off a process that has imported everything: "
        "slower, and all have a first step of their own; default off",
    )
    parser.add_argument("--list", action="store_true", help="print what is left, measure nothing")
    args = parser.parse_args()
    installed.check()
    args.out, args.logs = args.out.resolve(), args.logs.resolve()
    os.chdir(REPO)
    commit = args.commit or commit_of_code()
    if not commit:
        parser.error("this is no git checkout: say --commit, which the results are kept under")

    machine = Machine.here()
    wanted = [m for m in MEASUREMENTS if any(fnmatch.fnmatch(m.name, p) for p in args.only)]
    if not wanted:
        parser.error(f"--only {' '.join(args.only)}: benchmarks/measurements.py has none of these")
    here = [m for m in wanted if m.on_cpu == (not machine.gpus)]
    fitting = [m for m in here if machine.has_room_for(m)]
    if args.launch:
        fitting = [replace(m, launched=True) for m in fitting]
    campaign = Campaign(args, commit, machine)
    again = [m for m in fitting if campaign.is_to_be_seen_on_another_host(m)]
    missing = [m for m in fitting if not campaign.is_done(m)]
    print(
        f"campaign: {len(here)} measurements, {len(here) - len(fitting)} for more or other than "
        f"{machine.processes} GPUs, {len(fitting) - len(missing)} done, {len(again)} of them once "
        f"more on this host; {machine.device}, commit {commit}, results in "
        f"{args.out}/{campaign.file(1).name}",
        flush=True,
    )
    missing = again + missing
    if args.list:
        for m in missing:
            print(f"{m.name:32} {campaign.command(m)}")
        return
    # So that what is under way ends as well
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        campaign.measure(missing)
    finally:
        campaign.end()


def commit_of_code() -> str:
    """opt.installed.commit, but for the results, which a campaign changes itself."""
    commit = installed.commit()
    code = "git -c safe.directory=* diff --quiet HEAD -- . :!benchmarks/results".split()
    if commit.endswith("+") and not subprocess.run(code, cwd=REPO).returncode:
        return commit.removesuffix("+")
    return commit


@dataclass(frozen=True)
class Machine:
    """What is here."""

    device: str
    gpus: tuple[str, ...]  # as CUDA_VISIBLE_DEVICES has them; none on a CPU
    gib: float  # of each
    cores: tuple[int, ...]
    host: dict

    @classmethod
    def here(cls) -> "Machine":
        names = []
        if shutil.which("nvidia-smi"):
            ask = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total"]
            ask.append("--format=csv,noheader,nounits")
            said = subprocess.run(ask, capture_output=True, text=True)
            names = said.stdout.splitlines() if not said.returncode else []
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = [str(i) for i in range(len(names))] if visible is None else visible.split(",")
        gpus = tuple(gpu for gpu in gpus if names and gpu)
        name, driver, mib = names[0].split(", ") if gpus else ("CPU", "", 0)
        cores = tuple(sorted(os.sched_getaffinity(0)))
        cpu = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        host = {
            "cpu": cpu[0] if cpu else platform.machine(),
            "cores": len(cores),
            "memory_bytes": psutil.virtual_memory().total,
            "gpus": len(gpus),
            "driver": driver,
            "system": platform.platform(),
            # By which one machine is told from another
            "boot": BOOT.read_text()[:8] if BOOT.is_file() else socket.gethostname(),
        }
        return cls(name, gpus, float(mib) / 1024, cores, host)

    @property
    def processes(self) -> int:
        """The most that run at a time: one a GPU, and two on a CPU, where they are for trying."""
        return len(self.gpus) or 2

    def has_room_for(self, m: Measurement) -> bool:
        """Whether it can run here."""
        least, most = m.gib
        return m.gpus <= self.processes and (m.on_cpu or least <= self.gib < most)

    @property
    def short_name(self) -> str:
        """h100 for an NVIDIA H100 80GB HBM3."""
        name = re.sub(r"\b(NVIDIA|SXM\d?|PCIe|\d+ ?GB|HBM\d\w*|NVL)\b", "", self.device)
        return "-".join(re.findall(r"[a-z0-9]+", name.lower()))

    def cores_of(self, slots: list[int]) -> tuple[int, ...]:
        """Of all cores the share of these GPUs."""
        share = max(1, len(self.cores) // self.processes)
        return (
            tuple(c for i in slots for c in self.cores[i * share : (i + 1) * share]) or self.cores
        )


@dataclass
class Running:
    """A measurement under way."""

    measurement: Measurement
    slots: list[int]  # of the machine's GPUs
    cores: tuple[int, ...]
    beside: int  # others that ran when it began
    began: float = field(default_factory=time.time)
    pids: dict[int, int | None] = field(default_factory=dict)  # its processes -> wait's status
    launched: subprocess.Popen | None = None  # held: one that is let go of is waited for by Python

    @property
    def status(self) -> int | None:
        """The exit code, None while one runs and none has failed."""
        codes = [None if s is None else os.waitstatus_to_exitcode(s) for s in self.pids.values()]
        # The others only lost the one that failed
        bad = sorted((c for c in codes if c), key=lambda c: (c in (1, -signal.SIGTERM), c))
        if bad:
            return bad[0] if bad[0] > 0 else 128 - bad[0]
        return None if None in codes else 0


class Campaign:
    """What is measured on this machine at this commit."""

    def __init__(self, args, commit: str, machine: Machine):
        self.args, self.commit, self.machine = args, commit, machine
        self._begun = time.monotonic()
        self._running: list[Running] = []
        self._ready = False  # whether this process has imported what the measurements need
        self.date = self._first_day()
        self._before: dict[tuple, list[dict]] = {}  # of each measurement what is there
        for gpus in COUNTS:
            for line in records.lines(self.file(gpus)):
                self._keep(line)

    def _first_day(self) -> str:
        """A campaign's date: of its first result, whatever day and machine the others are of."""
        for file in sorted(self.args.out.glob("????-??-??-*.jsonl")):
            if any(line["commit"] == self.commit for line in records.lines(file)):
                return file.name[:10]
        return str(datetime.date.today())

    def file(self, gpus: int) -> Path:
        """Where results on so many GPUs go."""
        return self.args.out / f"{self.date}-{COUNTS[gpus]}-{self.machine.short_name}.jsonl"

    def command(self, m: Measurement) -> str:
        """What a user would type for it."""
        if m.engine == "demo":
            given = {"MODEL": self.args.demo_model, "DATASET": self.args.demo_dataset}
            given |= {"GPUNUM": str(m.gpus)}
            names = [f"{name}={shlex.quote(value)}" for name, value in given.items()]
            return " ".join([*names, "bash run_demo.sh", *m.flags])
        launcher = f"-m opt.torchrun --standalone --nproc_per_node {m.gpus} " if m.gpus > 1 else ""
        return f"python {launcher}{shlex.join([*self._script(m), *self._flags(m)])}"

    def _script(self, m: Measurement) -> list[str]:
        is_peer = m.engine in ENGINES
        peer = ["benchmarks/peers.py", "--engine", m.engine]
        return peer if is_peer else ["opt_benchmark.py", "--plugin", m.engine]

    def _flags(self, m: Measurement) -> list[str]:
        return [*m.flags, *(shlex.split(self.args.flags) if m.engine != "demo" else [])]

    def is_done(self, m: Measurement) -> bool:
        lines = self._found(m)
        if not lines or lines[-1].get("status") == "not installed":
            return False
        return not (self.args.retry and "status" in lines[-1])

    def is_to_be_seen_on_another_host(self, m: Measurement) -> bool:
        """Whether the host decides it, and this is not the only one that it was measured on."""
        lines = self._found(m)
        hosts = {line["host"]["boot"] for line in lines} | {self.machine.host["boot"]}
        return len(lines) == 1 and len(hosts) == 2 and report.is_decided_by_host(lines[0])

    def _found(self, m: Measurement) -> list[dict]:
        return self._before.get((self.commit, self._key(m)), [])

    def _keep(self, line: dict) -> None:
        self._before.setdefault((line["commit"], line["command"]), []).append(line)

    def _key(self, m: Measurement) -> str:
        # A launched one is another measurement than the same command forked off.
        return "time " * m.launched + self.command(m)

    def measure(self, missing: list[Measurement]) -> None:
        """All of them, in their order, as many at a time as there are GPUs for."""
        self.args.logs.mkdir(parents=True, exist_ok=True)
        self.args.out.mkdir(parents=True, exist_ok=True)
        left, total = list(missing), len(missing)
        while left or self._running:
            while (m := self._next(left)) and (slots := self._free(m)) is not None:
                left.remove(m)
                self._start(m, slots)
            if not self._running:
                break
            self._collect(total - len(left), total)
            if self._seconds_left() <= 0:
                break
        left = [running.measurement for running in self._running] + left
        seconds = time.monotonic() - self._begun
        print(f"campaign: {total - len(left)} measured in {seconds:.0f} s", flush=True)
        if left:
            names = " ".join(m.name for m in left)
            print(f"campaign: {len(left)} left, the same command goes on: {names}", flush=True)

    def _next(self, left: list[Measurement]) -> Measurement | None:
        """The first that there is time for."""
        seconds = self._seconds_left()
        return next((m for m in left if seconds >= AT_LEAST[m.gpus]), None)

    def _seconds_left(self) -> float:
        return self.args.minutes * 60 - (time.monotonic() - self._begun)

    def _free(self, m: Measurement) -> list[int] | None:
        """The places of the next measurement, None while it has to wait."""
        is_alone = m.alone or any(running.measurement.alone for running in self._running)
        if self._running and (is_alone or not self.args.side_by_side):
            return None
        taken = {slot for running in self._running for slot in running.slots}
        free = [slot for slot in range(self.machine.processes) if slot not in taken]
        return free[: m.gpus] if len(free) >= m.gpus else None

    def _start(self, m: Measurement, slots: list[int]) -> None:
        share = self.args.side_by_side and not m.alone and len(slots) < self.machine.processes
        cores = self.machine.cores_of(slots) if share else self.machine.cores
        running = Running(m, slots, cores, len(self._running))
        log, result = self._files(m)
        result.unlink(missing_ok=True)
        visible = ",".join(self.machine.gpus[slot] for slot in slots if self.machine.gpus)
        env = {"CUDA_VISIBLE_DEVICES": visible}
        if m.launched:
            with open(log, "w") as output:
                command = ["bash", "-c", self._launch(m, result)]
                running.launched = subprocess.Popen(
                    command,
                    cwd=REPO,
                    env=os.environ | env,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=lambda: os.sched_setaffinity(0, cores),
                )
            running.pids[running.launched.pid] = None
        else:
            self._get_ready()
            running.began = time.time()
            port = free_port()
            for rank in range(m.gpus):
                running.pids[self._fork(m, rank, port, cores, env, log, result)] = None
        self._running.append(running)

    def _launch(self, m: Measurement, result: Path) -> str:
        command, python = self.command(m), shlex.quote(sys.executable)
        if m.engine == "demo":
            output = self.args.logs / f"{m.name}.model"
            shutil.rmtree(output, ignore_errors=True)
            return f"INSTALL=0 PYTHON={python} OUTPUT={shlex.quote(str(output))} exec env {command}"
        return f"exec {python} {command.removeprefix('python ')} --json {shlex.quote(str(result))}"

    def _files(self, m: Measurement) -> tuple[Path, Path]:
        return self.args.logs / f"{m.name}.log", self.args.logs / f"{m.name}.json"

    def _get_ready(self) -> None:
        """Import once what every forked measurement needs."""
        if self._ready:
            return
        began = time.monotonic()
        # In this order: opt.colossal makes ColossalAI's import light
        for name in ("opt_benchmark", "colossalai.booster.plugin", OPT_IN_TRANSFORMERS):
            importlib.import_module(name)
        import torch

        assert not torch.cuda.is_initialized()
        self._ready = True
        print(f"campaign: imported in {time.monotonic() - began:.0f} s", flush=True)

    def _fork(self, m, rank, port, cores, env, log, result) -> int:
        """Start a measurement's process; its id."""
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            os.setsid()
            os.sched_setaffinity(0, cores)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            kind = os.O_APPEND if rank else os.O_TRUNC
            output = os.open(log, os.O_CREAT | os.O_WRONLY | kind, 0o666)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ |= env
            if m.gpus > 1:
                places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": m.gpus}
                places |= {"LOCAL_WORLD_SIZE": m.gpus, "MASTER_ADDR": "127.0.0.1"}
                os.environ |= {k: str(v) for k, v in (places | {"MASTER_PORT": port}).items()}
            run_script([*self._script(m), *self._flags(m), "--json", str(result)])
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # what is to be done at the end is the campaign's own

    def _collect(self, number: int, total: int) -> None:
        """Wait a moment; write down what has ended."""
        time.sleep(0.05)
        for running in list(self._running):
            for pid in [pid for pid, status in running.pids.items() if status is None]:
                with contextlib.suppress(ChildProcessError):
                    done, status = os.waitpid(pid, os.WNOHANG)
                    running.pids[pid] = status if done else None
            status, seconds = running.status, time.time() - running.began
            if status is None and seconds > self.args.timeout:
                status = 124
            if status is None:
                continue
            end(running)
            self._running.remove(running)
            line = self._line(running, status, seconds)
            append(self.file(running.measurement.gpus), json.dumps(line))
            self._keep(line)
            at = time.monotonic() - self._begun
            said = f"[{number}/{total}, {at:.0f} s] {line['name']}: {report.in_a_line(line)}"
            print(f"{said} ({seconds:.0f} s)", flush=True)

    def _line(self, running: Running, status: int, seconds: float) -> dict:
        """The measurement's line in the results."""
        m, (log, result) = running.measurement, self._files(running.measurement)
        about = {
            "name": m.name,
            "engine": " ".join([m.engine, *self._flags(m)]),
            "command": self._key(m),
            "commit": self.commit,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(running.began)),
            "started": "launched" if m.launched else "forked",
            "wall_seconds": round(seconds, 1),
            "host": self.machine.host,
            "cores": len(running.cores),
            "beside": running.beside,
        }
        demo = self.args.logs / f"{m.name}.model"
        if status == 0 and m.engine == "demo":
            return about | demo_result(demo, log, self.machine, m)
        if status == 0 and result.is_file():
            found = json.loads(result.read_text())
            if not m.launched:
                found["seconds_to_first_step"] = None  # a fork has none of its own
            return found | about
        flags = dict(itertools.pairwise(m.flags))
        is_demo = m.engine == "demo"
        return about | {
            "plugin": m.engine,
            "model": "350m" if is_demo else flags["--model_name_or_path"],
            "batch_size": 32 // m.gpus if is_demo else int(flags["--batch_size"]),
            "seq_length": 0 if is_demo else int(flags.get("--seq_length", 1024)),
            "world_size": m.gpus,
            "device": self.machine.device,
            "status": report.reason(log, status),
        }

    def end(self) -> None:
        """Nothing of it runs on."""
        for running in self._running:
            end(running)


def run_script(arguments: list[str]) -> None:
    """As python would, in this process."""
    import opt_benchmark
    from args import benchmark_parser
    from benchmarks import peers

    script, *given = arguments
    if script == "benchmarks/peers.py":
        sys.argv = [script, *given]
        peers.main()
        return
    opt_benchmark.run(benchmark_parser().parse_args(given))


def append(file: Path, line: str) -> None:
    """Also behind a line that a killed campaign has left unfinished."""
    is_torn = file.is_file() and not file.read_bytes().endswith(b"\n")
    with open(file, "a") as out:
        out.write("\n" * is_torn + line + "\n")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def end(running: Running) -> None:
    """End what is left of a measurement, wherever torchrun and the compiler's workers have put
    themselves."""
    for pid, status in running.pids.items():
        if status is not None:
            continue
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(pid)
            for member in [own, *own.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def demo_result(output: Path, log: Path, machine: Machine, m: Measurement) -> dict:
    """What the demo's files say: it has no JSON of its own."""
    from opt import measure

    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "seconds" in line]
    evaluations = [line["eval_loss"] for line in lines if "eval_loss" in line]
    seconds = [line["seconds"] for line in steps]
    first = re.findall(r"first step done[^\d]*([\d.]+) s", log.read_text(errors="replace"))
    return {
        "plugin": "demo",
        "model": "350m",
        "world_size": m.gpus,
        "batch_size": 32 // m.gpus,
        "device": machine.device,
        "versions": measure.versions(),
        "held_out_losses": evaluations,
        "loss": evaluations[-1] if evaluations else steps[-1]["loss"],
        "steps": len(steps),
        "step_seconds": {"median": statistics.median(seconds)},
        "seconds_of_all_steps": sum(seconds),
        "seconds_to_first_step": float(first[0]) if first else None,
    }


if __name__ == "__main__":
    main()
