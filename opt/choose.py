"""What run_demo.sh trains with where its user has not said it: the fastest plugin that fits.

    python -m opt.choose MODEL PROCESSES NODES ONLINE FROZEN

prints five lines: GPUs of this node, whether they have bf16 (1 or 0), plugin, its flags, why.
PROCESSES: of each node, "" for as many as it has GPUs, or one on a CPU. ONLINE: 0 where the Hub
does not answer. FROZEN: bytes of a weight that stays as it is beside adapters, "" without any.
"""

import json
import sys
from dataclasses import dataclass

import torch
from huggingface_hub import hf_hub_download

from opt.measure import memory_limit
from opt.model.kernel_probe import has_bf16

# Share of a GPU's memory for weights, gradients and Adam's state; the rest is for activations
STATE = 0.75


@dataclass
class Machine:
    """What each node has."""

    gpus: int
    bytes: int = 0  # of one GPU's memory
    bf16: bool = False


def this_machine() -> Machine:
    """What this node has."""
    if not torch.cuda.is_available():
        return Machine(0)
    device = torch.device("cuda", 0)
    return Machine(torch.cuda.device_count(), memory_limit(device), has_bf16(device))


def plugin(
    parameters: int | None, each: Machine, processes: int, frozen: float | None = None
) -> tuple[str, str, str]:
    """(plugin, its flags, why) for so many `processes` in all. `parameters`: of the model; None:
    not known. `frozen`: bytes of each of them, where adapters alone are trained.

    In this order, of speed (README): low_level_zero, gemini, gemini with Adam in host memory.
    Tensor and pipeline parallelism are slower on as many GPUs, and need no less of their memory.
    """
    if not each.gpus:
        return "torch_ddp", "", "the fastest on a CPU"
    # Bytes a parameter. 16-bit weights and gradients take 4; Adam's 12 are spread; under gemini
    # gradients take the weights' place.
    ways = [
        ("low_level_zero", "", 4 + 12 / processes),
        ("gemini", "", 14 / processes),
        ("gemini", "--offload_optim_frac 1", 2 / processes),
    ]
    if not each.bf16:
        ways.insert(0, ("torch_ddp", "", 16))
    if frozen is not None:
        ways = [("low_level_zero", "", frozen), ("gemini", "", frozen / processes)]
    for name, flags, bytes_each in ways:
        if parameters is None or parameters * bytes_each <= STATE * each.bytes:
            fastest = (name, flags, bytes_each) == ways[0]
            return (
                name,
                flags,
                f"the {'fastest' if fastest else 'fastest that it fits under'} on {processes} such "
                f"GPU{'s' * (processes > 1)}",
            )
    return name, flags, "what takes the least memory on the GPUs"


def parameters_of(model: str, online: bool) -> int | None:
    """A model's parameters by its config.json; None where that is not to be had, which the checks
    before training will speak of."""
    try:
        is_on_the_hub = model.count("/") == 1 and not model.startswith((".", "/", "sample/"))
        file = (
            hf_hub_download(model, "config.json", local_files_only=not online)
            if is_on_the_hub
            else f"{model}/config.json"
        )
        with open(file) as content:
            config = json.load(content)
        hidden, embedding = (
            config["hidden_size"],
            config["vocab_size"] * config["word_embed_proj_dim"],
        )
        return (
            config["num_hidden_layers"] * (4 * hidden**2 + 2 * hidden * config["ffn_dim"])
            + embedding
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None


def main() -> None:
    model, processes, nodes, online, frozen = sys.argv[1:]
    each = this_machine()
    total = int(processes or each.gpus or 1) * int(nodes)
    name, flags, why = plugin(
        parameters_of(model, online == "1"), each, total, float(frozen) if frozen else None
    )
    print(each.gpus, int(each.bf16), name, flags, why, sep="\n")


if __name__ == "__main__":
    main()
