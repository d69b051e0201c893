"""What fits into the memory that is there: named where a run is refused, and taken with --auto.

The order is that of speed (docs/measured.md): everything on the device, first low_level_zero, then
gemini; batches in parts before layers are computed again; then moments in 8 bits; then Adam in host
memory; tensor parallelism, which needs no less of the GPUs together, only where one cannot hold its
part.
"""

import math
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace

from transformers import OPTConfig

from args import OPTIMS
from opt.colossal.processes import Place
from opt.errors import UserError
from opt.model.kernel_probe import has_bf16
from opt.model.sizes import layer_matrices
from opt.registry import ways_to_hold
from opt.train.checks import check_shape, settle
from opt.train.memory import ERROR, Estimate, Room, RowLengths, estimate, gib

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
    rows: RowLengths
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
            check_shape(self.config, plan)
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
            if plan and self.room.is_surely_enough(needed := self.estimate(plan)):
                return way, needed
        return None


def refuse(case: Case, others: Case | None = None) -> Estimate:
    """What it takes. Raises UserError if that cannot fit, which says what would. `others`: the
    case in which other ways are looked at, where `case` has fewer tokens than training will."""
    needed, room = case.estimate(), case.room
    if not room.is_surely_too_small(needed) or case.flags.ignore_memory_estimate:
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
    yield from filter(None, found)
    states = [state for state, _ in _states(case)]
    if not case.plan.lora_r and case.has_weights:
        lora = {"lora_r": _LORA_R, "optim": OPTIMS[0]}
        states += [lora, lora | {"load_in_4bit": True}]
    elif case.plan.lora_r and not flags.load_in_4bit:
        states.append({"load_in_4bit": True})
    is_enough_so, is_on_host = any(found), False
    for state in states:
        if is_on_host and state.get("offload_optim_frac"):
            continue  # in fewer bits than would do
        # Beside a way that keeps all as it is, one that does not is of use with the batch as it is
        smaller = [] if is_enough_so else _smaller_batches(flags.but(**state))
        checkpoints = [] if is_enough_so else every[-1:]
        ways = [a | b for a in [fused, *checkpoints] for b in [{}, *smaller]]
        held = reversed(list(_fractions(state)))  # what is left on a GPU may be close to too much
        if fit := case.first_that_fits([one | way for one in held for way in ways]):
            is_on_host |= bool(state.get("offload_optim_frac"))
            yield fit


