"""What a campaign measures, the most important first: benchmarks/campaign.py runs it.

python -m benchmarks.measurements        prints the list, a name and what runs for it a line
"""

import itertools
from dataclasses import dataclass

from benchmarks.peers import ENGINES
from opt.registry import PLUGINS

# Timed steps in each of three blocks, by model: what takes seconds is timed less often.
STEPS = {"125m": 12, "350m": 10, "6.7b": 3, "13b": 2, "30b": 2, "66b": 1, "175b": 1}
FAST = "--compile --fused_loss"
# A plugin in the form that is fastest for long rows, and each peer in its best one: where it is not
# known before, in both.
IN_BEST_FORM = {
    "low_level_zero": f"low_level_zero {FAST}",
    "deepspeed_zero2": "deepspeed_zero2 --fused_loss",
    "gemini": f"gemini {FAST}",
    "fsdp2": "fsdp2 --fused_loss",
    "hybrid_parallel": f"hybrid_parallel {FAST}",
    "torch_amp": "torch_amp --fused_loss",
    "torch_ddp": f"torch_ddp {FAST}",
    "hf_trainer-liger": "hf_trainer --fused_loss",
    "hf_trainer": "hf_trainer",
    "low_level_zero-fp8": f"low_level_zero {FAST} --fp8",
    "torch_amp-fp8": "torch_amp --fused_loss --fp8",
    "fsdp2-fp8": "fsdp2 --fused_loss --fp8",
    "deepspeed_zero3": "deepspeed_zero3 --fused_loss",
    "torch_ddp_fp16": f"torch_ddp_fp16 {FAST}",
    "deepspeed_zero2-own-loss": "deepspeed_zero2",
}
GRAPHED = "low_level_zero --fused_loss --cuda_graph"
OFFLOADED = f"gemini {FAST} --offload_optim_frac 1"
IN_16_BITS = "--optim adamw_anyprecision"
LORA = "--fused_loss --lora_r 16 --lora_alpha 32"
# What holds on several GPUs as well: the plugins, and peers
SEVERAL = ("low_level_zero", "gemini", "torch_ddp", "fsdp2", "deepspeed_zero2")
LARGE = (100, float("inf"))  # GiB of an H200
SMALL = (0, 100)  # of an H100


@dataclass(frozen=True)
class Measurement:
    """One process on each of `gpus` GPUs."""

    name: str  # what --only and report.py pick it by: model-rows[-xGPUs]-what
    gpus: int
    engine: str  # a plugin, a peer, or "demo": bash run_demo.sh
    flags: tuple[str, ...] = ()
    # From the launch, as a user starts it, not forked off a process that has imported everything:
    # its first step counts, and its host memory is its own.
    launched: bool = False
    alone: bool = False  # with nothing beside it: it fills the host's memory and cores
    on_cpu: bool = False  # for machines without a GPU, the others for those that have one
    gib: tuple[float, float] = (0, float("inf"))  # of the GPUs that it is for: from, to


def measured(
    name: str, gpus: int, model: str, rows: int, command: str, timed: int | None = None, **more
) -> Measurement:
    """`command`: the engine and flags of its own; `timed`: other than STEPS has it."""
    engine, *flags = command.split()
    timed = timed or STEPS.get(model, 5)
    steps = ("--repeats", 3, "--max_train_steps", timed, "--warmup_steps", min(4, timed))
    work = ("--model_name_or_path", model, "--batch_size", rows)
    several = [f"x{gpus}"] if gpus > 1 else []
    name = "-".join([model.removeprefix("sample/"), str(rows), *several, name])
    return Measurement(name, gpus, engine, tuple(map(str, (*work, *flags, *steps))), **more)


def side_by_side(model: str, rows: int, names=tuple(IN_BEST_FORM), gpus: int = 1, **more):
    """Engines on the same work."""
    for name in names:
        yield measured(name, gpus, model, rows, IN_BEST_FORM[name], **more)


def adapters(model: str, rows: int, *more: str):
    """LoRA, and PEFT's in the precision in which it is fastest."""
    lora = " ".join([LORA, *more])
    yield measured("lora", 1, model, rows, f"low_level_zero --compile {lora}")
    yield measured("lora-peft", 1, model, rows, f"peft_bf16 {lora}")


def in_four_bits(model: str, rows: int, **more):
    lora = f"{LORA} --grad_checkpoint"
    yield measured("lora-4bit", 1, model, rows, f"low_level_zero {lora} --load_in_4bit", **more)
    yield measured("lora-4bit-peft", 1, model, rows, f"peft_4bit {lora} --no_compile", **more)


def offloaded(model: str, rows: int):
    """Adam in host memory, each alone on the host's cores."""
    engines = {"offload": OFFLOADED, "offload-deepspeed": "deepspeed_offload --fused_loss"}
    for name, engine in engines.items():
        yield measured(name, 1, model, rows, engine, timed=3, alone=True)


