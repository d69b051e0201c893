"""What ColossalAI should do, a function for each fault of docs/workarounds.md that a CPU can show,
on the library as it is: opt.colossal, which mends it, is not imported. See tests/faults.py.

What a device or a second process would do is played by a stand-in where the fault is in what the
library does around it.
"""

import contextlib
import importlib
import os
import socket
import subprocess
import sys
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from types import MethodType, SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from torch import nn
from torch.nn import functional as F
from transformers import OPTConfig, OPTForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent))
import faults

# For F1 to F3, which are about the import
os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
ASKED = []


def _ask(*_):
    ASKED.append("the CUDA device's capability")
    return 0, 0


with (
    warnings.catch_warnings(record=True) as WARNED,
    patch.object(torch.cuda, "get_device_capability", _ask),
):
    warnings.simplefilter("always")
    for _name in ("colossalai.booster.plugin", "colossalai.nn.optimizer"):
        importlib.import_module(_name)

from colossalai.accelerator import CpuAccelerator
from colossalai.amp.naive_amp.grad_scaler import DynamicGradScaler
from colossalai.amp.naive_amp.mixed_precision_optimizer import MixedPrecisionOptimizer
from colossalai.booster import Booster
from colossalai.booster.mixed_precision import mixed_precision_factory
from colossalai.booster.plugin import HybridParallelPlugin
from colossalai.cluster import ProcessGroupMesh
from colossalai.kernel.kernel_loader import CPUAdamLoader
from colossalai.lazy import LazyInitContext
from colossalai.nn.optimizer import HybridAdam
from colossalai.pipeline import p2p
from colossalai.pipeline.schedule import OneForwardOneBackwardSchedule
from colossalai.shardformer.layer import ColoAttention
from colossalai.shardformer.modeling.opt import OPTPipelineForwards
from colossalai.shardformer.policies.opt import OPTForCausalLMPolicy
from colossalai.shardformer.shard import ShardConfig
from colossalai.tensor.colo_parameter import ColoParameter
from colossalai.tensor.param_op_hook import ColoParamOpHook, ColoParamOpHookManager
from colossalai.zero.gemini import GeminiManager, gemini_optimizer
from colossalai.zero.gemini.chunk import Chunk, ChunkManager
from colossalai.zero.low_level import LowLevelZeroOptimizer


def small_opt(attention="eager") -> OPTForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_attention_heads=2)
    config = OPTConfig(vocab_size=64, num_hidden_layers=2, max_position_embeddings=32, **sizes)
    config._attn_implementation = attention
    return OPTForCausalLM(config).eval()


def boost(model, precision="fp32", optimizer=None):
    plugin = HybridParallelPlugin(tp_size=1, pp_size=1, precision=precision)
    return Booster(plugin=plugin).boost(model, optimizer)[:2]


def filled_chunk(values, keep_gathered=False) -> tuple[Chunk, torch.Tensor]:
    chunk = Chunk(len(values), dist.group.WORLD, torch.float32, keep_gathered=keep_gathered)
    tensor = torch.tensor(values)
    chunk.append_tensor(tensor)
    chunk.close_chunk()
    return chunk, tensor


