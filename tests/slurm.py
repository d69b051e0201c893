"""SLURM on the hosts of tests/hosts.py: a slurmctld on node0, a slurmd and a munged on each, Debian's
slurm-wlm and munge."""

import shutil
import subprocess
import time
from pathlib import Path

from .hosts import Hosts

_TOOLS = ("slurmctld", "slurmd", "sbatch", "munged")

# Two partitions on the same nodes: jobs of "high" pre-empt those of "low", which have `grace` s.
_CONF = """
ClusterName=opt
SlurmctldHost=node0
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
StateSaveLocation={folder}/slurm/state
SlurmdSpoolDir={folder}/slurm/spool.%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurm/slurmctld.log
SlurmdLogFile={folder}/slurm/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=30
OverTimeLimit=0
JobRequeue=1
MailProg=/bin/true
SchedulerParameters=sched_interval=2,bf_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName={nodes} CPUs=1 State=UNKNOWN
PartitionName=low Nodes={nodes} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes={nodes} PriorityTier=2 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Why there can be no SLURM here; None if there can."""
    if missing := [tool for tool in _TOOLS if not shutil.which(tool, path="/usr/sbin:/usr/bin")]:
        return f"SLURM needs {', '.join(missing)} (Debian: slurm-wlm, munge)"
    return None


class Slurm:
    """Daemons on the first `number` of `hosts`; they end with those."""

    def __init__(self, hosts: Hosts, number: int, grace: int = 60):
        self.hosts, self.nodes = hosts, hosts.names[:number]
        self.folder = hosts.folder / "slurm"
        (self.folder / "state").mkdir(parents=True)
        text = _CONF.format(folder=hosts.folder, nodes=",".join(self.nodes), grace=grace)
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "munge.key").write_bytes(b"k" * 128)
        (self.folder / "munge.key").chmod(0o400)
        for name in self.nodes:
            self.start(name)
        self.do("slurmctld")
        self.until(lambda: set(self.do("sinfo", "-hN", "-o", "%T").split()) == {"idle"}, 30)

    def start(self, name: str) -> None:
        """Start the daemons of a node."""
        self._on(name, "mkdir", "-p", "/run/munge", "/run/log", self.folder / f"spool.{name}")
        files = ["--key-file", self.folder / "munge.key", "--pid-file", "/run/munge/pid"]
        files += ["--seed-file", "/run/munge/seed", "--log-file", "/run/munge/log"]
        self._on(name, "munged", "--force", *files)
        self._on(name, "slurmd", "-N", name)

    def do(self, *command) -> str:
        """Run a command of SLURM's on node0; what it says."""
        return self._on("node0", *command)

    def job(self, number: str) -> dict[str, str]:
        """What scontrol shows of a job."""
        shown = self.do("scontrol", "show", "job", "-o", number).split()
        return dict(word.split("=", 1) for word in shown if "=" in word)

    def until(self, is_so, seconds=60) -> None:
        """Wait until something is so."""
        end = time.monotonic() + seconds
        while not is_so():
            if time.monotonic() > end:
                logs = sorted(self.folder.glob("*.log"))
                said = [f"{f.name}: {f.read_text()[-3000:]}" for f in logs]
                raise AssertionError("\n".join([self.do("squeue"), self.do("sinfo"), *said]))
            time.sleep(0.3)

    def _on(self, name: str, *command) -> str:
        environment = self.hosts.environment(SLURM_CONF=str(Path(self.folder, "slurm.conf")))
        done = subprocess.run(
            self.hosts.on(name, *command), env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise AssertionError(f"{command}: {done.stdout}{done.stderr}")
        return done.stdout
