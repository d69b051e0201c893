"""Several hosts (tests/hosts.py): checked before the start, training the same as one host does, and
what becomes of the others when one is lost."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import REPO, SAMPLE_DATA, SAMPLE_MODEL, finish, losses, metrics, start, train
from .hosts import Hosts, why_not
from .test_faults import ENDLESS
from .test_launchers import without_timing

PYTHON = sys.executable
SCRIPT = "opt_train_demo.py"
MODEL = ("--model_name_or_path", SAMPLE_MODEL, "--dataset", SAMPLE_DATA)
SHORT = ("--batch_size", "4", "--max_train_steps", "6", "--max_length", "64")
REASON = why_not()


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Eight hosts, some of which tests have faults of their own put into."""
    if REASON:
        pytest.skip(REASON)
    with Hosts(8, tmp_path_factory.getbasetemp()) as hosts:
        yield hosts


@pytest.fixture
def hosts(started):
    """The hosts, all on and connected; nothing of the test runs on them afterwards."""
    yield started
    for name in started.names:
        started.mend(name)
        if not started.is_on(name):
            started.power_on(name)
        for process in started.processes(name, "python"):
            process.kill()


def begin(hosts, name, *command, **environment) -> subprocess.Popen:
    """Start a command on a host, as a user who is logged in there."""
    environment = hosts.environment(**{k: str(v) for k, v in environment.items()})
    environment.setdefault("XDG_CACHE_HOME", os.environ["XDG_CACHE_HOME"])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(hosts.on(name, *command), env=environment, **pipes)


def hostfile(tmp_path, *names) -> Path:
    file = tmp_path / "hostfile"
    file.write_text("# these\n" + "".join(f"{name}  # a host\n" for name in names))
    return file


def by_hosts(hosts, tmp_path, number, processes, *flags) -> subprocess.Popen:
    """Training on `number` hosts, as run_demo.sh starts it after its own checks."""
    file = hostfile(tmp_path, *hosts.names[:number])
    way = (PYTHON, "-m", "opt.hosts", "run_demo.sh", file, processes, SCRIPT)
    return begin(hosts, "node0", *way, *MODEL, "--output_path", tmp_path / "out", *flags)


