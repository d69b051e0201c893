"""Several hosts on this one machine: each with its own name, address, processes, /tmp and sshd.

    python -m tests.hosts 2                     a shell on node0; the hosts are gone when it ends
    python -m tests.hosts 4 -- bash run_demo.sh      a command there

All of it lives in namespaces below one process, the switch, which ends when its standard input
closes: then, however this process has ended, the kernel ends everything in them and takes the
network away. Nothing in this machine's own network, file system or process table is changed. It
needs root, iproute2, and Debian's openssh-server; the folder of the hosts and all else but /tmp is
what they share.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

REPO = Path(__file__).resolve().parent.parent
_TOOLS = ("taskset", "unshare", "nsenter", "ip", "tc", "mount", "sshd", "ssh-keygen")

# Process 1 of the switch: a bridge, and a cable to each host. It has an address there too, .254.
_SWITCH = """
mount -t tmpfs opt-run /run && mkdir /run/netns /run/folder
mkdir "$FOLDER/disk" && mount -t tmpfs -o size=34m opt-disk "$FOLDER/disk"
ip link set lo up
ip link add opt-br type bridge && ip link set opt-br up && ip addr add 10.77.0.254/24 dev opt-br
for name in $NAMES; do
  ip netns add opt-$name
  ip link add opt-$name type veth peer name eth0 netns opt-$name
  ip link set opt-$name master opt-br up
done
touch "$FOLDER/switched-on"
cat >/dev/null
"""

# Process 1 of a host. A /tmp and a /run of its own, but for the shared folder; sshd is what stays.
_HOST = """
hostname $NAME
mount --rbind "$FOLDER" /run/folder
IFS=: read -ra keep <<<"$KEEP" # what all hosts need, where it lies in /tmp
for i in "${!keep[@]}"; do mkdir -p "/run/keep$i" && mount --rbind "${keep[i]}" "/run/keep$i"; done
mount -t tmpfs opt-tmp /tmp && mkdir -p "$FOLDER" && mount --move /run/folder "$FOLDER"
for i in "${!keep[@]}"; do mkdir -p "${keep[i]}" && mount --move "/run/keep$i" "${keep[i]}"; done
mount -t tmpfs opt-run /run && mkdir /run/sshd
mount --bind "$FOLDER/hosts" /etc/hosts && mount --bind "$FOLDER/passwd" /etc/passwd
ip link set lo up && ip addr add $ADDRESS/24 dev eth0 && ip link set eth0 up
exec "$SSHD" -D -e -f "$FOLDER/sshd_config.$NAME" </dev/null
"""


def why_not() -> str | None:
    """Why there can be no hosts here; None if there can."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if missing := [tool for tool in _TOOLS if not shutil.which(tool, path=path)]:
        return f"hosts need {', '.join(missing)} (Debian: openssh-server, iproute2, util-linux)"
    tried = subprocess.run(
        "unshare --net --mount --uts --pid --fork sh -c"
        " 'ip link add opt-a type veth peer name opt-b && mount -t tmpfs opt /mnt'",
        shell=True,
        capture_output=True,
        text=True,
    )
    if tried.returncode:
        return f"hosts need namespaces, and here {tried.stderr.strip()}"
    return None


