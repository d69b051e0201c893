"""The memory that training takes, on each device and on the host, computed before anything is
loaded; what there is of it; and what is refused because it cannot fit.

Weights, gradients and the optimizer's state are exact. Activations are fitted to the peaks in
benchmarks/results, and tests/test_memory.py holds the estimate to them: it is within ERROR of a
peak. So a run is refused where even that much less would not fit, and warned of where that much
more would not.
"""

import os
import resource
from argparse import Namespace
from dataclasses import dataclass, field

import numpy as np
import psutil
import torch
import torch.distributed as dist
from transformers import OPTConfig

from opt import limits
from opt.colossal import low_memory
from opt.colossal.pipeline import layers_per_stage
from opt.colossal.processes import Place
from opt.data.batches import largest_batch
from opt.model import four_bits, residual
from opt.model.lora import Lora
from opt.model.loss import CHUNK
from opt.model.opt import recomputes
from opt.model.sizes import embedding_parameters, layer_matrices, num_parameters
from opt.registry import plugin_class

GIB = 2**30
ERROR = 0.1  # of an estimate: see the top
# The interpreter and its libraries, in host memory: measured, beside a GPU and on a CPU
_PROCESS = {"cuda": 1.8 * GIB, "cpu": 0.6 * GIB}
_WORKSPACE = 0.15 * GIB  # of cuBLAS and others, on a GPU: measured


@dataclass(frozen=True)
class RowLengths:
    """What batches are made of, as far as memory asks."""

    longest: int  # tokens of the longest row
    lengths: np.ndarray | None = None  # of all training rows, where batches may have no pads
    _found: dict[tuple[int, int], int] = field(default_factory=dict)

    def tokens(self, plan: Namespace) -> int:
        """Of the largest batch on a rank, pads included."""
        if not getattr(plan, "padding_free", False):
            return plan.batch_size * self.longest
        sizes = plan.batch_size, plan.dp_size
        if sizes not in self._found:
            self._found[sizes] = largest_batch(self.lengths, self.longest, *sizes)
        return self._found[sizes]


@dataclass(frozen=True)
class Estimate:
    """Bytes that a process takes when it takes most; on a CPU all of it is host memory."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float
    # Whether gradients come only as activations go: the larger of the two counts
    gradients_come_late: bool
    # In host memory beside what is above: the process itself, state that is kept there, weights as
    # they are read
    host_process: float
    host_optimizer: float
    host_reading: float
    host_copy: float  # of what is written to a checkpoint while training goes on
    is_on_gpu: bool

    @property
    def device(self) -> float:
        """All that is where the arithmetic is."""
        passing = self.activations + self.logits
        if self.gradients_come_late:
            passing = max(passing, self.gradients)
        else:
            passing += self.gradients
        return self.weights + self.optimizer + self.buffers + passing

    @property
    def host(self) -> float:
        """All that is in host memory, but for a checkpoint's copy, which can be done without."""
        of_host = self.host_process + self.host_optimizer + self.host_reading
        return of_host + (0 if self.is_on_gpu else self.device)

    @property
    def parts(self) -> str:
        """In words, GiB."""
        late = " (come as activations go)" if self.gradients_come_late and self.gradients else ""
        said = {
            "weights": self.weights,
            f"gradients{late}": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "logits": self.logits,
            "buffers": self.buffers,
        }
        return ", ".join(
            f"{what} {gib(size)}" for what, size in said.items() if size >= 0.005 * GIB
        )


def gib(size: float) -> str:
    """Bytes as GiB, short."""
    return f"{size / GIB:.1f}" if size >= GIB else f"{size / GIB:.2f}"


