"""What fits into the memory that is there: named where a run is refused."""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

from transformers import OPTConfig

from opt.colossal.processes import Place
from opt.errors import UserError
from opt.train.checks import settle
from opt.train.memory import ERROR, Estimate, Room, Rows, estimate, gib

_NAMED = 3  # other ways that a refusal names
_CHECKPOINT = (4, 2, 1)  # every n-th layer
_LORA_R = 16


@dataclass(frozen=True)
class Case:
    """A run whose memory is asked for."""

    flags: Namespace  # as they were given
    plan: Namespace  # what that means
    config: OPTConfig
    here: Place
    rows: Rows
    room: Room
    reading: float = 0  # see Weights.reading_bytes
    has_weights: bool = True  # to train adapters beside

    def estimate(self, plan: Namespace | None = None) -> Estimate:
        """Of this run, or of another `plan`."""
        return estimate(
            plan or self.plan, self.config, self.rows, self.here.device.type, self.reading
        )

    def plan_with(self, changes: dict) -> Namespace | None:
        """The plan if these flags had been given besides; None where they do not go together."""
        try:
            plan = settle(self.flags.but(**changes), self.here)
        except UserError:
            return None
        settled = ["max_length", "block_size", "padding_free"]
        if getattr(self.plan, "lora_adapter", None):
            settled += [name for name in vars(self.plan) if name.startswith("lora_")]
        kept = {name: getattr(self.plan, name) for name in settled if hasattr(self.plan, name)}
        return plan.but(**kept)

    def first_that_fits(self, ways: list[dict]) -> tuple[dict, Estimate] | None:
        """Of several ways, each some flags that are other than given, and what it takes."""
        for way in ways:
            plan = self.plan_with(way)
            if plan and self.room.is_enough(needed := self.estimate(plan)):
                return way, needed
        return None


def refuse(case: Case, others: Case | None = None) -> Estimate:
    """What it takes. Raises UserError if that cannot fit, which says what would. `others`: the
    case in which other ways are looked at, where `case` has fewer tokens than training will."""
    needed, room = case.estimate(), case.room
    if room.lacks(needed, ERROR) <= 0:
        return needed
    is_device = room.device is not None and needed.device / (1 + ERROR) > room.device
    takes = needed.device if is_device else needed.host * room.local
    there = room.device if is_device else room.host
    where = "on each GPU" if is_device else "of host memory on a node"
    line = (
        f"it would take about {gib(takes)} GiB {where}, {gib(takes - there)} more than the "
        f"{gib(there)} that are there (an estimate)"
    )
    found = list(_others(others or case))[:_NAMED]
    if not found:
        raise UserError(f"{line}: use more processes, shorter rows or a smaller model")
    said = []
    for way, needed in found:
        takes = needed.device if is_device else needed.host * room.local
        said.append(f"{words(way, case.flags)} {'' if said else 'fits '}in {gib(takes)}")
    raise UserError(f"{line}: {'; '.join(said)}")


def words(way: dict, flags: Namespace) -> str:
    """Flags as they are written; what is only taken back is left out, but switches that were on."""
    said = []
    for name, value in way.items():
        if value == getattr(flags, name):
            continue
        if value is True:
            said.append(f"--{name}")
        elif value not in (None, False):
            said.append(f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}")
        elif value is False:
            said.append(f"without --{name}")
    return " ".join(said)


def _others(case: Case) -> Iterator[tuple[dict, Estimate]]:
    """What fits, the nearest to what was asked first."""
    flags = case.flags
    fused = {} if flags.fused_loss else {"fused_loss": True}
    smaller = [fused | way for way in _smaller_batches(flags)]
    every = [fused | way for way in _checkpoints(flags)]
    found = [case.first_that_fits(ways) for ways in ([fused] if fused else [], smaller, every)]
    if not any(found):
        found = [case.first_that_fits([a | b for a in every for b in smaller])]
    states = list(_states(case))
    if not case.plan.lora_r and case.has_weights:
        lora = {"lora_r": _LORA_R}
        states += [lora, lora | {"load_in_4bit": True}]
    elif case.plan.lora_r and not flags.load_in_4bit:
        states.append({"load_in_4bit": True})
    yield from filter(None, found)
    enough = [way for way, _ in filter(None, found)]
    for state in states:
        # From where it is enough without this state on it says nothing new
        combined = [a | b for a in [fused, *every[-1:]] for b in [{}, *smaller]]
        ways = takewhile(lambda way: way not in enough, combined)
        if fit := case.first_that_fits([state | way for way in ways]):
            yield fit


def _smaller_batches(flags: Namespace) -> list[dict]:
    """As many rows a step, in more batches."""
    rows = flags.batch_size * flags.gradient_accumulation_steps
    return [
        {"batch_size": size, "gradient_accumulation_steps": rows // size}
        for size in range(flags.batch_size - 1, 0, -1)
        if rows % size == 0
    ]


def _checkpoints(flags: Namespace) -> list[dict]:
    """From some layers to all."""
    return [
        {"grad_checkpoint": every, "cuda_graph": False}
        for every in _CHECKPOINT
        if not flags.grad_checkpoint or every < flags.grad_checkpoint
    ]


def _states(case: Case) -> Iterator[dict]:
    """Other ways to hold weights, gradients and optimizer, the fastest first."""
    if case.here.device.type != "cuda":
        return
    of_plugins = ("plugin", "zero_stage", "tp_size", "pp_size", "num_microbatches")
    own = dict.fromkeys((*of_plugins, "offload_optim_frac"))
    several = case.here.world_size > 1
    if several:
        yield own | {"plugin": "low_level_zero", "zero_stage": 2}
        yield own | {"plugin": "gemini", "cuda_graph": False}
    yield own | {"plugin": "gemini", "offload_optim_frac": 1.0, "cuda_graph": False}
    if several:
        sizes = [n for n in (2, 4, 8) if case.here.world_size % n == 0]
        for size in sizes:
            yield own | {"plugin": "hybrid_parallel", "tp_size": size}
