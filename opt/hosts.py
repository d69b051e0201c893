"""One training on several hosts: each is checked, then torchrun is started on each, by ssh.

    python -m opt.hosts run_demo.sh HOSTFILE PROCESSES opt_train_demo.py --output_path ...
        PROCESSES on each host; what is wrong with a host is a line that begins with that name, and
        exit code 2

HOSTFILE has a host a line, the first is to have rank 0, "#" begins a comment; ssh must reach them
without a question (~/.ssh/config says how). This folder and --output_path must be there on all. A
signal goes to all hosts; so does the end of this process, however it comes: then they stop as by
SIGTERM.

[F29] `colossalai run --hostfile` does the same, without the checks. It tells the hosts nothing of a
signal or of its own end, and has the whole environment, with all that is secret there, in their
process tables, and prints it around what a process says.
"""

import hashlib
import json
import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from args import output_directory, train_parser
from opt import installed
from opt.errors import UserError, report_user_error

HERE = Path(__file__).resolve().parent.parent
# BatchMode: no questions. Lost is a host that has not answered for 10 s x 6.
SSH = (
    "ssh -T -o BatchMode=yes -o ConnectTimeout=10 "
    "-o ServerAliveInterval=10 -o ServerAliveCountMax=6"
).split()
ANSWER_SECONDS = 90  # for a check: Python and this file from a cold network disk
# torchrun's rendezvous takes a node for lost whose heartbeat is 15 s old by its clock.
CLOCK_SECONDS = 5
# After one host has failed the others have so long to end by themselves; then they are told to, and
# torchrun gives its processes 30 s for that.
GRACE_SECONDS, KILL_SECONDS = 20, 60
# What of the environment goes to the hosts.
HANDED_ON = (
    *("CUDA", "NCCL", "GLOO", "TORCH", "TRITON", "HF_", "OMP", "MKL", "TOKENIZERS", "WANDB"),
    *("XDG_CACHE_HOME", "PYTHON", "PATH", "LD_LIBRARY_PATH", "FI_", "UCX", "http", "no_proxy"),
)


def read_hostfile(file: str) -> list[str]:
    """The hosts' names. Raises UserError."""
    try:
        lines = Path(file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"HOSTFILE {file} cannot be read ({error})") from error
    hosts = [name for line in lines if (name := line.split("#")[0].strip())]
    wrong = next((h for h in hosts if len(h.split()) > 1 or h.startswith("-")), None)
    if not hosts or wrong:
        raise UserError(
            f"HOSTFILE {file}: '{wrong}' is not a name; a line has one host's and nothing else"
            if wrong
            else f"HOSTFILE {file} has no host"
        )
    if twice := next((h for h in hosts if hosts.count(h) > 1), None):
        raise UserError(f"HOSTFILE {file} has {twice} twice")
    return hosts


# ---- on each host: what it is


def describe_host(output: Path, token: str) -> dict:
    """This host, for comparison with the others."""
    address = socket.gethostbyname(socket.gethostname())
    with socket.socket() as s:
        s.bind(("", 0))
        port = s.getsockname()[1]
    return {
        "python": platform.python_version(),
        "packages": installed.versions(),
        "code": _digest(),
        "commit": installed.commit() or "not known",
        "time": time.time(),
        "address": address,
        "port": port,
        "folder": _mark(output, token),
    }


