"""One batch through the pipeline stages: ColossalAI's 1F1B schedule, in which no host waits for a
GPU."""

from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext

import torch
import torch.distributed as dist
from colossalai.pipeline.schedule import OneForwardOneBackwardSchedule
from transformers import OPTConfig

from opt.model.linear import add_up, in_place, put_off
from opt.model.sizes import layer_matrices


def layers_per_stage(config: OPTConfig, stages: int) -> list[int]:
    """How many decoder layers each stage has, the slowest as fast as may be: the last one also has
    the head.

    By their matrices; what a layer does beside its own takes half as long again (OPT-1.3b,
    compiled, one H100: 1.36 ms of 2,048 tokens, the head with a fused loss 1.84). As many for each
    where that is within 2 %.
    """
    layers = config.num_hidden_layers
    head = config.vocab_size * config.word_embed_proj_dim / (1.5 * layer_matrices(config) / layers)

    def slowest(last: int) -> float:
        return max(-(-(layers - last) // (stages - 1)), last + head)

    last = layers // stages
    best = min(range(1, last + 1), key=lambda number: (slowest(number), -number))
    if slowest(best) < 0.98 * slowest(last):
        last = best
    each, more = divmod(layers - last, stages - 1)
    # The first ones keep most activations
    return [each + (stage >= stages - 1 - more) for stage in range(stages - 1)] + [last]


class Schedule(OneForwardOneBackwardSchedule):
    """ColossalAI's, for batches whose shapes every stage knows: each has the whole batch.

    [F31] ColossalAI's stages tell one another a shape once in a run, or with each micro-batch, and
    then the host waits for the GPU each time; our batches are as long as their longest row. [C26]
    It also waits wherever a micro-batch comes from the host's memory: of two stages of OPT-1.3b
    with 8 micro-batches a GPU had work for 150 of 262 ms (two H100).

    With a `lag` it is ZB-H1 (Qi et al., arXiv:2401.10241, section 2): weights' products, for which
    no other stage waits, come behind the backwards of `lag` later micro-batches, the last ones when
    all is done. Where forward and backward's two products take a unit each, and stages 0, 1, ...
    have a lag of as many micro-batches, 8 on two stages take 25 units instead of 27, on four 27
    instead of 33; 24 are the work.
    """

    def __init__(self, stage_manager, num_microbatches: int):
        super().__init__(stage_manager, num_microbatches)
        self._group = stage_manager.get_p2p_process_group()
        # Of the hidden states that stages exchange, set with the model
        self.width, self.dtype = 0, torch.float32
        self._sent: list[dist.Work] = []
        self.totals: list[torch.Tensor] = []  # that backwards add to, see linear.adding_up
        self.vectors: list[torch.Tensor] = []  # biases and norms whose gradients stay with them
        # How many micro-batches' products with `totals` wait, and those of each that does
        self.lag = 0
        self._waiting: deque[list] = deque()

    # ---- the batch

    def load_batch(self, data_iter: Iterator[dict[str, torch.Tensor]], device=None) -> None:
        """Take the next batch, which is on the device: {name: (rows, ...)}, as many rows as
        micro-batches or a multiple of them."""
        self.batch = next(data_iter)
        self.batch_size = len(next(iter(self.batch.values())))
        self.microbatch_size = self.batch_size // self.num_microbatches
        assert self.microbatch_size * self.num_microbatches == self.batch_size
        self.microbatch_offset = 0
        self._waiting.clear()  # of a batch that has failed

    def load_micro_batch(self) -> dict[str, torch.Tensor]:
        """The next one. [F56] Copied, no view: compiled layers write a view back onto itself if
        it is not aligned to 16 bytes, and all views of a batch count as changed."""
        start, end = self.microbatch_offset, self.microbatch_offset + self.microbatch_size
        self.microbatch_offset = end
        return {name: whole[start:end].clone() for name, whole in self.batch.items()}

    # ---- what stages exchange: hidden states, and their gradients

    def recv_forward(self, prev_rank=None) -> dict[str, torch.Tensor] | None:
        """The input of the next micro-batch's forward; None on the first stage."""
        if not self.stage_manager.is_first_stage():
            return self._exchange(None, self.stage_manager.get_prev_rank(), receives=True)

    def recv_backward(self, next_rank=None) -> dict[str, torch.Tensor] | None:
        """The gradient of a micro-batch's output; None on the last stage."""
        if not self.stage_manager.is_last_stage():
            return self._exchange(None, self.stage_manager.get_next_rank(), receives=True)

    def send_forward(self, output_tensor, next_rank=None) -> None:
        """A micro-batch's output, but of the last stage."""
        if not self.stage_manager.is_last_stage():
            self._exchange(output_tensor, self.stage_manager.get_next_rank(), receives=False)

    def send_backward(self, input_tensor_grad, prev_rank=None) -> None:
        """The gradient of a micro-batch's input, but of the first stage."""
        if not self.stage_manager.is_first_stage():
            self._exchange(input_tensor_grad, self.stage_manager.get_prev_rank(), receives=False)

    def send_forward_recv_backward(self, output_tensor, send_first=None):
        """Both, at once."""
        if not self.stage_manager.is_last_stage():
            return self._exchange(output_tensor, self.stage_manager.get_next_rank(), receives=True)

    def send_backward_recv_forward(self, input_tensor_grad, send_first=None):
        """Both, at once."""
        if not self.stage_manager.is_first_stage():
            return self._exchange(
                input_tensor_grad, self.stage_manager.get_prev_rank(), receives=True
            )

    def _exchange(
        self, sent: dict[str, torch.Tensor] | None, peer: int, receives: bool
    ) -> dict[str, torch.Tensor] | None:
        """Send to `peer`, receive from it, or both. What follows on the device waits for what was
        received; the host does not."""
        operations, received = [], None
        if sent is not None:
            (tensor,) = sent.values()
            operations.append(dist.P2POp(dist.isend, tensor.contiguous(), peer, self._group))
        if receives:
            shape = self.microbatch_size, self.batch["input_ids"].shape[1], self.width
            received = self.batch["input_ids"].new_empty(shape, dtype=self.dtype)
            operations.append(dist.P2POp(dist.irecv, received, peer, self._group))
        works = dist.batch_isend_irecv(operations)
        self._catch_up(self.lag)  # beside the exchange
        if not receives:
            self._sent += works
            return None
        for work in works:
            work.wait()
        return {"hidden_states": received}

    # ---- the schedule

    def forward_step(self, model, input_obj, criterion, accum_loss=None, outputs=None):
        """See ColossalAI's."""
        if input_obj is not None and not self.forward_only:
            input_obj["hidden_states"].requires_grad_()
        return super().forward_step(model, input_obj, criterion, accum_loss, outputs)

    def backward_step(self, *arguments):
        """See ColossalAI's. [C21] The vectors' gradients are added up in a few kernels; left to
        autograd, ten of each layer are a kernel each for each micro-batch."""
        before = [vector.grad for vector in self.vectors]
        for vector in self.vectors:
            vector.grad = None
        products = []
        with in_place(self.totals), put_off(products, self.totals) if self.lag else nullcontext():
            input_grad = super().backward_step(*arguments)
        if products:
            self._waiting.append(products)
        if before and before[0] is not None:
            torch._foreach_add_(before, [vector.grad for vector in self.vectors])
            for vector, grad in zip(self.vectors, before, strict=True):
                vector.grad = grad
        return input_grad

    def _catch_up(self, lag: int) -> None:
        """Compute the products that wait, but of the last `lag` micro-batches."""
        while len(self._waiting) > lag:
            add_up(self._waiting.popleft())

    def forward_backward_step(self, *arguments, **named) -> dict:
        """See ColossalAI's."""
        result = super().forward_backward_step(*arguments, **named)
        self._catch_up(0)
        for work in self._sent:
            work.wait()
        self._sent.clear()
        self.batch = None
        return result
