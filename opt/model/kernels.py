"""GPU kernels, in Triton: AdamW over many tensors at once, the cross-entropy with its gradient in
the logits' place, the attention of short rows, and matrices to 8-bit floats.

[C16] PyTorch's fused AdamW wants gradients in the weights' own dtype. For 16-bit weights with an
fp32 copy that means a pass over memory to widen the gradients, one to scale them, and one to narrow
the weights, beside the update itself. The update is bound by memory: here each byte moves once, 28
bytes a parameter.
"""

import itertools
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

from opt.model import formats

# From Triton 3.1 (torch 2.5) to 3.6 (torch 2.11), tests/test_kernels.py compiles all for the GPUs
# there are. [F39] 3.1 takes no constexpr in a pointer's type, only its `value`. Where an integer
# makes no faster code it is not specialized: one kernel less to build.

# Elements that a program updates; with 8 warps each, of 8 choices the fastest on an H100
BLOCK = 2048

# For _adamw_low
FIRST_SHIFT, SECOND_SHIFT = (
    tl.constexpr(formats.FIRST_SHIFT),
    tl.constexpr(formats.SECOND_SHIFT),
)
FIRST_SHIFT_UP, SECOND_SHIFT_UP = (
    tl.constexpr(1 / formats.FIRST_SHIFT),
    tl.constexpr(1 / formats.SECOND_SHIFT),
)
FIRST_SCALE, SECOND_SCALE = (
    tl.constexpr(1 / formats.FIRST_MAX),
    tl.constexpr(1 / formats.SECOND_MAX),
)
SMALLEST = tl.constexpr(formats.SMALLEST)