def _digest() -> str:
    digest = hashlib.sha256()
    for file in sorted((*HERE.glob("*.py"), *HERE.glob("opt/**/*.py"))):
        digest.update(f"{file.relative_to(HERE)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def _mark(folder: Path, token: str) -> str:
    """Make a file which another host has made already if `folder` is shared: "new", "there", or
    what is in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / token).touch(exist_ok=False)
        return "new"
    except FileExistsError:
        return "there"
    except OSError as error:
        return str(error.strerror)


def answer() -> None:
    """Describe this host in a line, and wait for the others' to be asked."""
    asked = json.loads(sys.stdin.readline())
    output, token = Path(asked["output"]), asked["token"]
    print(json.dumps(describe_host(output, token)), flush=True)
    sys.stdin.read()
    (output / token).unlink(missing_ok=True)


def node() -> int:
    """torchrun, with the environment and the arguments that the first line of the standard input
    has; each further line is a signal, and its end is SIGTERM. Returns the exit code."""
    orders = os.fdopen(os.dup(0))
    with open(os.devnull) as nothing:  # or the training's processes would read the orders
        os.dup2(nothing.fileno(), 0)
    asked = json.loads(orders.readline())
    os.environ.update(asked["environment"])

    def heed():
        for line in orders:
            os.kill(os.getpid(), signal.Signals[line.strip()])
        os.kill(os.getpid(), signal.SIGTERM)

    from opt import torchrun  # takes a second, and should have the environment

    threading.Thread(target=heed, daemon=True).start()
    return torchrun.main(asked["arguments"])


# ---- on the host that starts it all


def is_here(host: str) -> bool:
    """Whether a name is this machine's own, which needs no ssh."""
    if host in (socket.gethostname(), "localhost"):
        return True
    try:
        with socket.socket() as s:
            s.bind((socket.gethostbyname(host), 0))  # only its own addresses can be bound to
        return True
    except OSError:
        return False


def begin(host: str, part: str, message: dict, **streams) -> subprocess.Popen:
    """Start answer() or node() on a host, and send it its first line."""
    python = shlex.join([sys.executable, "-m", "opt.hosts", part])
    command = f"cd {shlex.quote(str(HERE))} && exec {python}"
    line = ["sh", "-c", command] if is_here(host) else [*SSH, host, command]
    # In a session of its own: Ctrl-C comes to this process alone, which hands it on.
    started = subprocess.Popen(
        line, stdin=subprocess.PIPE, text=True, bufsize=1, start_new_session=True, **streams
    )
    tell(started, json.dumps(message))
    return started


def tell(host: subprocess.Popen, line: str) -> None:
    """Send a line to a host, which may have gone."""
    try:
        host.stdin.write(f"{line}\n")
    except (OSError, ValueError):
        pass


def check(hosts: list[str], output: Path) -> tuple[list[str], int]:
    """What is wrong, a line each, and a port that is free on the first host."""
    message = {"output": str(output), "token": f".opt_train.probe-{os.urandom(8).hex()}"}
    pipe = subprocess.PIPE
    asked = [begin(host, "answer", message, stdout=pipe, stderr=pipe) for host in hosts]
    with ThreadPoolExecutor(len(hosts)) as pool:
        answers = list(pool.map(_answer_of, asked, hosts))
    for host in asked:  # only now do they take their files away
        host.stdin.close()
    for host in asked:
        host.wait()
    wrong = [answer for answer in answers if isinstance(answer, str)]
    there = [(h, a) for h, a in zip(hosts, answers, strict=True) if isinstance(a, dict)]
    if there:
        wrong += [line for h, a in there for line in _faults(h, a, *there[0], output)]
        if len(hosts) > 1 and not os.environ.get("GLOO_SOCKET_IFNAME"):
            wrong += [
                f"{host} has the address {a['address']} by its own name, at which the others "
                "cannot reach it: mend its /etc/hosts, or set GLOO_SOCKET_IFNAME"
                for host, a in there
                if a["address"].startswith("127.")
            ]
        makers = [host for host, a in there if a["folder"] == "new"]
        wrong += [
            f"{host}: --output_path {output} is another folder than on {makers[0]}: choose one "
            "that the hosts share"
            for host in makers[1:]
        ]
    return wrong, there[0][1]["port"] if there else 0


def _answer_of(asked: subprocess.Popen, host: str) -> dict | str:
    """What a host says of itself, and when (here); or what is wrong with it."""
    timer = threading.Timer(ANSWER_SECONDS, asked.kill)
    timer.start()
    # Ahead of it may be what a login shell prints.
    said = next((line for line in asked.stdout if line.startswith("{")), None)
    timer.cancel()
    if said:
        return json.loads(said) | {"heard": time.time()}
    said = asked.stderr.read().strip().splitlines() or [f"no answer in {ANSWER_SECONDS} s"]
    code = asked.wait()
    if code == 255:
        return f"{host} does not answer by ssh: {said[-1]}"
    if code in (126, 127):
        return f"{host} has no Python at {sys.executable}: {said[-1]}"
    if any("can't cd" in line or "cd:" in line or "No module named" in line for line in said):
        return f"{host} has no folder {HERE} with these scripts"
    return f"{host} cannot be asked: {said[-1]}"


def _faults(host: str, own: dict, first: str, its: dict, output: Path) -> list[str]:
    """What does not fit on a host, compared with the first."""
    wrong = []
    if own["python"] != its["python"]:
        wrong.append(f"{host} has Python {own['python']}, {first} {its['python']}")
    for name, version in own["packages"].items():
        if version != its["packages"].get(name):
            other = its["packages"].get(name)
            wrong.append(f"{host} has {name} {version or 'not'}, {first} {other or 'not'}")
    if own["code"] != its["code"]:
        wrong.append(
            f"{host} has other scripts in {HERE} than {first} (commit {own['commit']}, there "
            f"{its['commit']})"
        )
    # Each was heard within a moment of what it said.
    apart = (own["time"] - own["heard"]) - (its["time"] - its["heard"])
    if abs(apart) > CLOCK_SECONDS:
        wrong.append(f"{host}'s clock is {abs(apart):.0f} s {'ahead' if apart > 0 else 'behind'}")
    if own["folder"] not in ("new", "there"):
        wrong.append(f"{host}: --output_path {output} cannot be written ({own['folder']})")
    return wrong


def launch(hosts: list[str], port: int, processes: str, script: list[str]) -> int:
    """Run torchrun on all hosts. Returns the exit code: of the host that failed first, and by
    itself."""
    environment = {k: v for k, v in os.environ.items() if k.startswith(HANDED_ON)}
    arguments = ["--nnodes", str(len(hosts)), "--nproc_per_node", processes]
    arguments += ["--master_addr", hosts[0].split("@")[-1], "--master_port", str(port)]
    started = {
        host: begin(
            host,
            "node",
            {
                "environment": environment,
                "arguments": [*arguments, "--node_rank", str(rank), *script],
            },
        )
        for rank, host in enumerate(hosts)
    }
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        name = signal.Signals(number).name
        signal.signal(number, lambda *_, name=name: [tell(h, name) for h in started.values()])
    codes, failed_at = {}, None  # by host, in the order in which they end
    while len(codes) < len(hosts):
        time.sleep(0.1)
        for host in hosts:
            if host in codes or (code := started[host].poll()) is None:
                continue
            # ssh's own failure, and what is killed below for not having ended.
            if is_lost := code in (255, -signal.SIGKILL):
                line = f"{host} is lost: it does not answer, or has not ended"
                print(f"{sys.argv[0]}: error: {line}", file=sys.stderr, flush=True)
            codes[host] = 1 if is_lost else code
            failed_at = failed_at or (code and time.monotonic())
        for seconds, end in ((GRACE_SECONDS, _hang_up), (KILL_SECONDS, subprocess.Popen.kill)):
            if failed_at and time.monotonic() - failed_at > seconds:
                for host in set(hosts) - set(codes):
                    end(started[host])
    failures = [code for code in codes.values() if code]
    # 1 is what those end with that were only left by others, 143 those that were told to end.
    own = [code for code in failures if code not in (1, 128 + signal.SIGTERM)]
    return [*own, *failures, 0][0]


def _hang_up(host: subprocess.Popen) -> None:
    try:
        host.stdin.close()
    except OSError:  # what could not be sent
        pass


def main() -> int:
    if sys.argv[1] == "answer":
        answer()
        return 0
    if sys.argv[1] == "node":
        return node()
    sys.argv = sys.argv[1:]  # whose name lines begin with
    hostfile, processes, *script = sys.argv[1:]
    output = HERE / output_directory(train_parser().parse_known_args(script)[0].output_path)
    try:
        hosts = read_hostfile(hostfile)
        wrong, port = check(hosts, output)
    except UserError as error:
        report_user_error(error)
    for line in wrong:
        print(f"{sys.argv[0]}: error: {line}", file=sys.stderr)
    return 2 if wrong else launch(hosts, port, processes, script)


if __name__ == "__main__":
    sys.exit(main())
