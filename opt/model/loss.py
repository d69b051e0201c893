"""The next-token cross-entropy where the logits are not one tensor: in chunks of tokens, or with
the vocabulary over processes."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn import functional as F

from opt.model.kernel_probe import has_kernel
from opt.model.linear import product_dtype

IGNORE = -100  # the label of a position that has no loss, as in PyTorch and transformers
CHUNK = 1024  # tokens whose logits exist at a time: 0.1 GB in bf16


@dataclass(frozen=True)
class Split:
    """This process's part of a vocabulary that is split over processes."""

    group: dist.ProcessGroup
    first: int  # of its ids
    size: int  # how many it has; the weight may have rows of padding behind them

    @property
    def processes(self) -> int:
        """How many have a part each."""
        return dist.get_world_size(self.group)


def fused_linear_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    split: Split | None = None,
) -> torch.Tensor:
    """Summed cross-entropy of `hidden_states @ weight.T`, without the logits as a whole.

    hidden_states: (tokens, width); weight: (vocabulary, width), with `split` this process's rows of
    it; targets: (tokens,), ids of the whole vocabulary, -100 for none. With `split` a collective:
    hidden states, targets, loss and the hidden states' gradient are the same on all its processes.
    """
    if torch.overrides.has_torch_function_unary(weight):
        # [F23] Gemini has a parameter's values, and expects its gradient, around a torch function
        # alone; an autograd function is none.
        return torch.overrides.handle_torch_function(
            fused_linear_cross_entropy, (weight,), hidden_states, weight, targets, split
        )
    dtype = product_dtype(hidden_states)
    return _LinearCrossEntropy.apply(hidden_states.to(dtype), weight.to(dtype), targets, split)


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are computed with the loss, chunk by chunk, where the logits are: as in Liger
    (arXiv:2410.10989), which takes so many smaller chunks that the GPU waits for the host
    (OPT-125m), and asks the device for the number of targets."""

    @staticmethod
    def forward(ctx, hidden_states, weight, targets, split):
        losses = hidden_states.new_empty(len(targets), dtype=torch.float32)
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        grads = [
            torch.empty_like(hidden_states) if of_hidden else None,
            torch.zeros_like(weight) if of_weight else None,  # of a frozen one none
        ]
        own = weight if split is None else weight[: split.size]
        # As many logits at a time, however many processes share them
        chunk = CHUNK if split is None else CHUNK * split.processes
        sums = []
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            logits = hidden_states[part] @ own.t()
            _cross_entropy(logits, targets[part], losses[part], split)
            if of_hidden:
                torch.mm(logits, own, out=grads[0][part])
                if split is not None:
                    # Each process has its columns' summand; beside the products of the next chunk
                    sums.append(dist.all_reduce(grads[0][part], group=split.group, async_op=True))
            if of_weight:
                grads[1][: len(own)].addmm_(logits.t(), hidden_states[part])
        for work in sums:
            work.wait()
        ctx.grads = grads
        return losses.sum()

    @staticmethod
    def backward(ctx, grad):
        grads, ctx.grads = ctx.grads, None  # scaled in place: there is no second backward
        return *(None if g is None else g.mul_(grad) for g in grads), None, None


def _cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor, split: Split | None
) -> None:
    """Put each row's cross-entropy into `losses`, and its gradient over `logits`: (tokens,
    vocabulary), or this process's part of that."""
    if split is not None:
        _cross_entropy_of_parts(logits, targets, losses, split)
        return
    if has_kernel("loss", logits.device, logits.dtype, logits.shape[1]):
        from opt.model.kernels import cross_entropy

        cross_entropy(logits, targets, losses, IGNORE)
        return
    log_probabilities = F.log_softmax(logits.float(), dim=1)
    losses.copy_(F.nll_loss(log_probabilities, targets, ignore_index=IGNORE, reduction="none"))
    gradient = log_probabilities.exp_()
    gradient.scatter_add_(
        1, targets.clamp(min=0).unsqueeze(1), gradient.new_full((len(targets), 1), -1.0)
    )
    logits.copy_(gradient.masked_fill_((targets == IGNORE).unsqueeze(1), 0.0))


def _cross_entropy_of_parts(
    logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor, split: Split
) -> None:
    """_cross_entropy(), by one exchange of three numbers a token: its highest logit here, the sum
    of exponentials under that, the target's logit. As Megatron-LM (arXiv:1909.08053, section 3),
    which reduces them one after the other."""
    parts = losses.new_empty(split.processes, 3, len(targets))
    own = torch.empty_like(parts[0])
    kind = "loss", logits.device, logits.dtype, logits.shape[1], split.processes
    if has_kernel(*kind):
        from opt.model.kernels import cross_entropy_of_parts, part_of_rows

        part_of_rows(logits, targets, own, split.first)
        dist.all_gather_into_tensor(parts.view(-1), own.view(-1), group=split.group)
        cross_entropy_of_parts(logits, targets, parts, losses, split.first, IGNORE)
        return
    wide = logits.float()
    own[0] = wide.amax(1)
    is_here = (targets >= split.first) & (targets < split.first + split.size)
    column = torch.where(is_here, targets - split.first, 0).unsqueeze(1)
    own[1] = (wide - own[0].unsqueeze(1)).exp_().sum(1)
    own[2] = torch.where(is_here, wide.gather(1, column).squeeze(1), 0.0)
    dist.all_gather_into_tensor(parts.view(-1), own.view(-1), group=split.group)
    highest = parts[:, 0].amax(0)
    log_total = highest + (parts[:, 1] * (parts[:, 0] - highest).exp()).sum(0).log()
    is_ignored = targets == IGNORE
    losses.copy_((log_total - parts[:, 2].sum(0)).masked_fill_(is_ignored, 0.0))
    gradient = wide.sub_(log_total.unsqueeze(1)).exp_()
    gradient.scatter_add_(1, column, -is_here.float().unsqueeze(1))
    logits.copy_(gradient.masked_fill_(is_ignored.unsqueeze(1), 0.0))


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, first: int, group: dist.ProcessGroup
) -> torch.Tensor:
    """Summed cross-entropy of logits whose vocabulary is split over `group`, in fp32, the same on
    all its processes.

    Args:
        logits: (tokens, columns), this process's columns, `first` the first of them in the whole
            vocabulary.
        targets: (tokens,), ids in the whole vocabulary or -100.

    As in Megatron-LM (arXiv:1909.08053, section 3): a maximum, a sum of exponentials and the
    target's logit cross the processes, never the logits.
    """
    logits = logits.float()
    highest = logits.detach().max(dim=1).values
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    logits = logits - highest.unsqueeze(1)
    here = (targets >= first) & (targets < first + logits.shape[1])
    own = logits.gather(1, torch.where(here, targets - first, 0).unsqueeze(1)).squeeze(1)
    total = _Sum.apply(logits.exp().sum(1), group)
    target_logit = _Sum.apply(torch.where(here, own, 0.0), group)
    return torch.where(targets == IGNORE, 0.0, total.log() - target_logit).sum()


class _Sum(torch.autograd.Function):
    """The sum over the processes; backward each process's own part of the gradient."""

    @staticmethod
    def forward(ctx, x, group):
        x = x.contiguous()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None