def _smaller_batches(flags: Namespace) -> list[dict]:
    """As many rows a step, in more batches."""
    rows = flags.batch_size * flags.gradient_accumulation_steps
    few = [size for size in range(1, math.isqrt(rows) + 1) if rows % size == 0]
    return [
        {"batch_size": size, "gradient_accumulation_steps": rows // size}
        for size in sorted({*few, *(rows // size for size in few)}, reverse=True)
        if size < flags.batch_size
    ]


def _checkpoints(flags: Namespace) -> list[dict]:
    """From some layers to all."""
    return [
        {"grad_checkpoint": every, "cuda_graph": False}
        for every in _CHECKPOINT
        if not flags.grad_checkpoint or every < flags.grad_checkpoint
    ]


def _states(case: Case) -> Iterator[tuple[dict, str]]:
    """Ways to hold weights, gradients and optimizer, the fastest first, and what is to be said of
    each."""
    if case.here.device.type != "cuda":
        return
    gpus = case.here.world_size
    for plugin, flags, why in ways_to_hold(gpus, has_bf16(case.here.device)):
        own = dict.fromkeys(_OF_PLUGINS) | {"plugin": plugin} | flags
        if "tp_size" in flags:  # one rank has the rows of as many
            own["batch_size"] = case.flags.batch_size * flags["tp_size"]
        yield own, why


def _fractions(state: dict) -> Iterator[dict]:
    """Of a state with Adam in host memory, those with less of it there first: what a step takes
    longer is the host's part of the update."""
    if state.get("offload_optim_frac"):
        for fraction in _FRACTIONS:
            yield state | {"offload_optim_frac": fraction}
    yield state


_FRACTIONS = (0.25, 0.5, 0.75)
_OF_PLUGINS = ("plugin", "zero_stage", "tp_size", "pp_size", "num_microbatches")
_OF_PLUGINS += ("offload_optim_frac",)


# ---- --auto

_FEW_TOKENS = 4096  # of a batch: with fewer the GPU is slower (docs/measured.md, 8 rows and 16)
# Multiply-adds of a layer, OPT-350m's of 24 rows of 1,024 tokens: with fewer the host is slower
# than the GPU, and replayed steps are faster (docs/measured.md, 350m)
_GRAPH_WORK = 24 * 1024 * 12 * 1024**2


def choose(case: Case) -> tuple[Case, list[str]]:
    """--auto: the case with the flags that were chosen, and why, a line each. Raises UserError
    where nothing fits, which says what to do instead."""
    given = set(case.flags.auto)
    states = [({}, "as given")]
    if not given & set(_OF_PLUGINS):
        states = list(_states(case)) or [({}, "the fastest on a CPU")]
        if "optim" in given:
            states = [(state, why) for state, why in states if "optim" not in state]
    for is_enough in (case.room.is_surely_enough, case.room.is_enough):
        for number, state, why, way in _courses(case, states, given):
            if plan := case.plan_with(state | way):
                needed = case.estimate(plan)
                if is_enough(needed):
                    flags = case.flags.but(**state | way)
                    passed = [other for other, _ in states[:number]]
                    said = _reasons(case, plan, needed, why, passed)
                    return replace(case, flags=flags, plan=plan), said
    refuse(case)
    return case, ["as given: nothing is sure to fit"]


def _courses(case: Case, states: list[tuple[dict, str]], given: set[str]) -> Iterator[tuple]:
    """What is tried, the fastest first: the state's number, its flags and why, and the flags of
    batches and checkpointing.

    States that keep all of Adam on the GPUs, in fp32, go together from pace to pace: none of them
    is as slow as computing layers again. Any other goes alone through all its paces. On two GPUs:
    low_level_zero, its stage 2, gemini, each in large batches; the same three with layers computed
    again; the three in small batches; then low_level_zero with moments in 8 bits, at each pace;
    gemini with Adam in host memory, at each pace; ...
    """
    groups: dict[int, list[int]] = {}
    for number, (state, _) in enumerate(states):
        is_whole = not any(state.get(f) for f in ("optim", "offload_optim_frac", "tp_size"))
        groups.setdefault(-1 if is_whole else number, []).append(number)
    for numbers in groups.values():
        paces = [_paces(case, states[number][0], given) for number in numbers]
        for at_a_pace in zip(*paces, strict=True):
            for number, ways in zip(numbers, at_a_pace, strict=True):
                state, why = states[number]
                yield from ((number, s, why, way) for way in ways for s in _fractions(state))


def _paces(case: Case, state: dict, given: set[str]) -> tuple[list[dict], ...]:
    """Batches and checkpointing in three paces: large batches, in parts if need be; the same with
    some layers computed again; small batches."""
    flags = case.flags.but(**state)
    parts = [{}, *([] if "gradient_accumulation_steps" in given else _smaller_batches(flags))]
    length = case.rows.tokens(case.plan) / case.plan.batch_size
    large = [way for way in parts if not way or way["batch_size"] * length >= _FEW_TOKENS]
    every = [] if {"grad_checkpoint", "cuda_graph"} & given else _checkpoints(flags)
    losses = [{}]
    if "fused_loss" not in given:  # on a GPU it is faster in any case
        losses = [{"fused_loss": True}]
        losses = losses if case.here.device.type == "cuda" else [{}, *losses]
    fastest = losses
    of_layer = layer_matrices(case.config) / case.config.num_hidden_layers
    if (
        not {"cuda_graph", "load_in_4bit"} & given
        and case.rows.tokens(case.plan) * of_layer <= _GRAPH_WORK
        and case.here.device.type == "cuda"
    ):
        fastest = [loss | {"cuda_graph": True} for loss in losses] + losses
    return (
        [loss | way for way in large for loss in fastest],
        [losses[-1] | checkpoint | way for checkpoint in every for way in large],
        [losses[-1] | checkpoint | way for checkpoint in [*every[-1:], {}] for way in parts],
    )


def _reasons(
    case: Case, plan: Namespace, needed: Estimate, why: str, passed: list[dict]
) -> list[str]:
    """What was chosen, a line each."""
    room, is_on_gpu = case.room, case.room.device is not None
    there = room.device if is_on_gpu else room.host

    def takes(estimated: Estimate) -> str:
        return gib(estimated.device if is_on_gpu else estimated.host * room.local)

    def without(**changes) -> str:
        return f"{takes(case.estimate(plan.but(**changes)))} GiB without"

    lines = [
        f"{takes(needed)} of {gib(there)} GiB {'on each GPU' if is_on_gpu else 'in host memory'}"
    ]
    said = f"plugin {_held(plan)}: {why}"
    if passed:
        slowest = {"batch_size": 1, "grad_checkpoint": 1, "fused_loss": True, "cuda_graph": False}
        before = case.plan_with(passed[-1] | slowest)
        if before:
            least = f"{_held(before)} takes {takes(case.estimate(before))} at least"
            said += f"; {least}, a row at a time and all layers computed again"
    lines.append(said)
    asked = plan.batch_size * plan.gradient_accumulation_steps
    batch = f"batch {plan.batch_size} rows x {plan.gradient_accumulation_steps} accumulated"
    if plan.gradient_accumulation_steps > case.flags.gradient_accumulation_steps:
        whole = {"batch_size": asked, "gradient_accumulation_steps": 1}
        batch += f": {without(**whole).removesuffix(' without')} with {asked} at once"
    else:
        batch += ": they fit at once"
    lines.append(batch)
    if plan.grad_checkpoint and not case.flags.grad_checkpoint:
        lines.append(
            f"checkpointing of every {_nth(plan.grad_checkpoint)}layer: "
            f"{without(grad_checkpoint=0)}"
        )
    elif not plan.grad_checkpoint:
        lines.append("checkpointing: none, it fits without")
    if plan.fused_loss and not case.flags.fused_loss:
        lines.append(f"fused loss: {without(fused_loss=False)}" + ", and slower" * is_on_gpu)
    if plan.cuda_graph and not case.flags.cuda_graph:
        lines.append("CUDA graphs: short steps do not wait for the host")
    return lines


def _held(plan: Namespace) -> str:
    """A plan's way to hold weights, gradients and optimizer."""
    return (
        plan.plugin
        + f" --zero_stage {plan.zero_stage}" * (plan.zero_stage > 1)
        + f" --tp_size {plan.tp_size}" * (plan.tp_size > 1)
        + f" --offload_optim_frac {plan.offload_optim_frac:g}" * (plan.offload_optim_frac > 0)
        + f" --optim {plan.optim}" * (plan.optim != OPTIMS[0])
    )


def _nth(number: int) -> str:
    return {1: "", 2: "2nd "}.get(number, f"{number}th ")