class Hosts:
    """A context: node0, node1 ... at 10.77.0.1, 10.77.0.2 ..., and `hostfile` with their names.

    Each has a core of its own, and reaches the others by ssh as root, with keys of their own. Files are the same on all of
    them, but for /tmp and /run, and what mount() has put over one.
    """

    def __init__(self, number: int, folder: Path | None = None):
        self.names = [f"node{i}" for i in range(number)]
        self.addresses = {name: f"10.77.0.{i + 1}" for i, name in enumerate(self.names)}
        self._own_folder = folder is None
        self.folder = Path(folder or tempfile.mkdtemp(prefix="opt-hosts-")).resolve()
        self.hostfile = self.folder / "hostfile"
        self.disk = self.folder / "disk"  # 34 MB, shared by the hosts
        self._started: list[subprocess.Popen] = []
        self._powers: dict[str, subprocess.Popen] = {}
        self._first: dict[str, int] = {}
        self._path = f"{os.environ['PATH']}:/usr/sbin:/sbin"

    def __enter__(self):
        try:
            self._write_files()
            environment = {"PATH": self._path, "FOLDER": str(self.folder)}
            self._switch = self._start(
                ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
                + ["bash", "-ec", _SWITCH],
                environment | {"NAMES": " ".join(self.names)},
            )
            self._until(lambda: (self.folder / "switched-on").exists(), "no switch")
            self._switch_pid = self._first_in(self._switch)
            for name in self.names:
                self.power_on(name)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """Take everything down. The kernel ends all processes of all hosts with the switch."""
        for process in reversed(self._started):
            process.stdin.close()
        for process in reversed(self._started):
            process.wait(20)
        if self._own_folder:
            shutil.rmtree(self.folder)
            return
        for name in ("home", "disk"):  # or others could not start in the same folder
            if (self.folder / name).is_dir():
                shutil.rmtree(self.folder / name)
        for name in ("switched-on", "host_key", "host_key.pub"):
            (self.folder / name).unlink(missing_ok=True)

    def power_on(self, name: str) -> None:
        """Start a host; it has been off."""
        log = self.folder / f"log.{name}"
        log.touch()
        before = log.read_text().count("Server listening")
        inside = ["nsenter", "--target", str(self._switch_pid), "--mount", "--pid"]
        process = self._start(
            [*inside, f"--net=/proc/{self._switch_pid}/root/run/netns/opt-{name}"]
            + ["taskset", "--cpu-list", str(self.names.index(name) % os.cpu_count())]
            + ["unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]
            + ["bash", "-ec", _HOST],
            {
                "PATH": self._path,
                "FOLDER": str(self.folder),
                "KEEP": ":".join(p for p in (str(REPO), sys.prefix) if p.startswith("/tmp/")),
                "NAME": name,
                "ADDRESS": self.addresses[name],
                "SSHD": shutil.which("sshd", path=self._path),
            },
            log,
        )
        self._until(
            lambda: log.read_text().count("Server listening") > before, f"{name} does not start"
        )
        self._first[name], self._powers[name] = self._first_in(process), process

    def power_off(self, name: str) -> None:
        """All processes of a host are gone at once, and nothing tells the others: no connection of
        it is closed."""
        self.cut(name)
        psutil.Process(self._first[name]).kill()
        power = self._powers.pop(name)
        power.wait(20)
        power.stdin.close()
        self._started.remove(power)

    def is_on(self, name: str) -> bool:
        """Whether a host has its power."""
        return name in self._powers

    def cut(self, name: str) -> None:
        """Pull the network cable out of a host."""
        self._in_switch("ip", "link", "set", f"opt-{name}", "down")

    def mend(self, name: str) -> None:
        """Put the cable in again."""
        self._in_switch("ip", "link", "set", f"opt-{name}", "up")

    def slow(self, name: str, rate: str) -> None:
        """Let no more than `rate` (as tc has it: 20mbit) go to a host."""
        how = ("root", "tbf", "rate", rate, "burst", "32kb", "latency", "400ms")
        self._in_switch("tc", "qdisc", "replace", "dev", f"opt-{name}", *how)

    def mount(self, name: str, *arguments) -> None:
        """Run mount(8) in a host's own view of the files."""
        subprocess.run(self.on(name, "mount", *arguments), check=True)

    def on(self, name: str, *command) -> list[str]:
        """The command line, for this machine, that runs a command on a host."""
        enter = ["nsenter", "--target", str(self._first[name])]
        enter += ["--net", "--mount", "--uts", "--pid", "--"]
        # The folder that this process is in is another host's.
        own = ["taskset", "--cpu-list", str(self.names.index(name) % os.cpu_count())]
        return [*enter, *own, "env", f"--chdir={REPO}", *map(str, command)]

    def seen_by(self, name: str, path: Path) -> Path:
        """How this machine gets at what a host sees at `path`."""
        return Path(f"/proc/{self._first[name]}/root{path}")

    def environment(self, **more) -> dict[str, str]:
        """What a user logged in at a host has."""
        return {
            "PATH": f"{Path(sys.executable).parent}:{self._path}",
            "HOME": str(self.folder / "home"),
            "LANG": os.environ.get("LANG", "C.UTF-8"),
            "OMP_NUM_THREADS": "1",
            **more,
        }

    def processes(self, name: str, *parts) -> list[psutil.Process]:
        """A host's processes that have all of these in their command lines."""
        found, its = [], os.readlink(f"/proc/{self._first[name]}/ns/pid")
        for process in psutil.process_iter():
            try:
                line = process.cmdline()
                is_there = os.readlink(f"/proc/{process.pid}/ns/pid") == its
                if is_there and all(any(str(part) in word for word in line) for part in parts):
                    found.append(process)
            except (psutil.Error, OSError):  # over by now
                pass
        return found

    def _write_files(self) -> None:
        home = self.folder / "home"
        (home / ".ssh").mkdir(parents=True, mode=0o700)
        self.hostfile.write_text("".join(f"{name}\n" for name in self.names))
        (self.folder / "hosts").write_text(
            "127.0.0.1 localhost\n"
            + "".join(f"{address} {name}\n" for name, address in self.addresses.items())
        )
        users = Path("/etc/passwd").read_text().splitlines()
        users = [f"root:x:0:0:root:{home}:/bin/bash" if u.startswith("root:") else u for u in users]
        (self.folder / "passwd").write_text("\n".join(users) + "\n")
        for key in (home / ".ssh" / "id_ed25519", self.folder / "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        shutil.copy(home / ".ssh" / "id_ed25519.pub", home / ".ssh" / "authorized_keys")
        public = (self.folder / "host_key.pub").read_text()
        (home / ".ssh" / "known_hosts").write_text(
            "".join(f"{name},{address} {public}" for name, address in self.addresses.items())
        )
        for name, address in self.addresses.items():
            (self.folder / f"sshd_config.{name}").write_text(
                f"ListenAddress {address}\nHostKey {self.folder}/host_key\nPidFile none\n"
                "PermitRootLogin yes\nPasswordAuthentication no\nStrictModes no\nUsePAM no\n"
                f"AuthorizedKeysFile {home}/.ssh/authorized_keys\n"
            )

    def _start(self, command, environment, log=None) -> subprocess.Popen:
        with open(log or self.folder / "log.switch", "a") as file:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=file, stderr=file
            )
        self._started.append(process)
        return process

    def _in_switch(self, *command) -> None:
        target = ["nsenter", "--target", str(self._switch_pid), "--net"]
        subprocess.run([*target, *command], check=True)

    def _first_in(self, started: subprocess.Popen) -> int:
        """Process 1 of the innermost namespace that `unshare` made, by its number here."""
        for process in psutil.Process(started.pid).children(recursive=True):
            status = Path(f"/proc/{process.pid}/status").read_text()
            numbers = next(x for x in status.splitlines() if x.startswith("NSpid:")).split()
            if numbers[-1] == "1":
                return process.pid
        raise RuntimeError(f"{started.args}: its process 1 is gone")

    def _until(self, is_so, else_say, seconds=10) -> None:
        end = time.monotonic() + seconds
        while not is_so():
            if time.monotonic() > end or any(p.poll() for p in self._started):
                logs = [f"{f.name}: {f.read_text()}" for f in self.folder.glob("log.*")]
                raise RuntimeError("\n".join([f"{else_say}", *logs]))
            time.sleep(0.02)


def main() -> int:
    number, *command = sys.argv[1:]
    command = command[1:] or ["bash"]
    with Hosts(int(number)) as hosts:
        print(f"hosts {' '.join(hosts.names)}; HOSTFILE={hosts.hostfile}", file=sys.stderr)
        environment = hosts.environment(HOSTFILE=str(hosts.hostfile))
        return subprocess.run(hosts.on("node0", *command), env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
