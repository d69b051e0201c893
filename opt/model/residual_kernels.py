"""GPU kernels, in Triton: dropout, residual and layer norm in one pass over memory, a token a
program, and the way back.

[C37] What is dropped is computed again in backward, from the same seed, and not kept. Philox gives
128 random bits a call, of which eight elements have 16 each; PyTorch's compiler makes a call for
each element, uses 32 bits of it, and is bound by that arithmetic: of 8,192 x 4,096 elements in bf16
155 us where the memory's rate asks for 67 (one H100).
"""

import torch
import triton
import triton.language as tl

# Of programs that add up the norm's gradients over the tokens, each its part of them: as many as
# have their registers at a time, 16 on each of an H100's multiprocessors
WARPS = 2048


@triton.jit
def _is_kept(seed, row, THRESHOLD: tl.constexpr, BLOCK: tl.constexpr):
    """Of a row's elements, each with probability 1 - THRESHOLD / 65536."""
    group = row * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    first, second, third, fourth = tl.randint4x(seed, group)
    words = tl.interleave(tl.interleave(first, second), tl.interleave(third, fourth))
    words = words.to(tl.uint32, bitcast=True)
    return tl.interleave(words & 0xFFFF, words >> 16) >= THRESHOLD


@triton.jit(do_not_specialize=["place"])
def _add(
    x,
    residual,
    total,  # residual + dropout(x)
    normed,
    means,
    inverses,  # of the standard deviations
    weight,
    bias,
    seeds,
    place,
    scale,
    eps,
    THRESHOLD: tl.constexpr,  # of 65536: how many are dropped
    ADDS: tl.constexpr,  # whether there is a residual
    NORM: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    exists = column < COLUMNS
    places = row.to(tl.int64) * COLUMNS + column
    out = tl.load(x + places, mask=exists, other=0.0).to(tl.float32)
    if ADDS:
        before = tl.load(residual + places, mask=exists, other=0.0).to(tl.float32)
    if THRESHOLD > 0:
        kept = _is_kept(tl.load(seeds + place), row, THRESHOLD, BLOCK)
        out = tl.where(kept, out * scale, 0.0)
    if ADDS:
        out += before
    out = out.to(total.dtype.element_ty)
    tl.store(total + places, out, mask=exists)
    if NORM:  # of what backward will read
        value = out.to(tl.float32)
        mean = tl.sum(value) / COLUMNS
        distance = tl.where(exists, value - mean, 0.0)
        inverse = 1.0 / tl.sqrt(tl.sum(distance * distance) / COLUMNS + eps)
        tl.store(means + row, mean)
        tl.store(inverses + row, inverse)
        by = tl.load(weight + column, mask=exists, other=0.0).to(tl.float32)
        shift = tl.load(bias + column, mask=exists, other=0.0).to(tl.float32)
        value = distance * inverse * by + shift
        tl.store(normed + places, value.to(normed.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["place", "rows"])
def _add_norm_backward(
    grad,  # of what goes on as the residual
    normed_grad,
    total,
    means,
    inverses,
    weight,
    seeds,
    place,
    scale,
    residual_grad,
    x_grad,
    sums,  # fp32 (programs, 2, columns): of the norm's weight and bias
    rows,
    THRESHOLD: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    IS_TOTAL: tl.constexpr,  # what goes on is `total`, and not what the norm has made of it
    TRAINED: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, programs, column = tl.program_id(0), tl.num_programs(0), tl.arange(0, BLOCK)
    exists, stride = column < COLUMNS, tl.full((), COLUMNS, tl.int64)
    by = tl.load(weight + column, mask=exists, other=0.0).to(tl.float32)
    if TRAINED:
        weight_sum = tl.zeros((BLOCK,), tl.float32)
        bias_sum = tl.zeros((BLOCK,), tl.float32)
    if THRESHOLD > 0:
        seed = tl.load(seeds + place)
    for row in range(program, rows, programs):
        places = row * stride + column
        of_normed = tl.load(normed_grad + places, mask=exists, other=0.0).to(tl.float32)
        value = tl.load(total + places, mask=exists, other=0.0).to(tl.float32)
        if HAS_GRAD:
            of_rest = tl.load(grad + places, mask=exists, other=0.0).to(tl.float32)
            if not IS_TOTAL:
                of_normed += of_rest
        inverse = tl.load(inverses + row)
        value = tl.where(exists, (value - tl.load(means + row)) * inverse, 0.0)
        if TRAINED:
            weight_sum += of_normed * value
            bias_sum += of_normed
        scaled = of_normed * by
        along = tl.sum(scaled * value) / COLUMNS
        mean = tl.sum(scaled) / COLUMNS
        out = (scaled - value * along - mean) * inverse
        if HAS_GRAD:
            if IS_TOTAL:
                out += of_rest
        tl.store(residual_grad + places, out.to(residual_grad.dtype.element_ty), mask=exists)
        if THRESHOLD > 0:
            out = tl.where(_is_kept(seed, row, THRESHOLD, BLOCK), out * scale, 0.0)
            tl.store(x_grad + places, out.to(x_grad.dtype.element_ty), mask=exists)
    if TRAINED:
        sums += program * 2 * COLUMNS + column
        tl.store(sums, weight_sum, mask=exists)
        tl.store(sums + COLUMNS, bias_sum, mask=exists)


def add(x, residual, seeds, place: int, threshold: int):
    """residual + dropout(x), or dropout(x) if the residual is None: see residual.add."""
    total = torch.empty_like(x)
    given = total if residual is None else residual
    unused = (total,) * 5
    _launch_add(x, given, total, *unused, seeds, place, 0.0, threshold, residual is not None, False)
    return total


def add_norm(x, residual, weight, bias, eps: float, seeds, place: int, threshold: int):
    """(total, its layer norm, means (rows,), inverse standard deviations (rows,)): see
    residual.add_norm."""
    rows = x.shape[:-1].numel()
    total, normed = torch.empty_like(x), torch.empty_like(x)
    means, inverses = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    outs = total, normed, means, inverses
    _launch_add(x, residual, *outs, weight, bias, seeds, place, eps, threshold, True, True)
    return outs


def _launch_add(x, *given):
    *tensors, place, eps, threshold, adds, norm = given
    columns = x.shape[-1]
    block, warps = sizes(columns)
    _add[(x.shape[:-1].numel(),)](
        x,
        *tensors,
        place,
        scale(threshold),
        eps,
        THRESHOLD=threshold,
        ADDS=adds,
        NORM=norm,
        COLUMNS=columns,
        BLOCK=block,
        num_warps=warps,
    )


def add_norm_backward(
    grad,
    normed_grad,
    total,
    means,
    inverses,
    weight,
    seeds,
    place: int,
    threshold: int,
    is_total: bool,
    trained: bool,
):
    """The gradients of add_norm's residual, of its x (empty where nothing is dropped: the same),
    and, if they are `trained`, of the norm's weight and bias, fp32 (2, columns).

    `grad`: of what goes on as the residual, `total` or the norm's output, or None.
    """
    columns, rows = total.shape[-1], total.shape[:-1].numel()
    block, warps = sizes(columns)
    residual_grad = torch.empty_like(total)
    x_grad = torch.empty_like(total) if threshold else total.new_empty(0)
    # At least two tokens each, or as much would be added up behind them
    programs = min(triton.cdiv(rows, 2), WARPS // warps) if trained else rows
    sums = means.new_empty((programs, 2, columns) if trained else (0,))
    _add_norm_backward[(programs,)](
        total if grad is None else grad,
        normed_grad,
        total,
        means,
        inverses,
        weight,
        seeds,
        place,
        scale(threshold),
        residual_grad,
        x_grad,
        sums,
        rows,
        THRESHOLD=threshold,
        HAS_GRAD=grad is not None,
        IS_TOTAL=is_total,
        TRAINED=trained,
        COLUMNS=columns,
        BLOCK=block,
        num_warps=warps,
    )
    return residual_grad, x_grad, sums.sum(0) if trained else sums


def sizes(columns: int) -> tuple[int, int]:
    """Elements of a program, and its warps: 16 elements a thread."""
    block = triton.next_power_of_2(columns)
    return block, max(1, min(32, block // 512))


def scale(threshold: int) -> float:
    """Of what is kept where `threshold` of 65536 are dropped."""
    return 65536 / (65536 - threshold) if threshold < 65536 else 0.0