def estimate(
    plan: Namespace, config: OPTConfig, rows: RowLengths, device_type: str, reading: float = 0
) -> Estimate:
    """Of training by `plan`, whose dp_size is settled. `reading`: see Weights.reading_bytes."""
    plugin, is_on_gpu = plugin_class(plan.plugin), device_type == "cuda"
    width = 4 if plan.precision == "fp32" else 2
    stages = _Stages.of(plan, config, is_on_gpu)
    trained, frozen = stages.parameters, 0
    if lora := Lora.of(plan):
        trained = sum(a * b for a, b in lora.shapes(config).values())
        in_4_bits = layer_matrices(config) * bool(plan.load_in_4bit)
        frozen = stages.parameters - (1 - four_bits.BYTES / width) * in_4_bits
    weights, gradients, optimizer = plugin.state_bytes(plan, trained, plan.dp_size)
    weights += plugin.frozen_bytes(plan, frozen, plan.dp_size)
    if getattr(plan, "eval_only", False):  # at least: some plugins have fp32 copies all the same
        gradients = optimizer = 0
    return Estimate(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=_activations(plan, config, rows, stages, width, is_on_gpu),
        logits=_logits(plan, config, rows, width),
        buffers=_buffers(plan, config, stages, width, is_on_gpu),
        # On a CPU an allocator keeps what was let go of
        gradients_come_late=is_on_gpu
        and plan.gradient_accumulation_steps == 1
        and plan.pp_size == 1
        and not plan.cuda_graph,
        host_process=_PROCESS["cuda" if is_on_gpu else "cpu"],
        host_optimizer=plugin.host_bytes(plan, trained, plan.dp_size),
        host_reading=reading,
        # In host memory it is already, with offload
        host_copy=0
        if plan.offload_optim_frac
        else low_memory.state_bytes(plan) * trained / (plan.dp_size * plan.tp_size * plan.pp_size),
        is_on_gpu=is_on_gpu,
    )


@dataclass(frozen=True)
class _Stages:
    """How layers are spread over pipeline stages; without any there is one."""

    first: float  # layers of the first, which keeps most activations; it has the embedding, as
    last: float  # the last one has
    parameters: float  # of the first, times the stages: plugins divide them by their number

    @classmethod
    def of(cls, plan: Namespace, config: OPTConfig, is_on_gpu: bool) -> "_Stages":
        number = config.num_hidden_layers
        first = last = number / plan.pp_size
        if plan.pp_size > 1 and is_on_gpu:
            first, *_, last = layers_per_stage(config, plan.pp_size)
        embeddings = embedding_parameters(config)
        of_layers = (num_parameters(config) - embeddings) * first * plan.pp_size / number
        return cls(first, last, of_layers + embeddings * plan.pp_size)


def _tokens(plan: Namespace, rows: RowLengths) -> float:
    """Of a micro-batch, pads included."""
    return rows.tokens(plan) / (plan.num_microbatches or 1)


def _activations(
    plan: Namespace,
    config: OPTConfig,
    rows: RowLengths,
    stages: _Stages,
    width: int,
    is_on_gpu: bool,
) -> float:
    """Bytes that forward keeps for backward, but for the logits'."""
    plugin, number, every = (
        plugin_class(plan.plugin),
        config.num_hidden_layers,
        plan.grad_checkpoint,
    )
    unit = _tokens(plan, rows) * config.hidden_size
    fused_budget = None
    if is_on_gpu and is_fused(plan, config):
        fused_budget = residual.budget(config.do_layer_norm_before, not plan.lora_r)
    kept = plugin.kept_bytes(plan, fused_budget)
    # Norms and dropout are of the whole width on each tensor-parallel rank
    of_layer = unit * kept * (10 + 24 / plan.tp_size) / 34 * width / 2
    if not is_on_gpu and getattr(plan, "padding_free", False):  # attention needs a rectangle there
        of_layer += 4 * width * config.hidden_size * (plan.batch_size + 1) * rows.longest
    if getattr(plan, "eval_only", False):
        return of_layer
    share = sum(recomputes(layer, every) for layer in range(number)) / number
    # Of as many micro-batches a stage keeps them at a time
    under_way = min(plan.pp_size, plan.num_microbatches or 1)
    activations = stages.first * under_way * (share * width * unit + (1 - share) * of_layer)
    # Of as many the last stage keeps what its products wait for
    waiting = plugin.waiting_bytes(plan) * is_on_gpu
    activations = max(activations, stages.last * under_way * unit * waiting)
    # Of the layer that is computed again; on a CPU its gradients lie beside what is let go of late
    return activations + of_layer * (every > 0) * (1 if is_on_gpu else 2)