@triton.jit(do_not_specialize=["tensors", "programs"])
def _adamw(
    # Int64 (5, tensors): addresses of gradients, weights, first and second moments, 16-bit weights
    # (or 0)
    pointers,
    # Int32 (3, programs): each program's tensor, its number among the tensor's blocks, the tensor's
    # elements
    blocks,
    # Fp32 scalar that the gradients are divided by; nothing is updated where it is not finite
    divisor,
    rates,  # fp32 (4,): see adamw(), which has no use for the fourth
    beta1,
    beta2,
    eps,
    weight_decay,
    tensors,
    programs,
    GRADIENT: tl.constexpr,
    OUTPUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    tensor = tl.load(blocks + program)
    offsets = tl.load(blocks + programs + program).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = tl.load(blocks + 2 * programs + program)
    gradients = tl.load(pointers + tensor).to(tl.pointer_type(GRADIENT.value))
    weights = tl.load(pointers + tensors + tensor).to(tl.pointer_type(tl.float32))
    firsts = tl.load(pointers + 2 * tensors + tensor).to(tl.pointer_type(tl.float32))
    seconds = tl.load(pointers + 3 * tensors + tensor).to(tl.pointer_type(tl.float32))
    if OUTPUT is not None:
        outputs = tl.load(pointers + 4 * tensors + tensor).to(tl.pointer_type(OUTPUT.value))
    if ALIGNED:  # known to be so, a thread may move 16 bytes at a time
        size = tl.multiple_of(size, 16)
        gradients = tl.multiple_of(gradients, 16)
        weights = tl.multiple_of(weights, 16)
        firsts = tl.multiple_of(firsts, 16)
        seconds = tl.multiple_of(seconds, 16)
        if OUTPUT is not None:
            outputs = tl.multiple_of(outputs, 16)
    valid = offsets < size
    divide_by = tl.load(divisor)
    if divide_by - divide_by == 0.0:  # neither nan nor infinite
        gradient = tl.load(gradients + offsets, mask=valid, other=0).to(tl.float32) / divide_by
        weight = tl.load(weights + offsets, mask=valid, other=0)
        first = tl.load(firsts + offsets, mask=valid, other=0)
        second = tl.load(seconds + offsets, mask=valid, other=0)
        lr, correction1, correction2_root = tl.load(rates), tl.load(rates + 1), tl.load(rates + 2)
        weight -= lr * weight_decay * weight
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient * gradient
        weight -= lr / correction1 * first / (tl.sqrt(second) / correction2_root + eps)
        tl.store(weights + offsets, weight, mask=valid)
        tl.store(firsts + offsets, first, mask=valid)
        tl.store(seconds + offsets, second, mask=valid)
        if OUTPUT is not None:
            tl.store(outputs + offsets, weight.to(OUTPUT), mask=valid)


_TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def adamw(
    grads, params, exp_avgs, exp_avg_sqs, outputs, divisor, rates, beta1, beta2, eps, weight_decay
) -> None:
    """Update in place on the GPU.

    Args:
        grads: tensors of one dtype, fp32 or 16 bits.
        params, exp_avgs, exp_avg_sqs: fp32 tensors, as many elements each as the gradients.
        outputs: 16-bit tensors that the updated `params` are also written to, or None.
        divisor: fp32 scalar tensor on the same device: gradients are divided by it. If it is not
            finite, nothing changes.
        rates: fp32 (4,) on the same device, of adam.rates_of(): learning rate, 1 - beta1**t,
            sqrt(1 - beta2**t), and t, the number of this update, which is not read here. What
            changes from update to update is read there, so that a recorded one can be replayed.
    """
    pointers, blocks, aligned = _tables(
        [grads, params, exp_avgs, exp_avg_sqs, *([outputs] if outputs else [])]
    )
    _adamw[(blocks.shape[1],)](
        pointers,
        blocks,
        divisor,
        rates,
        beta1,
        beta2,
        eps,
        weight_decay,
        len(params),
        blocks.shape[1],
        GRADIENT=_TRITON_TYPES[grads[0].dtype],
        OUTPUT=_TRITON_TYPES[outputs[0].dtype] if outputs else None,
        ALIGNED=aligned,
        BLOCK=BLOCK,
        num_warps=8,
    )


@triton.jit
def _mixed(number):
    """See low_bits._mixed."""
    number = (number ^ (number >> 16)) * 0x85EBCA6B
    number = (number ^ (number >> 13)) * 0xC2B2AE35
    return number ^ (number >> 16)


@triton.jit
def _to_bf16(values, random):
    bits = (values.to(tl.uint32, bitcast=True) + random) & 0xFFFF0000
    rounded = tl.where(values == values, bits.to(tl.float32, bitcast=True), values)
    return rounded.to(tl.bfloat16)


@triton.jit(do_not_specialize=["tensors", "programs"])
def _adamw_low(
    # Int64 (8, tensors): addresses of gradients, weights, first and second moments and of the
    # moments' scales (or 0), seeds, first elements' places
    pointers,
    blocks,  # as of _adamw
    divisor,
    rates,  # fp32 (4,): see adamw_low()
    beta1,
    beta2,
    eps,
    weight_decay,
    tensors,
    programs,
    BITS: tl.constexpr,  # of a moment
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # elements that share a scale: a warp's, a row
):
    program = tl.program_id(0)
    tensor = tl.load(blocks + program)
    block = tl.load(blocks + programs + program)
    size = tl.load(blocks + 2 * programs + program)
    gradients = tl.load(pointers + tensor).to(tl.pointer_type(tl.bfloat16))
    weights = tl.load(pointers + tensors + tensor).to(tl.pointer_type(tl.bfloat16))
    firsts = tl.load(pointers + 2 * tensors + tensor)
    seconds = tl.load(pointers + 3 * tensors + tensor)
    if BITS == 8:
        firsts = firsts.to(tl.pointer_type(tl.uint8))
        seconds = seconds.to(tl.pointer_type(tl.uint8))
        first_scales = tl.load(pointers + 4 * tensors + tensor).to(tl.pointer_type(tl.float32))
        second_scales = tl.load(pointers + 5 * tensors + tensor).to(tl.pointer_type(tl.float32))
    else:
        firsts = firsts.to(tl.pointer_type(tl.bfloat16))
        seconds = seconds.to(tl.pointer_type(tl.bfloat16))
    seed = tl.load(pointers + 6 * tensors + tensor).to(tl.uint32)
    start = tl.load(pointers + 7 * tensors + tensor).to(tl.uint32)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
        gradients = tl.multiple_of(gradients, 16)
        weights = tl.multiple_of(weights, 16)
        firsts = tl.multiple_of(firsts, 16)
        seconds = tl.multiple_of(seconds, 16)
    rows = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offsets = rows[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    valid = offsets < size
    divide_by = tl.load(divisor)
    if divide_by - divide_by == 0.0:  # neither nan nor infinite
        gradient = tl.load(gradients + offsets, mask=valid, other=0).to(tl.float32)
        gradient *= 1.0 / divide_by
        weight = tl.load(weights + offsets, mask=valid, other=0).to(tl.float32)
        first = tl.load(firsts + offsets, mask=valid, other=0)
        second = tl.load(seconds + offsets, mask=valid, other=0)
        if BITS == 8:
            exists = rows * COLUMNS < size
            first_scale = tl.load(first_scales + rows, mask=exists, other=0)[:, None]
            second_scale = tl.load(second_scales + rows, mask=exists, other=0)[:, None]
            # The code and fp32 have sign, exponent and mantissa in the same order. A float's
            # exponent has 120 (or 112) more than the code's: multiplied, subnormal numbers too.
            code = first.to(tl.uint32)
            bits = ((code & 0x80) << 24) | ((code & 0x7F) << 20)
            first = bits.to(tl.float32, bitcast=True) * FIRST_SHIFT_UP * first_scale
            bits = second.to(tl.uint32) << 19
            root = bits.to(tl.float32, bitcast=True) * SECOND_SHIFT_UP * second_scale
            second = root * root
        else:
            first = first.to(tl.float32)
            second = second.to(tl.float32)
        lr, correction1, correction2_root = tl.load(rates), tl.load(rates + 1), tl.load(rates + 2)
        key = _mixed(seed + tl.load(rates + 3).to(tl.uint32) * 0x9E3779B9)
        weight -= lr * weight_decay * weight
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient * gradient
        root = tl.sqrt(second)
        weight -= lr / correction1 * first / (root / correction2_root + eps)

        random = _mixed(offsets.to(tl.uint32) + (start + key))
        other = random * 0x9E3779B1
        tl.store(weights + offsets, _to_bf16(weight, random & 0xFFFF), mask=valid)
        if BITS == 8:
            magnitude = tl.abs(first)
            first_scale = tl.max(magnitude, axis=1) * FIRST_SCALE
            second_scale = tl.max(root, axis=1) * SECOND_SCALE
            tl.store(first_scales + rows, first_scale, mask=exists)
            tl.store(second_scales + rows, second_scale, mask=exists)
            inverse = tl.where(first_scale > SMALLEST, 1.0 / first_scale, 0.0)[:, None]
            scaled = magnitude * inverse * FIRST_SHIFT
            code = (scaled.to(tl.uint32, bitcast=True) + (other >> 12)) >> 20
            sign = (first.to(tl.uint32, bitcast=True) >> 24) & 0x80
            code = tl.minimum(code, 126) | sign
            tl.store(firsts + offsets, code.to(tl.uint8), mask=valid)
            inverse = tl.where(second_scale > SMALLEST, 1.0 / second_scale, 0.0)[:, None]
            scaled = root * inverse * SECOND_SHIFT
            code = (scaled.to(tl.uint32, bitcast=True) + (random >> 13)) >> 19
            tl.store(seconds + offsets, tl.minimum(code, 255).to(tl.uint8), mask=valid)
        else:
            tl.store(firsts + offsets, _to_bf16(first, other >> 16), mask=valid)
            tl.store(seconds + offsets, _to_bf16(second, random >> 16), mask=valid)


def adamw_low(
    held: Sequence[formats.Held], divisor, rates, beta1, beta2, eps, weight_decay
) -> None:
    """low_bits.adamw on the GPU: 10 bytes a parameter read and written with moments of 8 bits, 14
    with 16.

    `rates`: as of adamw(), and the number of this update. All else as there.
    """
    lists = [
        [one.grad for one in held],
        [one.weight for one in held],
        [one.exp_avg for one in held],
        [one.exp_avg_sq for one in held],
    ]
    bits = held[0].exp_avg.element_size() * 8
    numbers = [
        [0 if scale is None else scale.data_ptr() for one in held for scale in [getattr(one, name)]]
        for name in ("exp_avg_scale", "exp_avg_sq_scale")
    ]
    numbers += [[one.seed for one in held], [one.start for one in held]]
    pointers, blocks, aligned = _tables(lists, numbers)
    _adamw_low[(blocks.shape[1],)](
        pointers,
        blocks,
        divisor,
        rates,
        beta1,
        beta2,
        eps,
        weight_decay,
        len(held),
        blocks.shape[1],
        BITS=bits,
        ALIGNED=aligned,
        ROWS=BLOCK // formats.BLOCK,
        COLUMNS=formats.BLOCK,
        num_warps=8,
    )


def _tables(
    lists: list[list[torch.Tensor]], numbers: Sequence[list[int]] = ()
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """What a kernel over many tensors reads on the device: their addresses, list after list, with
    lists of other `numbers` behind them, and what each program works on; and whether all addresses
    and sizes are multiples of 16. The lists are equally long, of tensors with as many elements
    each."""
    device, sizes = lists[0][0].device, tuple(tensor.numel() for tensor in lists[0])
    addresses = tuple(tensor.data_ptr() for tensors in lists for tensor in tensors)
    return (
        _pointers((*addresses, *itertools.chain.from_iterable(numbers)), device),
        _blocks(sizes, device),
        all(number % 16 == 0 for number in itertools.chain(addresses, sizes)),
    )


@lru_cache(maxsize=32)
def _pointers(addresses: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Addresses on the device. The same in every step where gradients stay in their place, as they
    do where steps are recorded: while a graph is recorded nothing can come from the host."""
    # Not pinned, but small: CUDA takes it over at once, and the host does not wait for the device.
    return torch.tensor(addresses).to(device, non_blocking=True)


@lru_cache
def _blocks(sizes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """What each program works on; the same in every step."""
    table = [
        [i for i, n in enumerate(sizes) for _ in range(-(-n // BLOCK))],
        list(itertools.chain.from_iterable(range(-(-n // BLOCK)) for n in sizes)),
        [n for n in sizes for _ in range(-(-n // BLOCK))],
    ]
    return torch.tensor(table, dtype=torch.int32, device=device)


@triton.jit
def _total_of_row(logits, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """The highest of a row's logits, and the sum of the exponentials of what each is under it."""
    highest = float("-inf")
    total = 0.0
    for start in range(0, COLUMNS, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        block = tl.load(logits + offsets, mask=offsets < COLUMNS, other=float("-inf")).to(
            tl.float32
        )
        before = highest
        highest = tl.maximum(highest, tl.max(block))
        total = total * tl.exp(before - highest) + tl.sum(tl.exp(block - highest))
    return highest, total


@triton.jit
def _zeros_over_row(logits, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(0, COLUMNS, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        tl.store(
            logits + offsets,
            tl.zeros((BLOCK,), logits.dtype.element_ty),
            mask=offsets < COLUMNS,
        )


@triton.jit
def _gradient_over_row(logits, target, log_total, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(0, COLUMNS, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        valid = offsets < COLUMNS
        block = tl.load(logits + offsets, mask=valid, other=0.0).to(tl.float32)
        gradient = tl.exp(block - log_total) - tl.where(offsets == target, 1.0, 0.0)
        tl.store(logits + offsets, gradient.to(logits.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["targets"])
def _cross_entropy(
    logits,
    targets,
    losses,
    stride,
    COLUMNS: tl.constexpr,
    IGNORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    if target == IGNORE:
        tl.store(losses + row, 0.0)
        _zeros_over_row(logits, COLUMNS, BLOCK)
        return
    target_logit = tl.load(logits + target).to(tl.float32)  # before any thread writes there
    highest, total = _total_of_row(logits, COLUMNS, BLOCK)
    log_total = highest + tl.log(total)
    tl.store(losses + row, log_total - target_logit)
    _gradient_over_row(logits, target, log_total, COLUMNS, BLOCK)


def cross_entropy(logits, targets, losses, ignore: int) -> None:
    """Each row's cross-entropy into `losses` (rows,), fp32, 0 where the target is `ignore`; its
    gradient over the logits.

    `logits`: (rows, columns), any floating-point dtype, read from memory twice and written once;
    `targets`: (rows,), int64.
    """
    _cross_entropy[(logits.shape[0],)](
        logits,
        targets,
        losses,
        logits.stride(0),
        COLUMNS=logits.shape[1],
        IGNORE=ignore,
        BLOCK=4096,
        num_warps=8,
    )


@triton.jit(do_not_specialize=["targets", "first", "rows"])
def _part_of_rows(
    logits, targets, parts, stride, first, rows, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row) - first
    is_here = (target >= 0) & (target < COLUMNS)
    target_logit = tl.load(logits + target, mask=is_here, other=0.0).to(tl.float32)
    highest, total = _total_of_row(logits, COLUMNS, BLOCK)
    tl.store(parts + row, highest)
    tl.store(parts + rows + row, total)
    tl.store(parts + 2 * rows + row, target_logit)


@triton.jit(do_not_specialize=["targets", "losses", "first", "rows"])
def _cross_entropy_of_parts(
    logits,
    targets,
    parts,
    losses,
    stride,
    first,
    rows,
    COLUMNS: tl.constexpr,
    PROCESSES: tl.constexpr,
    IGNORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    if target == IGNORE:
        tl.store(losses + row, 0.0)
        _zeros_over_row(logits, COLUMNS, BLOCK)
        return
    highest = float("-inf")
    for process in range(PROCESSES):
        highest = tl.maximum(highest, tl.load(parts + 3 * process * rows + row))
    total = 0.0
    target_logit = 0.0
    for process in range(PROCESSES):
        part = parts + 3 * process * rows + row
        total += tl.load(part + rows) * tl.exp(tl.load(part) - highest)
        target_logit += tl.load(part + 2 * rows)
    log_total = highest + tl.log(total)
    tl.store(losses + row, log_total - target_logit)
    _gradient_over_row(logits, target - first, log_total, COLUMNS, BLOCK)


def part_of_rows(logits, targets, parts, first: int) -> None:
    """Of a vocabulary that is split over processes, what the others must know of this one's
    columns.

    `logits`: (rows, columns), `first` the first of them in the whole vocabulary; `targets`:
    (rows,), int64, in the whole vocabulary; `parts`: fp32 (3, rows), filled with each row's highest
    logit, its sum of exponentials under that, and the target's logit or 0 where it is not here.
    """
    rows, columns = logits.shape
    _part_of_rows[(rows,)](
        logits,
        targets,
        parts,
        logits.stride(0),
        first,
        rows,
        COLUMNS=columns,
        BLOCK=4096,
        num_warps=8,
    )


def cross_entropy_of_parts(logits, targets, parts, losses, first: int, ignore: int) -> None:
    """cross_entropy() once all is known: `parts` (processes, 3, rows), what part_of_rows() has
    given on each."""
    rows, columns = logits.shape
    _cross_entropy_of_parts[(rows,)](
        logits,
        targets,
        parts,
        losses,
        logits.stride(0),
        first,
        rows,
        COLUMNS=columns,
        PROCESSES=len(parts),
        IGNORE=ignore,
        BLOCK=4096,
        num_warps=8,
    )


@triton.jit
def _places(cu_seqlens, heads, DIM: tl.constexpr, LENGTH: tl.constexpr):
    """This program's row and head: where its queries lie and its results, which of them exist, and
    which keys a query sees."""
    row, head = tl.program_id(0), tl.program_id(1)
    start = tl.load(cu_seqlens + row)
    token = tl.arange(0, LENGTH)
    element = tl.arange(0, DIM)[None, :]
    places = ((start + token) * 3 * heads + head).to(tl.int64)[:, None] * DIM + element
    out_places = ((start + token) * heads + head).to(tl.int64)[:, None] * DIM + element
    exists = (token < tl.load(cu_seqlens + row + 1) - start)[:, None]
    return places, out_places, exists, token[:, None] >= token[None, :]


@triton.jit
def _softmax(q, k, scale, sees):
    scores = tl.where(sees, tl.dot(q, tl.trans(k)) * scale, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit(do_not_specialize=["heads"])
def _short_attention(qkv, out, cu_seqlens, heads, scale, DIM: tl.constexpr, LENGTH: tl.constexpr):
    places, out_places, exists, sees = _places(cu_seqlens, heads, DIM, LENGTH)
    q = tl.load(qkv + places, mask=exists, other=0.0)
    k = tl.load(qkv + heads * DIM + places, mask=exists, other=0.0)
    v = tl.load(qkv + 2 * heads * DIM + places, mask=exists, other=0.0)
    weights = _softmax(q, k, scale, sees)
    tl.store(out + out_places, tl.dot(weights.to(v.dtype), v).to(v.dtype), mask=exists)


@triton.jit(do_not_specialize=["heads"])
def _short_attention_backward(
    qkv, qkv_grad, grad, cu_seqlens, heads, scale, DIM: tl.constexpr, LENGTH: tl.constexpr
):
    places, out_places, exists, sees = _places(cu_seqlens, heads, DIM, LENGTH)
    q = tl.load(qkv + places, mask=exists, other=0.0)
    k = tl.load(qkv + heads * DIM + places, mask=exists, other=0.0)
    weights = _softmax(q, k, scale, sees)
    v = tl.load(qkv + 2 * heads * DIM + places, mask=exists, other=0.0)
    grad = tl.load(grad + out_places, mask=exists, other=0.0)
    if LENGTH > 64:
        # Before and not after what follows: more registers are in use, but v is out of the way when
        # the weights come to shared memory. [C23] In Triton 3.1 that takes 84 KiB and not 100, one
        # more than sm_86 and sm_89 have.
        weights_grad = tl.dot(grad, tl.trans(v))
    tl.store(
        qkv_grad + 2 * heads * DIM + places,
        tl.dot(tl.trans(weights.to(v.dtype)), grad).to(v.dtype),
        mask=exists,
    )
    if LENGTH <= 64:
        weights_grad = tl.dot(grad, tl.trans(v))
    scores_grad = weights * (weights_grad - tl.sum(weights * weights_grad, 1)[:, None]) * scale
    scores_grad = scores_grad.to(v.dtype)
    tl.store(qkv_grad + places, tl.dot(scores_grad, k).to(v.dtype), mask=exists)
    tl.store(
        qkv_grad + heads * DIM + places, tl.dot(tl.trans(scores_grad), q).to(v.dtype), mask=exists
    )


class ShortAttention(torch.autograd.Function):
    """Causal attention within short rows, each row and head one program, forward and backward.

    (qkv, cu_seqlens, length) -> (tokens, heads, head_dim): qkv (tokens, 3, heads, head_dim) in 16
    bits; row i is the tokens [cu_seqlens[i], cu_seqlens[i + 1]), int32, at most `length`, which is
    padded() of a longest row for which fits_short_attention() (opt/model/kernel_probe.py).
    """

    @staticmethod
    def forward(ctx, qkv, cu_seqlens, length):
        qkv = qkv.contiguous()
        out = torch.empty_like(qkv[:, 0])
        ctx.save_for_backward(qkv, cu_seqlens)
        ctx.length = length
        _launch(_short_attention, (qkv, out), cu_seqlens, length)
        return out

    @staticmethod
    def backward(ctx, grad):
        qkv, cu_seqlens = ctx.saved_tensors
        qkv_grad = torch.empty_like(qkv)
        _launch(
            _short_attention_backward, (qkv, qkv_grad, grad.contiguous()), cu_seqlens, ctx.length
        )
        return qkv_grad, None, None


def _launch(kernel, tensors, cu_seqlens, length):
    heads, dim = tensors[0].shape[2:]
    grid = (len(cu_seqlens) - 1, heads)
    kernel[grid](
        *tensors,
        cu_seqlens,
        heads,
        dim**-0.5,
        DIM=dim,
        LENGTH=length,
        num_warps=4 if length <= 64 else 8,
    )


@triton.jit
def _largest(
    matrix,
    largest,  # fp32 scalar, 0 before
    sums,  # fp32 (programs over the rows, columns)
    rows,
    columns,
    SUMMED: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    chunk, column = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    highest = tl.zeros((STEP, COLUMNS), tl.float32)
    total = tl.zeros((STEP, COLUMNS), tl.float32)
    for start in range(0, ROWS, STEP):
        row = chunk * ROWS + start + tl.arange(0, STEP)
        exists = (row < rows)[:, None] & (column < columns)[None, :]
        places = row.to(tl.int64)[:, None] * columns + column[None, :]
        part = tl.load(matrix + places, mask=exists, other=0.0).to(tl.float32)
        highest = tl.maximum(highest, tl.abs(part))
        if SUMMED:
            total += part
    tl.atomic_max(largest, tl.max(highest))
    if SUMMED:
        tl.store(sums + chunk * columns + column, tl.sum(total, 0), mask=column < columns)


@triton.jit
def _to_fp8(
    matrix,
    largest,
    scale,
    quantized,  # bytes (rows, columns)
    turned,  # bytes (columns, rows)
    rows,
    columns,
    top,
    smallest,
    FORMAT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = (row < rows)[:, None] & (column < columns)[None, :]
    places = row.to(tl.int64)[:, None] * columns + column[None, :]
    divisor = tl.maximum(tl.load(largest), smallest) / top
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(scale, divisor)
    scaled = tl.load(matrix + places, mask=exists, other=0.0).to(tl.float32) / divisor
    # A nan stays one
    scaled = tl.where(scaled == scaled, tl.minimum(tl.maximum(scaled, -top), top), scaled)
    eight = scaled.to(FORMAT).to(tl.uint8, bitcast=True)
    tl.store(quantized + places, eight, mask=exists)
    if TRANSPOSED:
        places = column.to(tl.int64)[:, None] * rows + row[None, :]
        exists = (column < columns)[:, None] & (row < rows)[None, :]
        tl.store(turned + places, tl.trans(eight), mask=exists)


_FORMATS = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}


def quantize(matrix, dtype, transposed: bool, summed: bool):
    """float8.quantize of a contiguous matrix, in two kernels: it is read twice, and written in 8
    bits."""
    rows, columns = matrix.shape
    chunk = 256
    chunks, wide = triton.cdiv(rows, chunk), triton.cdiv(columns, 128)
    largest = torch.zeros((), dtype=torch.float32, device=matrix.device)
    scale = torch.empty_like(largest)
    sums = largest.new_empty((chunks, columns) if summed else (0,))
    sizes = {"ROWS": chunk, "STEP": 32, "COLUMNS": 128, "num_warps": 4}
    _largest[(chunks, wide)](matrix, largest, sums, rows, columns, SUMMED=summed, **sizes)
    quantized = matrix.new_empty((rows, columns), dtype=dtype)
    turned = matrix.new_empty((columns, rows) if transposed else (0,), dtype=dtype)
    _to_fp8[(triton.cdiv(rows, 128), wide)](
        matrix,
        largest,
        scale,
        quantized.view(torch.uint8),
        turned.view(torch.uint8),
        rows,
        columns,
        torch.finfo(dtype).max,
        formats.SMALLEST_LARGEST,
        FORMAT=_FORMATS[dtype],
        TRANSPOSED=transposed,
        ROWS=128,
        COLUMNS=128,
        num_warps=8,
    )
    return quantized, turned, scale, sums.sum(0) if summed else sums
