"""What a campaign measures, the most important first: benchmarks/campaign.py runs it.

python -m benchmarks.measurements        prints the list, a name and what runs for it a line
"""

import itertools
from dataclasses import dataclass

from benchmarks.peers import ENGINES
from opt.registry import PLUGINS

# Timed steps in each of three blocks, by model: what takes seconds is timed less often.
STEPS = {"125m": 20, "350m": 15, "30b": 2, "66b": 2, "175b": 1}
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
    "deepspeed_zero3": "deepspeed_zero3 --fused_loss",
    "torch_ddp_fp16": f"torch_ddp_fp16 {FAST}",
    "deepspeed_zero2-own-loss": "deepspeed_zero2",
}
GRAPHED = "low_level_zero --fused_loss --cuda_graph"
# What holds on several GPUs as well
SEVERAL = ("low_level_zero", "gemini", "torch_ddp", "fsdp2", "deepspeed_zero2")


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


def measured(name: str, gpus: int, model: str, rows: int, command: str, **more) -> Measurement:
    """`command`: the engine and flags of its own."""
    engine, *flags = command.split()
    timed = STEPS.get(model, 5)
    steps = ("--repeats", 3, "--max_train_steps", timed, "--warmup_steps", min(4, timed))
    work = ("--model_name_or_path", model, "--batch_size", rows)
    several = [f"x{gpus}"] if gpus > 1 else []
    name = "-".join([model.removeprefix("sample/"), str(rows), *several, name])
    return Measurement(name, gpus, engine, tuple(map(str, (*work, *flags, *steps))), **more)


def side_by_side(model: str, rows: int, names=tuple(IN_BEST_FORM), gpus: int = 1):
    """Engines on the same work."""
    for name in names:
        yield measured(name, gpus, model, rows, IN_BEST_FORM[name])


def adapters(model: str, rows: int, *more: str):
    """LoRA, and PEFT's in the precision in which it is fastest."""
    lora = " ".join(["--fused_loss --lora_r 16 --lora_alpha 32", *more])
    yield measured("lora", 1, model, rows, f"low_level_zero --compile {lora}")
    yield measured("lora-peft", 1, model, rows, f"peft_bf16 {lora}")


def in_four_bits(model: str, rows: int):
    lora = "--fused_loss --lora_r 16 --lora_alpha 32 --grad_checkpoint"
    yield measured("lora-4bit", 1, model, rows, f"low_level_zero {lora} --load_in_4bit")
    yield measured("lora-4bit-peft", 1, model, rows, f"peft_4bit {lora} --no_compile")


def offloaded(model: str, rows: int):
    """Adam in host memory."""
    ours = f"gemini {FAST} --offload_optim_frac 1"
    yield measured("offload", 1, model, rows, ours, alone=True)
    if model != "6.7b":  # for which the host's memory ends, and with it more than this process
        peer = "deepspeed_offload --fused_loss"
        yield measured("offload-deepspeed", 1, model, rows, peer, alone=True)


def in_eight_bits(model: str, rows: int):
    """All parameters trained, Adam's state in 8 bits."""
    yield measured("8bit", 1, model, rows, f"low_level_zero {FAST} --optim adamw_8bit")
    yield measured("8bit-bitsandbytes", 1, model, rows, "bnb_8bit --fused_loss")


def parallel(gpus: int):
    """Layers and stages cut over the GPUs, and what does without."""
    hybrid = f"hybrid_parallel {FAST}"
    staged = f"{hybrid} --pp_size {gpus} --num_microbatches 8"
    yield measured("tp", gpus, "1.3b", 16, f"{hybrid} --tp_size {gpus}")
    yield measured("pp", gpus, "1.3b", 16, staged)
    yield measured("tp", gpus, "6.7b", 8, f"{hybrid} --tp_size {gpus}")
    yield measured("pp", gpus, "6.7b", 16, staged)
    yield measured("pp-cuda_graph", gpus, "1.3b", 64, f"{staged} --cuda_graph")
    graphed = f"hybrid_parallel --fused_loss --cuda_graph --tp_size {gpus}"
    yield measured("tp-cuda_graph", gpus, "350m", 32, f"{graphed} --seq_length 64")
    if gpus == 4:
        yield measured("tp2pp2", gpus, "1.3b", 16, f"{hybrid} --tp_size 2 --pp_size 2")
        yield measured("low_level_zero-2", 4, "6.7b", 8, f"low_level_zero {FAST} --zero_stage 2")
        yield measured("gemini", 4, "6.7b", 8, f"gemini {FAST}")
        yield measured("fsdp2", 4, "6.7b", 8, "fsdp2 --fused_loss")
        yield measured("deepspeed_zero3", 4, "6.7b", 8, "deepspeed_zero3 --fused_loss")


def on_several(gpus: int, model: str):
    """As many rows on each as on one alone."""
    yield from side_by_side(model, 16, SEVERAL, gpus)
    if model == "350m":
        yield measured("cuda_graph", gpus, model, 16, GRAPHED)


def demo(gpus: int):
    several = f"-x{gpus}" if gpus > 1 else ""
    yield Measurement(f"demo{several}", gpus, "demo", launched=True)


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
    yield measured("cpu-first_step", 1, *tiny, on_cpu=True, launched=True)


def everything():
    """In the order in which they are run."""
    yield from side_by_side("1.3b", 16)
    yield from side_by_side("350m", 16)
    yield measured("cuda_graph", 1, "350m", 16, GRAPHED)
    yield from demo(1)
    yield from in_eight_bits("6.7b", 8)
    yield from adapters("6.7b", 8)
    lora = f"low_level_zero {FAST} --fp8 --lora_r 16 --lora_alpha 32"
    yield measured("lora-fp8", 1, "6.7b", 8, lora)
    yield from adapters("13b", 4)
    yield from in_four_bits("30b", 4)
    first = f"low_level_zero {FAST}"
    yield measured("first_step", 1, "350m", 16, first, launched=True)
    yield from side_by_side(
        "2.7b", 8, ("low_level_zero", "low_level_zero-fp8", "torch_amp-fp8", "deepspeed_zero2")
    )

    yield from on_several(4, "1.3b")
    yield from demo(4)
    yield from parallel(2)
    yield from parallel(4)
    yield from on_several(2, "1.3b")
    yield from on_several(4, "350m")
    yield from on_several(2, "350m")
    yield from demo(2)

    yield from in_eight_bits("1.3b", 16)
    yield from offloaded("6.7b", 8)
    yield from offloaded("1.3b", 16)
    yield from offloaded("350m", 16)
    yield from offloaded("2.7b", 8)
    yield from adapters("30b", 4, "--grad_checkpoint")
    yield from in_four_bits("66b", 4)
    known = ("low_level_zero", "deepspeed_zero2", "gemini", "torch_amp", "fsdp2", "torch_ddp")
    for model, rows in itertools.product(("350m", "1.3b"), (32, 8, 64)):
        if (model, rows) != ("1.3b", 64):  # out of memory for all but an offloaded Adam
            yield from side_by_side(model, rows, known)
        if model == "350m":
            yield measured("cuda_graph", 1, model, rows, GRAPHED)
    for rows in (16, 32, 8, 64):
        yield from side_by_side("125m", rows, known)
        yield measured("cuda_graph", 1, "125m", rows, GRAPHED)
    for model, rows in itertools.product(("350m", "1.3b"), (32, 64)):
        yield from offloaded(model, rows)
    yield from in_four_bits("175b", 1)  # on an H200
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
