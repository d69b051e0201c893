"""Processes that die, hang or run out of memory, two runs in one place, weights that did not load:
the run ends, and says why."""

import re
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import transformers
from transformers import AutoTokenizer, OPTConfig

from opt.model.sizes import preset_config
from opt.train import faults

from .conftest import (
    REPO,
    SAMPLE_DATA,
    SAMPLE_MODEL,
    colossalai_run,
    finish,
    free_port,
    kill_all,
    metrics,
    on_the_sample,
    run,
    start,
)

SCRIPT = REPO / "opt_train_demo.py"
CPU = {"CUDA_VISIBLE_DEVICES": ""}
# Hours of training: nothing but the fault ends it.
ENDLESS = (
    "--num_epoch",
    100_000,
    "--batch_size",
    4,
    "--max_length",
    32,
    "--eval_fraction",
    0,
    "--no_save",
)


class Run:
    """opt_train_demo.py on the sample, under way: started by torchrun, by `colossalai run`, or by
    hand, a process a rank."""

    def __init__(
        self, output: Path, *flags, nproc: int, by: str = "torchrun", stderr: Path | None = None
    ):
        self.output, self.nproc, self.port = output, nproc, free_port()
        output.mkdir()
        flags = (
            "--model_name_or_path",
            SAMPLE_MODEL,
            "--dataset",
            SAMPLE_DATA,
            "--output_path",
            output,
            *flags,
        )
        self._files = []
        if by == "hand":
            self.started = [
                self._start(
                    flags,
                    env={
                        "RANK": str(i),
                        "LOCAL_RANK": str(i),
                        "WORLD_SIZE": str(nproc),
                        "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(self.port),
                        "LOCAL_WORLD_SIZE": str(nproc),
                    },
                )
                for i in range(nproc)
            ]
        elif by == "torchrun":
            launcher = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc_per_node",
                str(nproc),
                "--master_port",
                str(self.port),
            ]
            self.started = [self._start(flags, launcher=launcher)]
        else:
            self.started = [self._start(flags, **colossalai_run(nproc, self.port))]

    def _start(self, flags, env=None, launcher=None):
        file = open(self.output / f"printed{len(self._files)}", "w+")
        self._files.append(file)
        return start(
            SCRIPT, *flags, env=CPU | (env or {}), launcher=launcher, stdout=file, stderr=file
        )

    @property
    def printed(self) -> str:
        """What all of its processes have printed."""
        return "".join((self.output / Path(file.name).name).read_text() for file in self._files)

    def ranks(self) -> list[psutil.Process]:
        """The processes that train, by rank; the first is not at the others' beck and call."""
        found = {}
        for process in psutil.process_iter():
            try:
                line = process.cmdline()
                if (
                    str(SCRIPT) in line[1:3]
                    and str(self.output) in line
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found[int(process.environ()["RANK"])] = process
            except (psutil.Error, KeyError):  # over by now, or a launcher
                pass
        return [found[rank] for rank in sorted(found)]

    def until_training(self, seconds=90) -> "Run":
        """Wait until some steps are done."""
        end = time.monotonic() + seconds
        while not (self.output / "metrics.jsonl").exists() or len(metrics(self.output)) < 3:
            assert time.monotonic() < end and all(p.poll() is None for p in self.started), (
                self.printed[-4000:]
            )
            time.sleep(0.1)
        assert len(self.ranks()) == self.nproc
        return self

    def until_over(self, but=(), seconds=60) -> float:
        """Wait until none of its processes is left, but for these; returns the seconds that it
        took."""
        begun = time.monotonic()
        while True:
            left = [p for p in self.ranks() if p not in but]
            if not left and all(
                p.poll() is not None for p in self.started if p.pid not in [b.pid for b in but]
            ):
                return time.monotonic() - begun
            assert time.monotonic() - begun < seconds, (
                f"{left} after {seconds} s: {self.printed[-4000:]}"
            )
            time.sleep(0.1)

    def end(self) -> None:
        for process in self.ranks():
            process.kill()
        for process in self.started:
            kill_all(process)
            process.wait()
        for file in self._files:
            file.close()


@pytest.fixture
def begin(tmp_path):
    """Starts a Run, and ends it whatever comes."""
    runs = []

    def one(name, *flags, **how) -> Run:
        runs.append(Run(tmp_path / name, *flags, **how))
        return runs[-1]

    yield one
    for each in runs:
        each.end()


def assert_port_is_free(port: int) -> None:
    with socket.socket() as s:
        # Connections of the dead may linger
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind(("127.0.0.1", port))


HYBRID = ("--plugin", "hybrid_parallel")
KILLED = [
    ("torchrun", 2, ("--plugin", "torch_ddp"), 1),
    ("hand", 2, ("--plugin", "torch_ddp"), 0),
    ("hand", 4, (*HYBRID, "--tp_size", 2, "--pp_size", 2), 3),
    pytest.param("colossalai run", 2, (*HYBRID, "--tp_size", 2), 0, marks=pytest.mark.long),
    pytest.param(
        "torchrun", 4, (*HYBRID, "--tp_size", 2, "--pp_size", 2), 0, marks=pytest.mark.long
    ),
    pytest.param("hand", 2, ("--plugin", "gemini"), 1, marks=pytest.mark.long),
    pytest.param("hand", 4, ("--plugin", "low_level_zero"), 0, marks=pytest.mark.long),
]


@pytest.mark.parametrize("by, nproc, flags, victim", KILLED)
def test_a_killed_rank_ends_the_run(begin, by, nproc, flags, victim):
    """kill -9 of one: all others end by themselves, with an error, and leave the port."""
    training = begin("out", *ENDLESS, *flags, nproc=nproc, by=by).until_training()
    killed = training.ranks()[victim]
    killed.kill()
    seconds = training.until_over()
    print(f"all over after {seconds:.1f} s")
    codes = [process.returncode for process in training.started]
    assert 0 not in codes
    assert_port_is_free(training.port)
    if by == "hand":
        assert sorted(codes) == [-signal.SIGKILL, *[1] * (nproc - 1)]
        assert training.printed.count("error: another process was lost") == nproc - 1
        assert f"rank {victim} (process {killed.pid})" in training.printed
        assert training.printed.count("was killed, most likely for host memory") >= 1
        assert "Traceback" not in training.printed


HUNG = [
    ("hand", 2, ("--plugin", "torch_ddp")),
    pytest.param("torchrun", 2, (*HYBRID, "--tp_size", 2), marks=pytest.mark.long),
    pytest.param("hand", 2, (*HYBRID, "--pp_size", 2), marks=pytest.mark.long),
    pytest.param(
        "hand", 2, ("--plugin", "low_level_zero", "--zero_stage", 2), marks=pytest.mark.long
    ),
    pytest.param("hand", 2, ("--plugin", "gemini"), marks=pytest.mark.long),
]


@pytest.mark.parametrize("by, nproc, flags", HUNG)
def test_a_hung_rank_ends_the_run(begin, by, nproc, flags):
    """SIGSTOP: the others end after --timeout_minutes, in whatever group of processes they wait."""
    training = begin(
        "out", *ENDLESS, *flags, "--timeout_minutes", 0.1, nproc=nproc, by=by
    ).until_training()
    hung = training.ranks()[1]
    hung.suspend()
    # torchrun gives the hung one half a minute to heed its SIGTERM, then kills it.
    seconds = training.until_over(but=[hung] if by == "hand" else [])
    print(f"all others over after {seconds:.1f} s")
    assert seconds > 3
    assert (
        "error: another process did not answer for 0.1 minutes (--timeout_minutes)"
        in training.printed
    )
    assert training.started[0].returncode == 1
    if by == "hand":
        assert "Traceback" not in training.printed  # which torchrun has of its own
        assert seconds < 20 and hung.is_running()


def test_a_rank_that_was_never_started_and_a_port_in_use(tmp_path):
    """Each is an error of one line, after --timeout_minutes and at once."""
    flags = (
        *on_the_sample(tmp_path / "out"),
        "--timeout_minutes",
        0.05,
    )
    env = CPU | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = {"alone": str(free_port()), "taken": str(taken.getsockname()[1])}
        started = {
            name: start(SCRIPT, *flags, env=env | {"MASTER_PORT": port})
            for name, port in ports.items()
        }
        done = {name: finish(process, 60) for name, process in started.items()}
    says = {
        "alone": "did not answer for 0.05 minutes (--timeout_minutes): it hangs, or was not started",
        "taken": f"port {ports['taken']} is in use",
    }
    for name, text in says.items():
        assert done[name].returncode == 1 and "Traceback" not in done[name].stderr, done[
            name
        ].stderr
        assert [text in line for line in done[name].stderr.splitlines() if ": error: " in line] == [
            True
        ]


# ---- what one process alone runs into

# As NCCL 2.21 and newer say it, in PyTorch's words; without GPUs it cannot be had
NCCL = (
    "NCCL error in: NCCLUtils.hpp:268, unhandled system error (run with NCCL_DEBUG=INFO for "
    "details), NCCL version 2.21.5\nncclSystemError: System call (e.g. socket, malloc) or external "
    "library call failed or device error. \nLast error:\n"
)
SHARED = (
    "Error while creating shared memory segment /dev/shm/nccl-pZafXL (size 9637888), error: No "
    "space left on device (28)\nException raised from create at NCCLUtils.hpp:268"
)
WORKER = f"""
import sys
sys.path.insert(0, {str(REPO)!r})
import torch
import torch.distributed as dist
from args import train_parser
from opt.colossal import processes
from opt.errors import UserError
from opt.train import faults

with faults.reported(train_parser().parse_args([])):
    here = processes.place()
    if sys.argv[1] == "early" and here.rank == 1:
        raise UserError("only rank 1 sees it")
    processes.start(here)
    if sys.argv[1] == "alike":
        raise UserError("all see it")
    if here.rank == 1:
        raise {{"late": UserError("only rank 1 sees it"), "bug": KeyError("broken"), "memory": MemoryError("no more"), "shared": dist.DistBackendError({NCCL + SHARED!r})}}[sys.argv[1]]
    dist.all_reduce(torch.zeros(1))
"""


@pytest.mark.parametrize(
    "fault, line, code",
    [
        ("early", "error: only rank 1 sees it", 2),
        pytest.param("late", "error: only rank 1 sees it", 2, marks=pytest.mark.long),
        ("alike", "error: all see it", 2),
        ("bug", "failed on rank 1 of 2: KeyError: 'broken'", 1),
        ("memory", "out of memory (no more); try --grad_checkpoint", 3),
        ("shared", " MB are free in /dev/shm. Start the container with --shm-size=1g", 1),
    ],
)
def test_an_error_of_one_process_is_seen(tmp_path, fault, line, code):
    """Once, whichever process it is, and before any that says no more than that another one has
    ended."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    done = run(script, fault, nproc=2, env=CPU, timeout=60)
    assert done.returncode != 0
    said = [text for text in done.stderr.splitlines() if text.startswith("worker.py: ")]
    assert [line in text for text in said].count(True) == 1 and line in said[0], done.stderr[-4000:]
    assert len(said) <= 2 and all("another process was lost" in text for text in said[1:])
    assert re.search(rf"rank +: 1 .*\n +exitcode +: {code} ", done.stderr) or fault == "alike", (
        done.stderr[-4000:]
    )


@pytest.mark.parametrize(
    "said, line",
    [
        (SHARED, "MB are free in /dev/shm. Start the container with --shm-size=1g"),
        (
            "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 4000",
            "NCCL: Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 4000; NCCL_DEBUG",
        ),
        ("Bootstrap : no socket interface found", "NCCL: Bootstrap : no socket interface found"),
        ("Cuda failure 'peer access is not supported'", "NCCL: Cuda failure 'peer access is not"),
        (
            "socketProgress: Connection closed by remote peer node-1<35421>",
            "another process was lost (socketProgress: Connection closed by remote peer node-1",
        ),
        (
            "\nException raised from checkForNCCLErrorsInternal at ProcessGroupNCCL.cpp:2027",
            "another process was lost (",
        ),
        (
            "Call to recv from 10.0.0.2<51212> failed : Broken pipe",
            "another process was lost (Call to recv from 10.0.0.2<51212> failed : Broken pipe",
        ),
    ],
)
def test_what_nccl_says_of_this_process_is_not_told_of_another(said, line):
    error = torch.distributed.DistBackendError(NCCL + said)
    assert not faults.is_out_of_memory(error)
    assert line in (faults.nccl_error(error) or faults.lost_process(error, 10))


@pytest.mark.parametrize("number", ["", "2 "])
def test_nccls_own_buffers_are_memory(number):
    error = torch.distributed.DistBackendError(f"{NCCL}Cuda failure {number}'out of memory'")
    assert faults.is_out_of_memory(error)


ALONE = f"""
import os
import socket
import sys
sys.path.insert(0, {str(REPO)!r})
from opt.colossal import cpu, processes

then = cpu.use_cpu
def use_cpu():
    socket.create_connection(("127.0.0.1", int(os.environ["MASTER_PORT"])), 5).close()
    then()
cpu.use_cpu = use_cpu
processes.start(processes.place())
"""


def test_runs_that_begin_together_have_a_port_each(tmp_path):
    """Each takes its own before it gets its device ready, which is seconds on a GPU."""
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    done = run(script, env=CPU, timeout=60)
    assert done.returncode == 0, done.stderr[-4000:]


def limited(gigabytes: int) -> list:
    """A launcher whose process may have no more address space."""
    return ["bash", "-c", f'ulimit -v {gigabytes * 10**6}; exec "$@"', "bash", sys.executable]


def test_what_cannot_fit_is_refused(tmp_path):
    """Before anything is loaded, by all processes at once, in a line that says by how much and what
    would fit."""
    shutil.copytree(SAMPLE_MODEL, tmp_path / "30b")
    preset_config("30b").save_pretrained(tmp_path / "30b")
    flags = on_the_sample(tmp_path / "out")
    trains = start(SCRIPT, *flags, "--model_name_or_path", tmp_path / "30b", env=CPU)
    sizes = ("--batch_size", 300_000, "--seq_length", 128, "--model_name_or_path", SAMPLE_MODEL)
    launcher = [*limited(16), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    measures = start(REPO / "opt_benchmark.py", *sizes, env=CPU, launcher=launcher)

    auto = (*on_the_sample(tmp_path / "auto"), "--auto", "--dry_run", "--batch_size", 2048)
    chooses = start(SCRIPT, *auto, env=CPU, launcher=limited(5))

    done = finish(trains, 120)
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    (line,) = done.stderr.strip().splitlines()
    # fp32 weights, gradients and two moments of 29,974,560,768 parameters
    found = re.search(r"about (\S+) GiB of host memory on a node, (\S+) more than the (\S+) ", line)
    takes, more, there = map(float, found.groups())
    assert 16 * 29.97e9 / 2**30 < takes < 1.01 * 16 * 29.97e9 / 2**30
    assert more == pytest.approx(takes - there, abs=0.2)

    done = finish(measures, 120)
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("opt_benchmark.py: ")]
    assert re.search(r"exitcode +: 2 ", done.stderr)
    found = re.search(
        r" (\S+) more than .*: --fused_loss --batch_size (\d+) --gradient_accumulation_steps (\d+) "
        r"fits in ([\d.]+)",
        line,
    )
    rows, steps = int(found[2]), int(found[3])
    assert rows * steps == 300_000 and float(found[4]) < 32 < float(found[1])

    done = finish(chooses, 120)
    assert done.returncode == 0, done.stderr
    rows, steps = map(int, re.search(r"(\d+) rows x (\d+) accumulated: ", done.stdout).groups())
    assert rows * steps == 2048 and steps > 1
    assert "= 2048 rows a step" in done.stdout
    assert "plugin torch_ddp: the fastest on a CPU" in done.stdout


def test_two_runs_at_once(begin, tmp_path):
    """Into two directories, they do not disturb each other; into one, the second is refused, all
    its processes alike."""
    first = begin("out", *ENDLESS, nproc=2).until_training()
    before = (tmp_path / "out" / "metrics.jsonl").stat().st_ino, len(metrics(tmp_path / "out"))
    flags = (
        "--model_name_or_path",
        SAMPLE_MODEL,
        "--dataset",
        SAMPLE_DATA,
        "--no_save",
        "--max_train_steps",
        1,
    )
    second = start(SCRIPT, *flags, "--output_path", tmp_path / "out", nproc=2, env=CPU)
    other = start(SCRIPT, *flags, "--output_path", tmp_path / "other", nproc=2, env=CPU)
    done = finish(second, 90)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if ": error: " in line]
    assert (
        len(said) == 1
        and f"--output_path {tmp_path / 'out'} is in use by another run (process "
        f"{first.ranks()[0].pid} on "
        in said[0]
    )
    assert re.search(r"exitcode *: 2 ", done.stderr)
    done = finish(other, 90)
    assert done.returncode == 0, done.stderr[-4000:]
    assert all(process.poll() is None for process in first.started)
    assert (tmp_path / "out" / "metrics.jsonl").stat().st_ino == before[0]
    assert [line["step"] for line in metrics(tmp_path / "out")] == list(
        range(1, len(metrics(tmp_path / "out")) + 1)
    )
    assert len(metrics(tmp_path / "out")) > before[1]


# ---- weights that are not what they should be


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder of models in the sample's shape with weights that load, and should not be
    trained."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(OPTConfig.from_pretrained(SAMPLE_MODEL))
    decoder = model.model.decoder

    def save(name):
        model.save_pretrained(root / name)
        AutoTokenizer.from_pretrained(SAMPLE_MODEL).save_pretrained(root / name)

    with torch.no_grad():
        decoder.layers[3].fc2.weight[0, 0] = torch.nan
        save("nan")
        decoder.layers[3].fc2.weight[0, 0] = 0
        # As of another model: the shapes are right, the logits are not
        decoder.embed_tokens.weight.mul_(100)
        save("scaled")
    return root


GUARDED = [
    (("--plugin", "torch_ddp", "--eval_fraction", 0), None),
    pytest.param(("--plugin", "gemini"), 2, marks=pytest.mark.long),
    ((*HYBRID, "--pp_size", 2, "--eval_fraction", 0), 2),
]


@pytest.mark.parametrize("flags, nproc", GUARDED)
def test_a_first_loss_worse_than_guessing_is_told(models, tmp_path, flags, nproc):
    """The weights are as the file has them: it trains, and warns, once."""
    given = (
        "--model_name_or_path",
        models / "scaled",
        "--dataset",
        SAMPLE_DATA,
        "--output_path",
        tmp_path / "out",
        "--batch_size",
        4,
        "--max_train_steps",
        1,
    )
    done = run(SCRIPT, *given, *flags, nproc=nproc, env=CPU)
    assert done.returncode == 0, done.stderr[-4000:]
    pattern = r"warning: the first loss is \d+\.\d+, over 11.437 \(1.5 x ln 2048\)"
    assert len(re.findall(pattern, done.stdout + done.stderr)) == 1
    assert (tmp_path / "out" / "config.json").exists()


# What loses a tensor on its way, as ColossalAI 0.5.0's own loading does, in one process of two.
LOSES = """
import os, runpy, sys
from opt.colossal.pieces import Form
place = Form.place

def place_all_but_one(self, weights, spread):
    place(self, weights, spread)
    if os.environ["RANK"] == "1":
        held = dict(self.model.unwrap().named_parameters())
        held["model.decoder.layers.1.fc1.weight"].data[5:].normal_()

Form.place = place_all_but_one
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def test_weights_that_do_not_arrive_are_named(tmp_path):
    """On the process that lacks them, tensor parallel: what it holds is compared with the file."""
    (tmp_path / "loses.py").write_text(LOSES)
    given = ("--model_name_or_path", SAMPLE_MODEL, "--dataset", SAMPLE_DATA)
    flags = (*HYBRID, "--tp_size", 2, "--output_path", tmp_path / "out")
    env = CPU | {"PYTHONPATH": str(SCRIPT.parent)}
    done = run(tmp_path / "loses.py", SCRIPT, *given, *flags, nproc=2, env=env)
    assert done.returncode != 0
    assert "weights did not arrive: of model.decoder.layers.1.fc1.weight" in done.stderr
    assert not (tmp_path / "out" / "config.json").exists()


def test_weights_of_nan_are_named(models, tmp_path):
    """By the last pipeline stage, which alone reads them."""
    given = (
        "--model_name_or_path",
        models / "nan",
        "--dataset",
        SAMPLE_DATA,
        "--output_path",
        tmp_path / "out",
        "--batch_size",
        4,
    )
    done = run(SCRIPT, *given, *HYBRID, "--pp_size", 2, nproc=2, env=CPU)
    said = [line for line in done.stderr.splitlines() if ": error: " in line]
    assert (
        "nan/model.safetensors: model.decoder.layers.3.fc2.weight holds nan or infinity" in said[0]
    ), done.stderr[-4000:]
    assert len(said) == 1 or "another process was lost" in said[1]
    assert re.search(r"exitcode *: 2 ", done.stderr)