def _logits(plan: Namespace, config: OPTConfig, rows: RowLengths, width: int) -> float:
    """Bytes of the logits and what the loss keeps beside them."""
    tokens, embedding = _tokens(plan, rows), config.word_embed_proj_dim
    if not plan.fused_loss:
        # In fp32 what log_softmax keeps, its gradient, and that of the logits
        return 12 * tokens * config.vocab_size / plan.tp_size
    logits = CHUNK * config.vocab_size * width + 2 * tokens * embedding * width
    if not plan.lora_r:  # the head's gradient
        logits += config.vocab_size / plan.tp_size * embedding * width
    return logits


def _buffers(
    plan: Namespace, config: OPTConfig, stages: _Stages, width: int, is_on_gpu: bool
) -> float:
    """Bytes that pass through, and copies of weights in another form."""
    plugin = plugin_class(plan.plugin)
    buffers = plugin.buffer_bytes(plan, stages.parameters, plan.dp_size) + _WORKSPACE * is_on_gpu
    if plan.fp8 and not plan.lora_r:
        buffers += layer_matrices(config) / plan.pp_size  # by columns, for backward
    if plan.load_in_4bit:  # unpacked, of a layer where that is kept for backward
        of_layer = layer_matrices(config) / config.num_hidden_layers
        largest = config.hidden_size * config.ffn_dim
        buffers += width * (of_layer if plan.grad_checkpoint else 2 * largest)
    return buffers


def is_fused(plan: Namespace, config: OPTConfig) -> bool:
    """Whether a GPU has kernels for dropout, residual and norm in one pass."""
    is_half = plan.precision != "fp32" and not plugin_class(plan.plugin).is_autocast(plan)
    return is_half and config.layer_norm_elementwise_affine and residual.fits(config.hidden_size)


@dataclass(frozen=True)
class Room:
    """What there is, in bytes; the least of all nodes."""

    device: float | None  # for a process, on its GPU; None on a CPU
    host: float  # for all processes of a node together
    local: int  # processes of a node

    def is_surely_enough(self, needed: Estimate) -> bool:
        """Whether it is, with an estimate that is too low by ERROR."""
        return self.is_enough(needed, 1 / (1 - ERROR))

    def is_enough(self, needed: Estimate, times: float = 1.0) -> bool:
        """Whether it is, of the device and of the host, if `times` the estimate is needed."""
        is_enough = self.device is None or needed.device * times <= self.device
        return is_enough and needed.host * self.local * times <= self.host

    def is_surely_too_small(self, needed: Estimate) -> bool:
        """Whether it is, with an estimate that is too high by ERROR."""
        return not self.is_enough(needed, 1 / (1 + ERROR))

    def is_surely_enough_to_copy(self, needed: Estimate) -> bool:
        """Whether a checkpoint's copy has room in host memory too."""
        return (needed.host + needed.host_copy) * self.local / (1 - ERROR) <= self.host


def find_room(here: Place, mem_cap_gib: float) -> Room:
    """What there is for this run. The same on all processes, where these have met."""
    gpus = torch.cuda.device_count() if here.device.type == "cuda" else here.world_size
    local = int(os.environ.get("LOCAL_WORLD_SIZE", min(here.world_size, gpus)))
    device = None
    if here.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(here.device)
        device = min(free, mem_cap_gib * GIB) if mem_cap_gib else free
    own = device, _host_memory(local), local
    all_own = [own]
    if dist.is_initialized():
        all_own = [None] * here.world_size
        dist.all_gather_object(all_own, own)
    devices, hosts, locals_ = zip(*all_own, strict=True)
    return Room(None if None in devices else min(devices), min(hosts), max(locals_))


def _host_memory(local: int) -> float:
    """Bytes of host memory for `local` processes together: what is free, swap included, as far as
    control groups let them have it, and what they have already."""
    process = psutil.Process()
    held = process.memory_info()
    there = psutil.virtual_memory().available + psutil.swap_memory().free
    there = min([there, *limits.memory_left()]) + local * held.rss
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        there = min(there, local * (limit - held.vms + held.rss))
    return there