def start_colossalai_run(script: Path) -> subprocess.Popen:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    cli = [sys.executable, "-c", "from colossalai.cli import cli; cli()", "run"]
    return subprocess.Popen(
        [*cli, "--nproc_per_node", "1", "--master_port", port, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )


def F1():
    """An import leaves the environment as it is."""
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in os.environ, "it sets CUDA_DEVICE_MAX_CONNECTIONS"


def F2():
    """An import does not ask for the GPU, which occupies memory of the first one."""
    assert not ASKED, f"it asks for {ASKED[0]}"


def F3():
    """An import says nothing of packages that nobody asked for."""
    said = [str(w.message) for w in WARNED]
    assert not any("apex" in text or "tensornvme" in text for text in said), said[0]


def F4():
    """It can be installed beside a newer torch, with which it runs."""
    (pin,) = (r for r in map(Requirement, metadata.requires("colossalai")) if r.name == "torch")
    assert pin.specifier.contains("2.11.0"), f"it wants torch{pin.specifier}"


def F5():
    """A CPU has streams and events too, of which all are done at once."""
    CpuAccelerator().Stream()


def F6():
    """The state of the generator of a device that is there."""
    cpu = CpuAccelerator()
    cpu.get_rng_state(cpu.get_current_device())


def F7():
    """ZeRO needs nothing that a CPU does not have."""
    LowLevelZeroOptimizer(torch.optim.SGD([nn.Parameter(torch.ones(4))], lr=0.1))


def F8():
    """Stages may talk over gloo."""
    p2p._check_for_nccl_hccl_backend(dist.group.WORLD)


def F9():
    """A chunk can be gathered again after its stay in host memory."""
    chunk, tensor = filled_chunk([1.0, 2.0])
    chunk.shard_move(torch.device("cpu"))
    chunk.shard_move(CpuAccelerator().get_current_device())
    chunk.access_chunk()
    assert tensor.tolist() == [1.0, 2.0]


def F10():
    """Weights in the Hub's layout, names without `model.`, are loaded, or there is an error."""
    given = small_opt()
    ids = torch.arange(4, 20).unsqueeze(0)
    with tempfile.TemporaryDirectory() as folder:
        given.config.save_pretrained(folder)
        torch.save(given.model.state_dict(), f"{folder}/pytorch_model.bin")
        plain = OPTForCausalLM.from_pretrained(folder)
        with LazyInitContext():
            model = OPTForCausalLM.from_pretrained(folder, attn_implementation="eager")
        model, _ = boost(model)
    right, seen = (m(input_ids=ids, labels=ids).loss.item() for m in (plain, model.eval()))
    assert abs(right - seen) < 1e-3, f"the loss is {seen}, and {right} with the weights"


def F11():
    """The fp32 copies that Adam updates start from the weights as they are given."""
    model = small_opt()
    given = model.lm_head.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = boost(model, "bf16", optimizer)
    copy = optimizer.working_to_master_map[model.unwrap().lm_head.weight]
    assert torch.equal(copy[: len(given)], given), "they are those of the 16-bit weights"


def F12():
    """get_grad_norm gives the gradient's norm, whatever the loss was scaled by."""
    weight = nn.Parameter(torch.ones(4, dtype=torch.float16))
    sgd = torch.optim.SGD([weight], lr=0.1)
    with patch.object(CpuAccelerator, "device_count", lambda self: 1):  # F5
        optimizer = MixedPrecisionOptimizer(sgd, "fp16", initial_scale=2.0**8, max_norm=1.0)
    optimizer.backward(weight.sum())
    optimizer.step()
    assert abs(optimizer.get_grad_norm() - 2) < 1e-3, f"it is {optimizer.get_grad_norm()}, not 2"


def F13():
    """A loss scale that is saved and loaded goes on as the one that was not."""
    with patch.object(CpuAccelerator, "device_count", lambda self: 1):  # F5
        first, second = DynamicGradScaler(growth_interval=2), DynamicGradScaler(growth_interval=2)
    first.update(overflow=False)
    second.load_state_dict(first.state_dict())
    for scaler in (first, second):
        scaler.update(overflow=False)
    assert first.scale == second.scale, f"{second.scale.item()}, not {first.scale.item()}"


def F14():
    """HybridAdam updates on a CPU without the CUDA toolkit."""
    HybridAdam([nn.Parameter(torch.ones(4))])


class NoKernel:
    """In place of the kernels that F14 is about."""

    is_available = assert_compatible = lambda self: True

    def load(self):
        return SimpleNamespace(CPUAdamOptimizer=lambda *_: None)


def hybrid_adam(kind, parameters):
    with patch.object(CPUAdamLoader, "REGISTRY", [NoKernel]):
        return kind(parameters)


def F15():
    """Gemini takes an optimizer that is a HybridAdam."""
    adam = hybrid_adam(type("OwnAdam", (HybridAdam,), {}), [nn.Parameter(torch.ones(4))])
    model = object.__new__(gemini_optimizer.GeminiDDP)
    try:
        gemini_optimizer.GeminiOptimizer(adam, model)
    except AttributeError:  # past the check: there is no model
        pass


def F16():
    """The update divides bf16 gradients by div_scale, by which Gemini clips."""
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    adam = hybrid_adam(HybridAdam, [weight])
    weight.grad = torch.ones_like(weight)
    weight.data = weight.data.float()  # as Gemini has it
    adam.step(div_scale=4.0)
    first = adam.state[weight]["exp_avg"][0].item()
    assert abs(first - 0.1 / 4) < 1e-6, f"the first moment is {first}, not {0.1 / 4}"


def F17():
    """Of two equal gradients that two processes accumulate, Gemini makes their sum."""
    chunk, tensor = filled_chunk([0.0, 0.0], keep_gathered=True)
    manager = ChunkManager({2: {"chunk_size": 2, "keep_gathered": True}})
    chunk.pg_size = 2

    def everyones(flat, **_):
        flat.mul_(2)  # the other process has the same

    with patch.object(dist, "all_reduce", everyones):
        for take in (manager.init_grad_chunk, manager.rearrange_accumulated_grad_chunk):
            grads = take(chunk)
            grads.pg_size = 2
            grads.add_tensor_to_chunk_slice(tensor, torch.ones(2))
            grads.reduce()
            grads.cuda_global_chunk.div_(2)
    total = grads.cuda_global_chunk[0].item()
    assert total == 2, f"1 + 1 is {total}"


def F18():
    """What a collective reads is kept until it is done."""
    chunk, _ = filled_chunk([1.0, 2.0], keep_gathered=True)
    chunk.keep_gathered, chunk.pg_size = False, 2
    kept = []

    def under_way(output, flat, **_):
        return SimpleNamespace(wait=lambda: kept.append(flat.untyped_storage().size() > 0))

    with patch.object(dist, "reduce_scatter_tensor", under_way):
        chunk.reduce(async_op=True)
        chunk.wait_async_reduce()
    assert kept == [True], "its memory is given back while it is under way"


def F20():
    """What is fetched ahead in training is found in training, not in an evaluation before it."""
    manager = GeminiManager("static", ChunkManager({2: {"chunk_size": 2}}), max_prefetch=1)
    manager._get_layout_info = lambda *_: (0, [])
    for operation in ("of an evaluation", "of training"):
        manager.pre_iter()
        manager.adjust_layout((operation,), record_anyway=True)
        manager.reset_attributes()
    assert manager.compute_list == [("of training",)], f"it is {manager.compute_list}"


class Hook(ColoParamOpHook):
    """Where Gemini fetches parameters, lets them go, and expects their gradients."""

    def __init__(self):
        self.backwards = 0

    pre_forward = post_forward = pre_backward = lambda self, params: None

    def post_backward(self, params):
        self.backwards += 1


def F21():
    """A layer can be compiled."""
    layer = nn.Linear(4, 4, bias=False)
    layer.weight = ColoParameter(torch.ones(4, 4))
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with ColoParamOpHookManager.use_hooks(Hook()):
        compiled(torch.ones(2, 4))


def F22():
    """What a layer makes of plain tensors is a plain tensor."""
    with ColoParamOpHookManager.use_hooks(Hook()):
        out = F.embedding(torch.tensor([0]), ColoParameter(torch.ones(4, 4)))
    assert type(out) is torch.Tensor, f"an embedding gives a {type(out).__name__}"


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def F23():
    """The gradient that an autograd function gives is expected as that of any function is."""
    hook, weight = Hook(), ColoParameter(torch.ones(4))
    with ColoParamOpHookManager.use_hooks(hook):
        (weight * 2).sum().backward()
        assert hook.backwards == 1
        Double.apply(weight).sum().backward()
    assert hook.backwards == 2, "it is not"


def F24():
    """mixed_precision="bf16" computes in bf16."""
    model = nn.Linear(2, 2)
    model, *_ = mixed_precision_factory("bf16").configure(model)
    assert model(torch.ones(1, 2)).dtype == torch.bfloat16


def F25():
    """mixed_precision="fp16" scales the loss on a CPU too."""
    weight = nn.Parameter(torch.ones(4))
    sgd = torch.optim.SGD([weight], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, optimizer, _ = mixed_precision_factory("fp16").configure(nn.Linear(2, 2), sgd)
    assert optimizer.scale_loss(torch.ones(())) > 1, "it is not scaled"


def F26():
    """transformers' OPT can be boosted as it is made."""
    boost(small_opt("sdpa"))


def F27():
    """Its attention has a kernel on a CPU."""
    q = torch.ones(1, 2, 8, 8)
    mask = ColoAttention.prepare_attn_kwargs((1, 1, 8, 8), q.dtype, q.device, is_causal=True)
    ColoAttention.attention(q, q, q, **mask)


def stages(number=2, stage=0):
    """Of a pipeline, seen from one of them."""
    return SimpleNamespace(
        stage=stage,
        num_stages=number,
        is_first_stage=lambda *_: stage == 0,
        is_last_stage=lambda *_: stage == number - 1,
    )


def forward_of_last_stage(model, labels):
    return OPTPipelineForwards.opt_for_causal_lm_forward(
        model,
        input_ids=labels,
        labels=labels,
        stage_manager=stages(1),
        stage_index=[0, 2],
        shard_config=ShardConfig(),
    )


def F28():
    """A stage's forward needs no GPU."""
    forward_of_last_stage(small_opt(), torch.arange(4, 20).unsqueeze(0))


def F29():
    """`colossalai run` says what its processes say, and little more."""
    said, _ = LAUNCHER.communicate()
    assert said.count("\n") < 20, f"{said.count(chr(10))} lines"


def F30():
    """An evaluation, in which no weight has a gradient, has none to add up."""
    tied = nn.Parameter(torch.ones(2))
    model = SimpleNamespace(
        shared_params=[{0: tied}],
        shared_param_process_groups=[dist.group.WORLD],
        stage_manager=stages(),
        no_sync=contextlib.nullcontext,
        _hook_context=contextlib.nullcontext,
        require_grad_sync=True,
        sync_dp_grads=lambda: None,
    )
    from colossalai.booster.plugin.hybrid_parallel_plugin import HybridParallelModule

    model.sync_shared_params = MethodType(HybridParallelModule.sync_shared_params, model)
    plugin = SimpleNamespace(
        enable_pipeline_parallelism=True,
        scheduler=SimpleNamespace(forward_backward_step=lambda *_: {"loss": None}),
    )
    HybridParallelPlugin.execute_pipeline(plugin, None, model, None)


def F31():
    """Batches may be of unequal length: a stage is told of it."""
    schedule = OneForwardOneBackwardSchedule(stages(stage=1), num_microbatches=2)

    def receive(_, metadata_recv=None):
        shape = metadata_recv.tensor_metadata[0].shape if metadata_recv else sent.shape
        return torch.empty(shape), []

    schedule.comm = SimpleNamespace(recv_forward=receive)
    schedule.forward_only = False
    for length in (8, 16):
        sent = torch.empty(1, length, 4)
        schedule.load_batch(iter([torch.zeros(2, length)]))
        seen = schedule.recv_forward()
        assert seen.shape == sent.shape, f"{tuple(seen.shape)} comes of {tuple(sent.shape)}"


def F54():
    """A head of its own stays one under tensor parallelism."""
    model = small_opt()
    head = model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)
    policy = SimpleNamespace(
        model=model,
        shard_config=SimpleNamespace(enable_tensor_parallelism=True),
        pipeline_stage_manager=None,
    )
    OPTForCausalLMPolicy.postprocess(policy)
    assert model.lm_head.weight is head, "the embedding is the head"


def F57():
    """The groups of a plugin that is collected as garbage go on."""
    plugin = HybridParallelPlugin.__new__(HybridParallelPlugin)
    plugin.pg_mesh = ProcessGroupMesh(1, 1)
    group = plugin.pg_mesh.create_group_along_axis(0)
    HybridParallelPlugin.__del__(plugin)
    try:
        dist.get_process_group_ranks(group)
    except KeyError:
        raise AssertionError("no group any more") from None


def F58():
    """A step that the loss scale skips leaves no gradients to add to."""
    manager = SimpleNamespace(accumulating_grads=True, reuse_fp16_chunk=False)
    optimizer = SimpleNamespace(
        module=SimpleNamespace(master_weights=False, chunk_manager=manager),
        mix_precision_mixin=SimpleNamespace(should_skip_step=lambda: True),
        **dict.fromkeys(("_set_grad_ptr", "_clear_global_norm", "zero_grad"), lambda: None),
        verbose=False,
    )
    gemini_optimizer.GeminiOptimizer.step(optimizer)
    assert not manager.accumulating_grads, "they are still there"


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    join = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=join, rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as FOLDER:
        script = Path(FOLDER, "ends.py")
        script.write_text("raise SystemExit('the reason')")
        LAUNCHER = start_colossalai_run(script)
        faults.main(globals())