def in_eight_bits(model: str, rows: int):
    """All parameters trained, Adam's state in 8 bits."""
    ours = f"low_level_zero {FAST} --optim adamw_8bit"
    yield measured("8bit", 1, model, rows, ours)
    yield measured("8bit-bitsandbytes", 1, model, rows, "bnb_8bit --fused_loss")
    yield measured("8bit-fp8", 1, model, rows, f"{ours} --fp8")


def costs(model: str, rows: int):
    """Less kept for backward, more computed again: the table of docs/memory.md."""
    every = [f"grad_checkpoint {n}" for n in (4, 2, 1)]
    budgets = [f"activation_memory_budget {share:g}" for share in (0.8, 0.5, 0.2, 0, 1)]
    for given in every + budgets:
        name = given.replace(" ", "-")
        yield measured(name, 1, model, rows, f"low_level_zero {FAST} --{given}")


def cut(gpus: int, model: str, rows: int, *forms: str):
    """Layers cut over the GPUs, and by PyTorch's own hand."""
    yield from hybrid("tp", gpus, model, rows, f"--tp_size {gpus}", *forms)
    yield measured("tp-torch_tp", gpus, model, rows, "torch_tp --fused_loss")


def staged(gpus: int, model: str, rows: int, microbatches: int, *forms: str):
    """Layers dealt out to the GPUs."""
    sizes = f"--pp_size {gpus} --num_microbatches {microbatches}"
    yield from hybrid("pp", gpus, model, rows, sizes, *forms)


def hybrid(name: str, gpus: int, model: str, rows: int, sizes: str, *forms: str):
    """hybrid_parallel, compiled, and with each of `forms` besides: recorded as CUDA graphs."""
    for form in forms:
        command = f"hybrid_parallel {FAST} {sizes} {form}"
        yield measured(name + form.replace("--", "-"), gpus, model, rows, command)


def short_rows(gpus: int, name: str, engine: str):
    """The demo's kind, recorded."""
    flags = "--fused_loss --cuda_graph --seq_length 64"
    yield measured(f"{name}-short", gpus, "350m", 32, f"{engine} {flags}")


def on_several(gpus: int, model: str, names=SEVERAL):
    """As many rows on each as on one alone."""
    yield from side_by_side(model, 16, names, gpus)
    if model == "350m":
        yield measured("cuda_graph", gpus, model, 16, GRAPHED)


def demo(gpus: int, *flags: str):
    """Ten epochs."""
    several = [f"x{gpus}"] if gpus > 1 else []
    name = "-".join(["demo", *several, *(flag.lstrip("-") for flag in flags)])
    yield Measurement(name, gpus, "demo", flags, launched=True)


def on_a_cpu():
    """Beside a plain loop, which is torch_amp not compiled."""
    short = "--seq_length 128 --precision fp32 --dropout 0.1"
    engines = ("torch_ddp", "torch_amp --no_compile")
    peers = ("fsdp2 --no_compile", "deepspeed_zero2 --no_compile")
    for model, names in (("sample/opt-tiny", engines + peers), ("125m", engines)):
        for engine in names:
            name = engine.split()[0]
            yield measured(f"cpu-{name}", 1, model, 4, f"{engine} {short}", on_cpu=True)
    tiny = ("sample/opt-tiny", 4, f"torch_ddp {short}")
    yield measured("cpu-torch_ddp", 2, *tiny, on_cpu=True)
    cut = f"torch_tp --no_compile {short}"
    yield measured("cpu-torch_tp", 2, "sample/opt-tiny", 4, cut, on_cpu=True)
    yield measured("cpu-first_step", 1, *tiny, on_cpu=True, launched=True)