def good(done: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def test_each_fault_of_a_host_is_a_line_before_anything_starts(hosts, tmp_path):
    """A host that does not answer, another torch, an output folder, scripts or Python that are not
    there, another clock, other scripts."""
    output = tmp_path / "out"
    output.mkdir()
    site = Path(next(p for p in sys.path if p.endswith("site-packages")))

    def instead(name, file, text):
        other = tmp_path / f"{name}.file"
        other.write_text(text)
        hosts.mount(name, "--bind", other, file)

    torch = next(site.glob("torch-*.dist-info/METADATA"))
    version = next(x for x in torch.read_text().splitlines() if x.startswith("Version: "))[9:]
    hosts.cut("node1")
    instead("node2", torch, torch.read_text().replace(f"Version: {version}", "Version: 2.5.0"))
    hosts.mount("node3", "-t", "tmpfs", "opt-tmp", output)
    # Python runs this line twice in a virtual environment.
    late = "import time; time.now = getattr(time, 'now', time.time); time.time = lambda now=time.now: now() - 90\n"
    instead("node4", next(site.glob("*.pth")), late)
    instead("node5", REPO / "opt" / "errors.py", (REPO / "opt/errors.py").read_text() + "# new\n")
    hosts.mount("node6", "-t", "tmpfs", "opt-tmp", Path(PYTHON).parent)
    hosts.mount("node7", "-t", "tmpfs", "opt-tmp", REPO)

    try:
        done = finish(by_hosts(hosts, tmp_path, 8, 1, *SHORT), 60)
    finally:
        for name in hosts.names[2:]:  # as it was
            hosts.power_off(name)
            hosts.mend(name)
            hosts.power_on(name)
    assert done.returncode == 2 and not done.stdout
    lines = done.stderr.splitlines()
    expected = [
        "run_demo.sh: error: node1 does not answer by ssh: ",
        f"run_demo.sh: error: node2 has torch 2.5.0, node0 {version}",
        f"run_demo.sh: error: node3: --output_path {output} is another folder than on node0: ",
        "run_demo.sh: error: node4's clock is ",
        f"run_demo.sh: error: node5 has other scripts in {REPO} than node0 (commit ",
        f"run_demo.sh: error: node6 has no Python at {PYTHON}: ",
        f"run_demo.sh: error: node7 has no folder {REPO} with these scripts",
    ]
    assert len(lines) == len(expected), done.stderr
    for line in expected:
        assert any(found.startswith(line) for found in lines), (line, done.stderr)
    late = next(float(x.split()[5]) for x in lines if "node4's clock" in x and "behind" in x)
    assert 85 < late < 95
    assert list(output.iterdir()) == []


def test_the_folder_of_one_file_in_the_home_folder(tmp_path):
    """It is the one that the hosts are asked about, whatever a login shell prints."""
    home = tmp_path / "home"
    home.mkdir()
    shell = tmp_path / "sh"
    shell.write_text('#!/bin/bash\necho Welcome\nexec bash "$@"\n')
    shell.chmod(0o755)
    file = tmp_path / "hostfile"
    file.write_text("localhost\n")
    env = {
        "HOME": str(home),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
    }
    flags = (*MODEL, *SHORT, "--output_path", "~/new/model.safetensors")
    way = (PYTHON, "-m", "opt.hosts", "run_demo.sh", str(file), "1")
    done = good(finish(start(SCRIPT, *flags, launcher=way, env=env), 90))
    assert f"saved the model to {home}/new/model.safetensors" in done.stdout
    assert (home / "new" / "model.safetensors").is_file() and not (REPO / "~").exists()
    assert not list(home.rglob(".opt_train.probe*"))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two processes of one host record."""
    output = tmp_path_factory.mktemp("one-host")
    train(output, *SHORT, nproc=2)
    return without_timing(metrics(output))


def test_run_demo_on_two_hosts_is_bit_for_bit_one_hosts_two_processes(
    hosts, tmp_path, two_processes
):
    """The whole way of HOSTFILE=... bash run_demo.sh, started on a third host."""
    file = hostfile(tmp_path, "node1", "node2")
    settings = {"HOSTFILE": file, "OUTPUT": tmp_path / "out", "INSTALL": 0, "PYTHON": PYTHON}
    settings |= {"MODEL": SAMPLE_MODEL, "DATASET": SAMPLE_DATA, "LR": 5e-5}
    demo = begin(
        hosts, "node0", "bash", "run_demo.sh", *SHORT, HF_ENDPOINT="http://[::1]:1", **settings
    )
    done = good(finish(demo, 180))
    assert without_timing(metrics(tmp_path / "out")) == two_processes
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert done.stdout.count("saved the model to") == 1 and "node" not in done.stderr


ACROSS = [  # hosts, processes on each, flags
    (2, 1, ("--plugin", "torch_ddp")),
    (2, 1, ("--plugin", "torch_ddp_fp16")),
    (2, 1, ("--plugin", "low_level_zero", "--zero_stage", "2")),
    (2, 1, ("--plugin", "gemini")),
    (2, 1, ("--plugin", "hybrid_parallel", "--tp_size", "2")),
    (2, 2, ("--plugin", "hybrid_parallel", "--tp_size", "2")),
    (2, 2, ("--plugin", "hybrid_parallel", "--tp_size", "2", "--pp_size", "2")),
    (4, 1, ("--plugin", "hybrid_parallel", "--tp_size", "2", "--pp_size", "2")),
    (4, 1, ("--plugin", "hybrid_parallel", "--tp_size", "4")),
    (4, 1, ("--plugin", "gemini")),
]


@pytest.mark.long
@pytest.mark.parametrize("number, processes, flags", ACROSS)
def test_hosts_train_bit_for_bit_as_processes_of_one_host(
    hosts, tmp_path, number, processes, flags
):
    """Every plugin, tensor and pipeline parallel across hosts and within one."""
    flags = (*SHORT, *flags)
    train(tmp_path / "one", *flags, nproc=number * processes)
    good(finish(by_hosts(hosts, tmp_path, number, processes, *flags), 240))
    assert without_timing(metrics(tmp_path / "out")) == without_timing(metrics(tmp_path / "one"))


def colossalai_run(hosts, tmp_path, flags):
    way = ("colossalai", "run", "--hostfile", tmp_path / "hostfile", "--nproc_per_node", "1")
    hostfile(tmp_path, "node0", "node1")
    (tmp_path / "hostfile").write_text("node0\nnode1\n")  # it knows no comments
    return [begin(hosts, "node0", *way, "--master_addr", "node0", SCRIPT, *flags)]


def torchrun_c10d(hosts, tmp_path, flags, nnodes="2", module="torch.distributed.run", names=None):
    way = (PYTHON, "-m", module, "--nnodes", nnodes, "--nproc_per_node", "1")
    way += ("--rdzv_backend", "c10d", "--rdzv_endpoint", "node0:29500")
    way += ("--max_restarts", "3") if ":" in nnodes else ()
    return [begin(hosts, n, *way, SCRIPT, *flags) for n in names or ("node0", "node1")]


def torchrun_static(hosts, tmp_path, flags, module="opt.torchrun", number=2):
    way = (PYTHON, "-m", module, "--nnodes", number, "--nproc_per_node", "1")
    way += ("--master_addr", "node0", "--master_port", "29500", "--node_rank")
    names = hosts.names[:number]
    return [begin(hosts, name, *way, i, SCRIPT, *flags) for i, name in enumerate(names)]


@pytest.mark.long
@pytest.mark.parametrize("way", [colossalai_run, torchrun_c10d, torchrun_static])
def test_other_launchers_on_two_hosts(hosts, tmp_path, two_processes, way):
    """As docs/nodes.md has them: the same, bit for bit."""
    flags = (*MODEL, "--output_path", tmp_path / "out", *SHORT)
    for started in way(hosts, tmp_path, flags):
        good(finish(started, 240))
    assert without_timing(metrics(tmp_path / "out")) == two_processes


@pytest.mark.long
def test_an_output_folder_that_is_not_shared_is_refused_before_training(hosts, tmp_path):
    """By the processes themselves, whatever started them: /tmp is each host's own."""
    flags = (*MODEL, "--output_path", "/tmp/out", *SHORT)
    started = torchrun_static(hosts, tmp_path, flags, number=3)
    for done in [finish(one, 240) for one in started]:
        assert done.returncode == 2
        assert done.stderr.splitlines() == [
            "opt_train_demo.py: error: --output_path /tmp/out is not the folder that node0 writes "
            "to: on node1 it is another one; on node2 it is another one; choose one that the nodes "
            "share"
        ]
    assert [p.name for p in hosts.seen_by("node0", Path("/tmp/out")).iterdir()] == [
        ".opt_train.lock"
    ]
    assert not hosts.seen_by("node1", Path("/tmp/out")).exists()


def until_step(output, step, *started, seconds=120):
    """Wait until a run has recorded so many steps."""
    end = time.monotonic() + seconds
    while not (output / "metrics.jsonl").exists() or len(losses(output)) < step:
        over = [p.communicate() for p in started if p.poll() is not None]
        assert time.monotonic() < end and not over, over
        time.sleep(0.1)


FAULTS = [
    ("power", 1, "node1 (rank 1) does not answer: the node's power or network is gone"),
    ("cut", 1, "node1 (rank 1) does not answer: the node's power or network is gone"),
    ("power", 0, "node0 (rank 0) does not answer: the node's power or network is gone"),
    ("killed", 1, "rank 1 (process "),
]


@pytest.mark.long
@pytest.mark.parametrize("fault, victim, says", FAULTS)
def test_a_lost_node_is_named_by_all_others(hosts, tmp_path, fault, victim, says):
    """Its power, its network; also where it has rank 0. All others end within --timeout_minutes and
    what a question takes."""
    flags = (*MODEL, "--output_path", tmp_path / "out", *map(str, ENDLESS), "--timeout_minutes")
    started = torchrun_static(hosts, tmp_path, (*flags, "0.2"), number=3)
    until_step(tmp_path / "out", 5, *started)
    name = hosts.names[victim]
    begun = time.monotonic()
    if fault == "killed":
        # torchrun's child; torchrun has the same words in its command line.
        max(hosts.processes(name, SCRIPT), key=lambda p: p.create_time()).kill()
    else:
        (hosts.power_off if fault == "power" else hosts.cut)(name)
    others = [one for i, one in enumerate(started) if i != victim]
    for one in others:
        done = finish(one, 60)
        assert done.returncode == 1 and says in done.stderr, done.stderr
        assert done.stderr.count("error: another process was lost: ") == 1
        assert "Traceback" not in done.stderr
    print(f"over after {time.monotonic() - begun:.1f} s")
    assert time.monotonic() - begun < (12 if fault != "killed" else 0) + 20
    if fault == "cut":  # it, too, knows what it has lost
        done = finish(started[victim], 60)
        assert "node0 (rank 0) and node2 (rank 2) do not answer" in done.stderr


@pytest.mark.long
def test_a_host_that_is_lost_ends_what_was_started_by_a_list_of_hosts(hosts, tmp_path):
    """The others say which, and so does what has started them, which waits for it no longer than a
    minute."""
    flags = (*map(str, ENDLESS), "--timeout_minutes", "0.2")
    started = by_hosts(hosts, tmp_path, 3, 1, *flags)
    until_step(tmp_path / "out", 5, started)
    hosts.power_off("node2")
    begun = time.monotonic()
    done = finish(started, 150)
    assert done.returncode == 1, done.stderr
    assert "run_demo.sh: error: node2 is lost: it does not answer" in done.stderr
    says = "node2 (rank 2) does not answer: the node's power or network is gone"
    assert done.stderr.count(says) == 2, done.stderr[-4000:]
    assert time.monotonic() - begun < 120
    for name in ("node0", "node1"):
        assert not hosts.processes(name, SCRIPT)


@pytest.mark.long
def test_a_slow_network_changes_nothing_but_the_time(hosts, tmp_path, two_processes):
    """20 Mbit/s to one of two hosts, where a step moves 35."""
    hosts.slow("node1", "20mbit")
    good(finish(by_hosts(hosts, tmp_path, 2, 1, *SHORT), 240))
    hosts.slow("node1", "10gbit")
    assert without_timing(metrics(tmp_path / "out")) == two_processes
    assert min(line["seconds"] for line in metrics(tmp_path / "out")[2:-1]) > 1


@pytest.mark.long
def test_a_full_disk_that_hosts_share(hosts, tmp_path):
    """One line on every host, all end, and what was complete stays so: the run goes on from it."""
    output = hosts.disk / "full"
    often = (*MODEL, "--output_path", output, *map(str, ENDLESS), "--save_steps", "2")
    started = torchrun_static(hosts, tmp_path, (*often, "--save_total_limit", "9"))
    for done in [finish(one, 240) for one in started]:
        assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done.stderr
        said = [x for x in done.stderr.splitlines() if x.startswith("opt_train_demo.py: error: ")]
        assert len(said) == 1 and "could not be written (No space left on device: " in said[0]
    seen = hosts.seen_by("node1", output / "checkpoints")
    there = sorted(p.name for p in seen.glob("step-*"))
    assert there == ["step-00000002", "step-00000004"]
    hosts.seen_by("node0", Path("/tmp/more")).mkdir()
    flags = (*MODEL, "--max_length", "32", "--batch_size", "4", "--eval_fraction", "0", "--no_save")
    way = (*flags, "--num_epoch", 1, "--output_path", tmp_path / "out", "--resume")
    for one in torchrun_static(hosts, tmp_path, (*way, output / "checkpoints" / there[-1])):
        done = good(finish(one, 240))
    assert losses(tmp_path / "out")[:4] == losses(hosts.seen_by("node0", output))[:4]


@pytest.mark.long
def test_an_elastic_run_goes_on_with_the_nodes_that_are_left(hosts, tmp_path):
    """torchrun --nnodes 1:3: one of three loses its power; the others go on from the last
    checkpoint, every row of every epoch is trained on once."""
    output, names = tmp_path / "out", hosts.names[:3]
    flags = ("--batch_size", "2", "--max_length", "32", "--eval_fraction", "0", "--num_epoch", "2")
    flags += ("--save_steps", "5", "--resume", "auto", "--timeout_minutes", "0.2")
    flags = (*MODEL, "--output_path", output, *flags)
    started = torchrun_c10d(hosts, tmp_path, flags, "1:3", "opt.torchrun", names)
    until_step(output, 12, *started)
    hosts.power_off("node2")
    done = [good(finish(one, 240)) for one in started[:2]]
    for one in done:
        assert "node2 (rank 2) does not answer" in one.stderr
    found = metrics(output)
    assert [line["step"] for line in found] == list(range(1, len(found) + 1))
    in_all = int(re.search(r"([\d,]+) tokens; ", done[0].stdout)[1].replace(",", ""))
    for epoch in (1, 2):
        tokens = [line["tokens"] for line in found if math.ceil(line["epoch"]) == epoch]
        assert sum(tokens) == in_all
    # More steps than three processes would have needed.
    assert len(found) > 2 * 420 / (3 * 2)


@pytest.mark.long
def test_a_signal_to_run_demo_saves_on_all_hosts_and_the_rest_is_the_same(hosts, tmp_path):
    """SIGUSR1 and SIGTERM, to the script on a host that does not train; then SIGKILL to its
    launcher: nothing goes on without it."""
    flags = ("--batch_size", "4", "--max_length", "32", "--eval_fraction", "0", "--num_epoch", "2")
    train(tmp_path / "one", *flags, nproc=2)
    file = hostfile(tmp_path, "node1", "node2")
    settings = {"HOSTFILE": file, "OUTPUT": tmp_path / "out", "INSTALL": 0, "PYTHON": PYTHON}
    settings |= {"MODEL": SAMPLE_MODEL, "DATASET": SAMPLE_DATA, "LR": 5e-5}
    settings |= {"HF_ENDPOINT": "http://[::1]:1"}
    demo = ("bash", "run_demo.sh", *flags, "--resume", "auto", "--save_steps", "5")

    for step, number in ((12, signal.SIGUSR1), (24, signal.SIGTERM), (36, signal.SIGKILL)):
        started = begin(hosts, "node0", *demo, **settings)
        until_step(tmp_path / "out", step, started)
        if number == signal.SIGKILL:
            min(hosts.processes("node0", "opt.hosts", "run_demo.sh"), key=lambda p: p.pid).kill()
        else:
            min(hosts.processes("node0", "run_demo.sh"), key=lambda p: p.pid).send_signal(number)
        done = finish(started, 120)
        assert done.returncode == {signal.SIGUSR1: 0, signal.SIGTERM: 143}.get(number, 137)
        if number != signal.SIGKILL:
            assert f"{number.name}: stopped after step" in done.stdout
        end = time.monotonic() + 30
        while left := hosts.processes("node1", SCRIPT) + hosts.processes("node2", SCRIPT):
            assert time.monotonic() < end, left
            time.sleep(0.1)
    good(finish(begin(hosts, "node0", *demo, **settings), 240))
    assert without_timing(metrics(tmp_path / "out")) == without_timing(metrics(tmp_path / "one"))


@pytest.mark.long
def test_each_host_tokenizes_into_its_own_cache_and_two_that_share_one_race_harmlessly(
    hosts, tmp_path, two_processes
):
    """/tmp/cache is each host's own; the other cache both see, and both start at once."""

    def rows(cache):
        assert all((d / "counts.json").is_file() for d in cache.rglob("opt*/*") if d.is_dir())
        files = [f for name in ("tokens", "rows") for f in cache.rglob(f"opt*/*/*.{name}")]
        return sorted((f.name, f.read_bytes()) for f in files)

    for name, cache in (("own", Path("/tmp/cache")), ("shared", tmp_path / "cache")):
        flags = (*MODEL, "--output_path", tmp_path / name, *SHORT)
        way = (PYTHON, "-m", "opt.torchrun", "--nnodes", "2", "--nproc_per_node", "1")
        way += ("--master_addr", "node0", "--node_rank")
        started = [
            begin(hosts, f"node{i}", *way, i, SCRIPT, *flags, XDG_CACHE_HOME=cache) for i in (0, 1)
        ]
        for one in started:
            good(finish(one, 240))
        assert without_timing(metrics(tmp_path / name)) == two_processes
        first, second = (rows(hosts.seen_by(f"node{i}", cache)) for i in (0, 1))
        assert first == second and len(first) == 4


@pytest.mark.long
def test_of_two_hosts_that_share_a_cache_one_tokenizes_and_the_other_says_that_it_waits(
    hosts, tmp_path
):
    (tmp_path / "texts.txt").write_text("".join(f"{i} of many texts.\n" * 20 for i in range(9000)))
    flags = ("--dataset", tmp_path / "texts.txt", "--output_path", tmp_path / "out", *SHORT)
    way = (PYTHON, "-m", "opt.torchrun", "--nnodes", "2", "--nproc_per_node", "1")
    way += ("--master_addr", "node0", "--node_rank")
    started = [
        begin(
            hosts,
            f"node{i}",
            *(*way, i, SCRIPT, *MODEL[:2], *flags, "--no_save"),
            XDG_CACHE_HOME=tmp_path / "cache",
        )
        for i in (0, 1)
    ]
    said = "".join(good(finish(one, 240)).stdout for one in started)
    assert said.count("waiting for another run, which tokenizes the same texts") == 1
