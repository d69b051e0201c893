"""cluster/slurm.sbatch under a real slurmctld and three nodes (tests/slurm.py): pre-empted, out of
time, without a node it goes on where it was, bit for bit; cancelled, it saves."""

import sys

import pytest

from . import hosts, slurm
from .conftest import SAMPLE_DATA, SAMPLE_MODEL, kill_all, losses, start
from .test_faults import ENDLESS, SCRIPT
from .test_hosts import until_step

pytestmark = pytest.mark.long
MODEL = ("--model_name_or_path", SAMPLE_MODEL, "--dataset", SAMPLE_DATA)
REASON = hosts.why_not() or slurm.why_not()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if REASON:
        pytest.skip(REASON)
    with hosts.Hosts(3, tmp_path_factory.getbasetemp()) as nodes:
        yield slurm.Slurm(nodes, 3)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The losses of the same two processes when nothing interrupts them."""
    output = tmp_path_factory.mktemp("uninterrupted")
    flags = (*MODEL, "--output_path", output, *map(str, ENDLESS))
    started = start(SCRIPT, *flags, nproc=2, stdout=None, stderr=None)
    try:
        until_step(output, 300, started, seconds=300)
    finally:
        kill_all(started)
    return losses(output)


class Job:
    """cluster/slurm.sbatch, submitted for two nodes, a process each."""

    def __init__(self, cluster, folder, *options):
        self.cluster, self.output, self.log = cluster, folder / "out", folder / "log"
        sizes = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0")
        python = f"--export=ALL,PYTHON={sys.executable}"
        line = ("sbatch", "--parsable", *sizes, python, f"--output={self.log}", *options)
        flags = (*MODEL, "--output_path", self.output, *map(str, ENDLESS), "--save_steps", "10")
        self.number = cluster.do(*line, "cluster/slurm.sbatch", *flags).strip()

    def is_state(self, *states) -> bool:
        return self.cluster.job(self.number)["JobState"] in states

    def until_more_steps(self, more=15) -> "Job":
        """Wait until it runs and has recorded more steps than now."""
        self.cluster.until(lambda: self.is_state("RUNNING"), 90)
        before = len(losses(self.output)) if (self.output / "metrics.jsonl").exists() else 0
        until_step(self.output, before + more)
        return self

    def until_queued_again(self, seconds=120) -> "Job":
        """Wait for that, and spare it the two minutes that SLURM lets such a job wait."""
        self.cluster.until(lambda: self.is_state("PENDING"), seconds)
        self.cluster.do("scontrol", "update", f"JobId={self.number}", "StartTime=now")
        return self

    def is_the_same(self, reference) -> bool:
        found = losses(self.output)
        return len(found) > 25 and found[: len(reference)] == reference[: len(found)]

    def end(self) -> None:
        self.cluster.do("scancel", self.number)
        self.cluster.until(lambda: self.is_state("CANCELLED", "COMPLETED", "FAILED"), 60)


@pytest.fixture
def submit(cluster, tmp_path):
    jobs = []

    def one(*options) -> Job:
        jobs.append(Job(cluster, tmp_path, *options))
        return jobs[-1]

    yield one
    for job in jobs:
        job.end()


def test_preempted_it_goes_on_bit_for_bit(cluster, submit, reference):
    """By a job of a higher partition, which gets the nodes as soon as all is saved."""
    job = submit().until_more_steps()
    line = ("sbatch", "--parsable", "-p", "high", "--nodes=3", "--output=/dev/null")
    other = cluster.do(*line, "--wrap", "srun sleep 3").strip()
    job.until_queued_again()
    said = job.log.read_text()
    assert said.count("SIGUSR1: stopped after step") == 1 and "DUE TO JOB REQUEUE" in said
    cluster.until(lambda: cluster.job(other)["JobState"] == "COMPLETED")
    job.until_more_steps()
    assert "steps done" in job.log.read_text() and job.is_the_same(reference)


def test_out_of_time_it_goes_on_bit_for_bit(submit, reference):
    job = submit("--time=2", "--signal=B:USR1@45").until_more_steps()
    job.until_queued_again(180)
    assert "SIGUSR1: stopped after step" in job.log.read_text()
    job.until_more_steps()
    assert "steps done" in job.log.read_text() and job.is_the_same(reference)


def test_cancelled_it_saves_and_is_not_queued_again(cluster, submit):
    job = submit().until_more_steps()
    cluster.do("scancel", job.number)
    cluster.until(lambda: job.is_state("CANCELLED"), 60)
    saved = f"SIGTERM: stopped after step {len(losses(job.output))}, saved in {job.output}"
    assert saved in job.log.read_text()
    assert (job.output / "checkpoints" / f"step-{len(losses(job.output)):08d}").is_dir()


def test_without_a_node_it_goes_on_on_others_bit_for_bit(cluster, submit, reference):
    """Its power; from the last checkpoint."""
    job = submit().until_more_steps()
    on = cluster.do("scontrol", "show", "hostnames", cluster.job(job.number)["NodeList"]).split()
    victim = next(name for name in on if name != "node0")
    cluster.hosts.power_off(victim)
    job.until_queued_again()
    job.until_more_steps()
    assert victim not in cluster.job(job.number)["NodeList"]
    assert "steps done" in job.log.read_text() and job.is_the_same(reference)
