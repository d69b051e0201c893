"""--plugin gemini: weights, gradients and optimizer state in chunks that are spread over the
processes; without what ColossalAI 0.5.0 does for each gradient and each chunk in vain.

[C6] One process that keeps everything on its GPU has nothing to fetch, to let go of or to reduce:
there it works without Gemini's hooks. [C5] Otherwise a decoder layer is fetched and reduced as a
whole: ColossalAI fetches parameters around each torch function that they go through, and takes
gradients one by one, each in a Python hook of its own, 388 a step for OPT-350m, which keep the host
busy for longer than the GPU computes. [C7] Besides, each chunk's norm is taken of an fp32 copy of
the chunk, and waited for in the middle of backward; [C8] bf16 gradients are searched for overflows,
which only fp16's loss scale asks about. What is offloaded: host_adam.
"""

import logging
import math
from types import MethodType
from unittest.mock import patch

import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator
from colossalai.booster.plugin import GeminiPlugin
from colossalai.utils import is_ddp_ignored
from colossalai.zero import GeminiDDP
from colossalai.zero.gemini import TensorState, gemini_ddp
from colossalai.zero.gemini.chunk import Chunk, ChunkManager
from colossalai.zero.gemini.chunk import chunk as chunk_module
from colossalai.zero.gemini.gemini_optimizer import GeminiOptimizer
from colossalai.zero.gemini.memory_tracer import OrderedParamGenerator
from torch import nn

from opt.colossal import host_adam, low_memory
from opt.colossal.chunks import Chunks
from opt.colossal.plugin import Plugin
from opt.model.config import DTYPES

_finds_overflow = Chunk.has_inf_or_nan.fget
_reduce_chunk = Chunk.reduce
_init_chunks = GeminiDDP._init_chunks


class OptGeminiPlugin(Plugin, GeminiPlugin):
    """ColossalAI's, which fetches and reduces a decoder layer as a whole, or does nothing at all
    where there is nothing to do."""

    is_lazy = True

    def __init__(self, plan, device, num_parameters):
        on_gpu, several = device.type == "cuda", dist.get_world_size() > 1
        alone = not several and plan.offload_optim_frac == 0
        super().__init__(
            precision=plan.precision,
            placement_policy="static",
            offload_optim_frac=0.0,  # that is host_adam's part
            enable_gradient_accumulation=plan.gradient_accumulation_steps > 1,
            # A model of fewer parameters than a chunk holds is kept whole: one process saves
            # nothing by letting go of parameters that it will gather from itself (see
            # _do_without_hooks). Of several processes the chunks must be smaller than any model
            # (the default is 32 Mi), or [F17] ColossalAI 0.5.0 adds up accumulated gradients
            # world_size times (tests/test_training.py, gemini with accumulation).
            min_chunk_size_m=num_parameters / 2**20 + 1
            if alone
            else min(32, num_parameters / 2**20 / 4),
            # A reduction stream exists beside a GPU only.
            enable_async_reduce=on_gpu and several,
            max_prefetch=3
            if several
            else 0,  # chunks of 32 Mi elements or more; a layer of OPT-1.3b has 48 Mi
            pin_memory=True,
            initial_scale=2**16,
            max_norm=plan.max_norm,
        )
        # [C30] A pinned copy of each chunk, which nothing here reads. Where there is a reduction
        # stream ColossalAI insists on it.
        self.gemini_config["pin_memory"] = False
        self._begin(plan, device)

    # ---- before there are processes

    @staticmethod
    def state_bytes(plan, parameters, dp_size):
        """All of it spread; gradients take the weights' place, unless they accumulate; Adam's part
        may be in host memory."""
        # Without hooks (see _do_without_hooks) they come beside the weights first
        is_alone = dp_size == 1 and plan.offload_optim_frac == 0
        has_own = plan.gradient_accumulation_steps > 1 or is_alone
        own = parameters / dp_size
        adam = low_memory.state_bytes(plan) * (1 - plan.offload_optim_frac)
        return own * 2, own * 2 * has_own, own * adam

    @staticmethod
    def buffer_bytes(plan, parameters, dp_size):
        """Of several processes the chunks of a layer, and three ahead of it (see __init__)."""
        return 7 * 2 * min(2**25, parameters / 4) if dp_size > 1 else 0

    @staticmethod
    def host_bytes(plan, parameters, dp_size):
        """What Adam updates, and its moments; gradients and weights only pass through."""
        return low_memory.state_bytes(plan) * parameters * plan.offload_optim_frac / dp_size

    @staticmethod
    def frozen_bytes(plan, parameters, dp_size):
        """Spread as the others are."""
        return Plugin.frozen_bytes(plan, parameters, dp_size) / dp_size

    @staticmethod
    def update_kernels(plan):
        """Gradients come in 16 bits, the weights follow by ColossalAI's copy."""
        if plan.offload_optim_frac < 1:
            if low_memory.is_low(plan):
                yield from low_memory.update_kernels(plan.but(max_norm=0.0))  # has its own norm
            else:
                yield "update", DTYPES[plan.precision], None

    # ---- plugin, travel, form

    def configure(self, model, optimizer=None, criterion=None, dataloader=None, lr_scheduler=None):
        """Booster.boost calls this."""
        init_chunks = _init_frozen_chunks if self.adapters else _init_chunks
        close_chunk = host_adam.close_chunk(self.plan.offload_optim_frac)
        with (
            patch.object(GeminiDDP, "_init_chunks", init_chunks),
            patch.object(Chunk, "close_chunk", close_chunk),
            patch.object(
                ChunkManager, "register_tensor", host_adam.register_tensor(optimizer.dtype)
            ),
        ):
            model, optimizer, *rest = super().configure(
                model, optimizer, criterion, dataloader, lr_scheduler
            )
        # Which are taken for chunks of gradients
        frozen = model.chunk_manager.get_chunks(getattr(model, "frozen_params", []))
        optimizer.chunk16_set -= set(frozen)
        _mend(model)
        _forget_skipped_batches(model, optimizer)
        if any(host_adam.is_on_host(c.paired_chunk) for c in optimizer.chunk16_set):
            optimizer.optim.host_adam = host_adam.HostAdam(model, optimizer)
        self.form = Chunks(model, optimizer)
        self._know_pieces(optimizer)
        if self.knows_grad_norm:
            optimizer.optim.find_norm = optimizer.get_grad_norm
        self._finish_layers(model.unwrap())
        if self.adapters:  # which have found their places now
            inner = model.unwrap()
            model.name2param = dict(inner.named_parameters(remove_duplicate=False))
            model.param2name = {p: name for name, p in inner.named_parameters()}
        return model, optimizer, *rest