def everything():
    """In the order in which they are run: what has a target first, on one GPU, two and four, as
    many GPUs together as can be so that none waits for the others; then the breadth."""
    yield from side_by_side("1.3b", 16)
    yield from demo(1)
    yield from demo(1, "--fp8")
    yield from in_eight_bits("6.7b", 8)
    yield from adapters("6.7b", 8)
    yield measured("lora-fp8", 1, "6.7b", 8, f"low_level_zero --compile {LORA} --fp8")
    yield from adapters("13b", 4)
    yield from in_four_bits("30b", 4)
    names = ("low_level_zero", "low_level_zero-fp8", "torch_amp-fp8", "deepspeed_zero2")
    yield from side_by_side("2.7b", 8, names)
    yield from costs("1.3b", 16)
    yield from short_rows(1, "low_level_zero", "low_level_zero")

    yield from cut(2, "6.7b", 8, "--cuda_graph")
    yield from cut(2, "1.3b", 16, "--cuda_graph")
    yield from staged(2, "6.7b", 16, 8, "--cuda_graph")
    yield from staged(2, "1.3b", 16, 8, "--cuda_graph")
    yield from staged(2, "1.3b", 64, 8, "--cuda_graph")
    yield from short_rows(2, "tp", "hybrid_parallel --tp_size 2")
    yield from short_rows(2, "pp", "hybrid_parallel --pp_size 2")
    yield from on_several(2, "1.3b")

    yield from on_several(4, "1.3b", SEVERAL[:3])
    both = "--tp_size 2 --pp_size 2"
    yield from hybrid("tp2pp2", 4, "1.3b", 64, f"{both} --num_microbatches 8", "--cuda_graph")
    yield from short_rows(4, "tp2pp2", f"hybrid_parallel {both}")
    stage2 = f"low_level_zero {FAST} --zero_stage 2"
    yield measured("low_level_zero-2", 4, "13b", 8, stage2, gib=LARGE)
    yield measured("low_level_zero-2", 4, "13b", 3, stage2, gib=SMALL)
    held = ((8, LARGE), (4, SMALL))  # rows of what spreads all
    for rows, gib in held:
        yield from side_by_side("13b", rows, ("gemini",), 4, gib=gib)
    yield from hybrid("tp", 4, "6.7b", 8, "--tp_size 4", "--cuda_graph")
    yield from staged(4, "6.7b", 32, 16, "--cuda_graph")
    yield from offloaded("1.3b", 16)
    for rows, gib in held:
        yield from side_by_side("13b", rows, ("fsdp2", "deepspeed_zero3"), 4, gib=gib)
    yield from cut(4, "1.3b", 16, "--cuda_graph")
    yield from on_several(4, "1.3b", ("fsdp2",))

    yield from side_by_side("350m", 16)
    yield measured("cuda_graph", 1, "350m", 16, GRAPHED)
    in_16_bits = f"{OFFLOADED} {IN_16_BITS}"
    yield measured("offload-16bit", 1, "1.3b", 16, in_16_bits, timed=3, alone=True)
    yield from in_four_bits("66b", 4)
    # Not DeepSpeed's, which asks for more than hosts have
    yield measured("offload", 1, "6.7b", 8, OFFLOADED, timed=2)
    stages = "hybrid_parallel --pp_size 2 --num_microbatches 4"
    in_4bit = f"{stages} {LORA} --grad_checkpoint --load_in_4bit"
    yield measured("lora-4bit-pp", 2, "175b", 4, in_4bit)
    yield from in_eight_bits("1.3b", 16)
    yield from adapters("30b", 4, "--grad_checkpoint")
    for engine in ("low_level_zero", "torch_amp", "deepspeed_zero2", "hf_trainer-liger"):
        command = IN_BEST_FORM[engine]
        yield measured(f"first_step-{engine}", 1, "350m", 16, command, launched=True)
    yield measured("first_step", 1, "1.3b", 16, IN_BEST_FORM["low_level_zero"], launched=True)

    known = ("low_level_zero", "deepspeed_zero2", "gemini", "torch_amp", "fsdp2", "torch_ddp")
    for model, rows in (("1.3b", 8), ("1.3b", 32), ("350m", 32), ("350m", 8), ("350m", 64)):
        yield from side_by_side(model, rows, known)
        if model == "350m":
            yield measured("cuda_graph", 1, model, rows, GRAPHED)
    for rows in (16, 32, 8, 64):
        yield from side_by_side("125m", rows, known)
        yield measured("cuda_graph", 1, "125m", rows, GRAPHED)
    yield from side_by_side("2.7b", 8, ("torch_amp", "fsdp2", "fsdp2-fp8", "hf_trainer-liger"))
    yield from demo(4)
    yield from demo(2)

    # What is left where there is time for more
    for model, rows in (("6.7b", 8), ("1.3b", 16)):
        yield from hybrid("tp", 2, model, rows, "--tp_size 2", "")
    yield from staged(2, "6.7b", 16, 8, "")
    yield from on_several(4, "1.3b", ("deepspeed_zero2",))
    yield measured("tp-torch_tp", 4, "6.7b", 8, "torch_tp --fused_loss")
    yield measured("low_level_zero-2", 4, "6.7b", 8, stage2)
    yield measured("low_level_zero-2-fp8", 4, "6.7b", 8, f"{stage2} --fp8")
    yield from side_by_side("6.7b", 8, ("gemini", "fsdp2", "fsdp2-fp8", "deepspeed_zero3"), 4)
    yield from on_several(4, "350m")
    yield from on_several(2, "350m")
    yield measured("offload-16bit", 1, "13b", 4, f"{in_16_bits} --grad_checkpoint", timed=1)
    for model, rows in (("2.7b", 8), ("350m", 16), ("1.3b", 32), ("1.3b", 64)):
        yield from offloaded(model, rows)
    yield from in_four_bits("175b", 1, gib=LARGE)
    yield from on_a_cpu()


def checked(found: list[Measurement]) -> list[Measurement]:
    """Raises ValueError for a name that stands for two, or an engine that is none."""
    for one, other in itertools.combinations(found, 2):
        if one.name == other.name:
            raise ValueError(f"two measurements are called {one.name}")
    for one in found:
        if one.engine not in (*PLUGINS, *ENGINES, "demo"):
            raise ValueError(f"{one.name}: {one.engine} is no engine")
    return found


MEASUREMENTS = checked(list(everything()))

if __name__ == "__main__":
    for one in MEASUREMENTS:
        print(f"{one.name:32} {one.gpus}  {one.engine} {' '.join(one.flags)}")