def _init_frozen_chunks(self, param_order, **flags) -> None:
    """With LoRA: chunks for the adapters, as ColossalAI makes them, and of several processes chunks
    for what is frozen too, which are spread alike, and have no gradients and no fp32 copies.

    [C25] ColossalAI 0.5.0 keeps frozen parameters whole on each process; it counts them all the
    same when it looks for a size of chunks, which a few adapters then would not fill.
    """
    manager, size = self.chunk_manager, dist.get_world_size(self.zero_group)
    trained, sizes = OrderedParamGenerator(), []
    manager.dp_degree_chunk_size_dict[_FROZEN] = manager.dp_degree_chunk_size_dict[size]
    manager.kwargs_config[_FROZEN] = manager.kwargs_config[size] | {"keep_gathered": False}
    self.frozen_params = []
    for parameter in param_order.generate():
        if parameter.requires_grad:
            trained.append(parameter)
            sizes.append(parameter.numel())
        elif size > 1:
            self._preprocess_param(parameter)
            parameter.data = parameter.data.to(self.mixed_precision)
            manager.register_tensor(
                parameter,
                group_type=_FROZEN,
                config_key=_FROZEN,
                zero_group=self.zero_group,
                extra_dp_group=self.extra_dp_group,
                cpu_offload=flags["cpu_offload"],
                pin_memory=flags["pin_memory"],
            )
            self.frozen_params.append(parameter)
        else:
            self.set_params_to_ignore([parameter])
            trained.append(parameter)
    # A quarter of the adapters, as of a small model: see OptGeminiPlugin
    chunk_size = sum(sizes) if size == 1 else max(*sizes, min(2**25, sum(sizes) // 4))
    manager.dp_degree_chunk_size_dict[size] = chunk_size + -chunk_size % size
    _init_chunks(self, trained, **flags)
    if self.frozen_params:
        device = get_accelerator().get_current_device()
        self.grads_device |= dict.fromkeys(self.frozen_params, device)
        # What it was computed from leaves them out, and more than this goes to host memory
        self.gemini_manager.placement_policy.keep_cuda_chunk_mem = math.inf


_FROZEN = "frozen"


def _mend(model: GeminiDDP) -> None:
    """What it computes stays the same."""
    gemini_ddp.free_storage = chunk_module.free_storage = _free_storage
    Chunk.reduce = _reduce
    Chunk.set_l2_norm = _set_l2_norm
    Chunk.has_inf_or_nan = property(_has_inf_or_nan)
    _prefetch_in_training(model)
    _wait_on_device(model)
    _forget_gradients_once(model)
    _release_frozen(model)
    # [C12] ColossalAI's looks through the call stack at each call: milliseconds a step, for nothing
    model._logger = logging.getLogger(__name__)
    chunks = model.chunk_manager.get_chunks(model.fp16_params)
    if model.chunk_manager.reuse_fp16_chunk and all(
        chunk.keep_gathered and chunk.pg_size == 1 for chunk in chunks
    ):
        _do_without_hooks(model, chunks)
    else:
        _work_by_layer(model)


def _forget_skipped_batches(model: GeminiDDP, optimizer: GeminiOptimizer) -> None:
    """[F58] Where the loss scale skips a step ColossalAI 0.5.0 goes on adding to its gradients:
    with accumulation all later ones overflow as well, and nothing is learned any more."""
    zero_grad = optimizer.zero_grad

    def forget(*args, **kwargs):
        model.chunk_manager.accumulating_grads = False
        return zero_grad(*args, **kwargs)

    optimizer.zero_grad = forget


def _do_without_hooks(model: GeminiDDP, chunks: tuple[Chunk, ...]) -> None:
    for chunk in chunks:
        # Parameters are now views of their chunks, and stay so
        model.chunk_manager.access_chunk(chunk)
        model.chunk_manager.fake_release_chunk(chunk)
    model.remove_hooks()
    model.remove_hooks = lambda: None  # it would be called again at the end
    model.hooks = []
    for parameter in model.parameters():
        parameter.__class__ = nn.Parameter  # ColoParameter's only use is to call the hooks

    def backward(self, loss):
        loss.backward()
        with torch.no_grad():
            # Gradients take the weights' place in the chunks, where the optimizer looks for them
            torch._foreach_copy_(
                [p.data for p in self.fp16_params], [p.grad for p in self.fp16_params]
            )
        self._setup_grads_ptr()
        for chunk in chunks:
            _record(self, chunk)
        self.gemini_manager.post_iter()

    model.backward = MethodType(backward, model)


def _prefetch_in_training(model: GeminiDDP) -> None:
    """[F20] Fetch ahead in training alone, in the order of the first step. ColossalAI would do so
    in the last operation of an evaluation as well, for the backward that does not come, and takes
    an evaluation before the first step for a part of that."""
    manager, policy = model.gemini_manager, model.gemini_manager.placement_policy
    get_prefetch_chunks, pre_iter = policy.get_prefetch_chunks, manager.pre_iter

    def get_in_training(**kwargs):
        return get_prefetch_chunks(**kwargs) if model.training else []

    def forget_evaluation(*args):
        if manager.is_warmup():
            manager.compute_list.clear()
        pre_iter(*args)

    policy.get_prefetch_chunks, manager.pre_iter = get_in_training, forget_evaluation


def _wait_on_device(model: GeminiDDP) -> None:
    """[C10] Let the GPU, not the host, wait for the gradients' reduction, or the host could not get
    ahead with the update and the next forward."""
    if model.async_reduce_stream is None:
        return
    model.enable_async_reduce = False  # which only asks for the host's wait
    post_backward = model._post_backward

    def wait_and_check():
        get_accelerator().current_stream().wait_stream(model.async_reduce_stream)
        post_backward()

    model._post_backward = wait_and_check


def _forget_gradients_once(model: GeminiDDP) -> None:
    """[C11] Gradients are let go of after backward, and not before forward again. ColossalAI walks
    over all modules for both, and setting a ColoParameter's attribute is a torch function."""
    parameters = list(model.module.parameters())

    def forget():
        with torch._C.DisableTorchFunction():
            for parameter in parameters:
                parameter.grad = None

    model._setup_grads_ptr = forget
    model.module.zero_grad = lambda set_to_none: None


def _release_frozen(model: GeminiDDP) -> None:
    """Let go, after backward, of the chunks whose gradients nobody waits for."""
    chunks = model.chunk_manager.get_chunks(getattr(model, "frozen_params", []))
    post_backward = model._post_backward

    def release_and_check():
        for chunk in chunks:
            model.chunk_manager.release_chunk(chunk)
        post_backward()

    if chunks:
        model._post_backward = release_and_check


class _Layer:
    """[C5] A decoder layer to be fetched and reduced as a whole; its parameters are plain ones
    then, whose torch functions no hook asks about, and which [F21] can be compiled.

    A step of one of two processes takes 36 ms of the host's time; with a layer as one torch
    function, whose parameters the hooks still took one by one, it took 53 (on a CPU, 24 layers of
    hidden size 64).
    """

    def __init__(self, model: GeminiDDP, layer: nn.Module):
        self._model, self._manager, self._hook = model, model.chunk_manager, model.param_op_hook
        held = [p for p in layer.parameters() if not is_ddp_ignored(p)]
        self._parameters = [p for p in held if p.requires_grad]
        by_chunk = {}
        for parameter in held:
            by_chunk.setdefault(self._manager.get_chunk(parameter), []).append(parameter)
        self._infos = {
            chunk: [chunk.tensors_info[p] for p in parameters]
            for chunk, parameters in by_chunk.items()
        }
        self._first_of_each = [parameters[0] for parameters in by_chunk.values()]
        self._grad_handles = [p._backward_hooks[p._grad_handle.id] for p in self._parameters]
        for parameter in self._parameters:
            parameter._grad_handle.remove()
        for parameter in layer.parameters():
            parameter.__class__ = nn.Parameter
        self._trained = [chunk for chunk, ps in by_chunk.items() if ps[0].requires_grad]
        self._frozen = [chunk for chunk in by_chunk if chunk not in self._trained]

    def fetch(self) -> None:
        """Before forward or backward goes through the layer."""
        self._turn(TensorState.COMPUTE)
        self._hook.pre_op(self._first_of_each)

    def hold(self) -> None:
        """After forward."""
        self._turn(TensorState.HOLD)

    def reduce(self) -> None:
        """After backward, once all gradients are there: they take the weights' place in the chunks,
        and a chunk that has all of its gradients is reduced."""
        self._turn(TensorState.HOLD_AFTER_BWD, self._trained)
        self._turn(TensorState.HOLD, self._frozen)
        grads = [p.grad for p in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        if not self._manager.reuse_fp16_chunk:
            # Gradients that accumulate have chunks of their own, and one more state to go through
            for handle, grad in zip(self._grad_handles, grads, strict=True):
                handle(grad)
            return
        torch._foreach_copy_([p.data for p in self._parameters], grads)
        for parameter in self._parameters:
            parameter._gemini_reduced = True  # which GeminiDDP checks after backward
        self._turn(TensorState.READY_FOR_REDUCE, self._trained)
        stream = self._model.async_reduce_stream
        if stream is not None:
            stream.wait_stream(get_accelerator().current_stream())
        with get_accelerator().stream(stream):
            for chunk in self._trained:
                if self._manager.reduce_chunk(chunk):
                    (chunk.cuda_global_chunk if chunk.is_gathered else chunk.cuda_shard).div_(
                        chunk.pg_size
                    )
                    _record(self._model, chunk)

    def _turn(self, state: TensorState, chunks: list[Chunk] | None = None) -> None:
        """Chunk.tensor_trans_state for the parameters in `chunks`, by default in all, which are
        always in the same."""
        for chunk in self._infos if chunks is None else chunks:
            infos = self._infos[chunk]
            chunk.tensor_state_cnter[infos[0].state] -= len(infos)
            chunk.tensor_state_cnter[state] += len(infos)
            for info in infos:
                info.state = state


def _work_by_layer(model: GeminiDDP) -> None:
    """Let decoder layers be fetched and reduced as a whole."""
    inner = model.unwrap()
    layers = {layer: _Layer(model, layer) for layer in inner.model.decoder.layers}

    def between_layers(before, after, hidden_states):
        before, after = layers.get(before), layers.get(after)
        if before is None and torch.is_grad_enabled() and not hidden_states.requires_grad:
            hidden_states.requires_grad_()  # of a frozen embedding; or nothing came by the first

        def come_by_again(_):
            if after:
                after.reduce()
            if before:
                before.fetch()

        if hidden_states.requires_grad:
            hidden_states.register_hook(come_by_again)
        if before:
            before.hold()
        if after:
            after.fetch()

    inner.between_layers = between_layers


def _record(model: GeminiDDP, chunk: Chunk) -> None:
    """What the optimizer will ask of a chunk of gradients."""
    model.chunk_manager.overflow_counter += chunk.has_inf_or_nan
    if chunk.l2_norm_flag:
        chunk.set_l2_norm()


def _free_storage(tensor: torch.Tensor) -> None:
    """[F19] Let go of the memory when this stream has done what it has been told: another one may
    write there sooner."""
    if tensor.is_cuda:
        tensor.record_stream(get_accelerator().current_stream())
    tensor.untyped_storage().resize_(0)


def _reduce(self, async_op: bool = False) -> None:
    """[F18] In the order of the stream that it is called in. With `async_op` ColossalAI frees the
    chunk while NCCL may still read it (on two H200 the loss of OPT-350m, compiled, was nan after 22
    steps)."""
    _reduce_chunk(self)


def _set_l2_norm(self) -> None:
    """[C7] Record the square of this chunk's L2 norm, on the device: GeminiOptimizer reads it when
    all are there."""
    values = (
        self.cuda_global_chunk[: self.utilized_size]
        if self.is_gathered
        else self.cuda_shard[: self.valid_end]
    )
    self.l2_norm = torch.linalg.vector_norm(values, dtype=torch.float32).square()


def _has_inf_or_nan(self):
    """[C8] Asked of fp16 alone."""
    return _finds_overflow(self) if self.dtype == torch.float16 else False
