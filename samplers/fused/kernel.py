"""The Triton kernel: one call of a plan, every tensor read once and written once."""

import triton
import triton.language as tl

from ..philox import LANE
from .table import HEAD

_LANE = tl.constexpr(LANE)
_HEAD = tl.constexpr(HEAD)


@triton.jit
def _read(pointer, at, inside):
    return tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _pair(first, second):
    """Two normal numbers of two random words, by Box and Muller."""
    radius = tl.sqrt(-2.0 * tl.log(((first >> 8).to(tl.float32) + 1.0) * 5.9604644775390625e-08))
    # A turn is 2**24 here. From the nearest quarter it is at most an eighth, for which
    # the polynomials of Cephes are made; CUDA's own sine is ready for any angle, and takes local memory for it.
    turn = (second >> 8).to(tl.int32)
    quarter = (turn + 2097152) >> 22
    angle = (turn - (quarter << 22)).to(tl.float32) * 3.7450702829239286e-07
    z = angle * angle
    sine = angle + angle * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    cosine = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    odd = (quarter & 1) == 1
    x = tl.where(odd, sine, cosine)
    y = tl.where(odd, cosine, sine)
    x = tl.where(((quarter + 1) & 2) == 2, -x, x)
    y = tl.where((quarter & 2) == 2, -y, y)
    return radius * x, radius * y


@triton.jit
def _normals(seed, counter, step):
    """Four normal numbers of each counter."""
    w0, w1, w2, w3 = tl.philox(seed, counter, step, 0, 0)
    n0, n1 = _pair(w0, w1)
    n2, n3 = _pair(w2, w3)
    return n0, n1, n2, n3


@triton.jit
def _normal_of(seed, step, element):
    """Of any elements; three quarters of the numbers are made in vain."""
    n0, n1, n2, n3 = _normals(seed, element // (4 * _LANE) * _LANE + element % _LANE, step)
    lane = element // _LANE % 4
    return tl.where(lane < 2, tl.where(lane == 0, n0, n1), tl.where(lane == 2, n2, n3))


@triton.jit(do_not_specialize=["first_step", "blocks", "channels"])
def plan_call(
    outputs,
    inputs,
    input_strides,
    ancestors,
    state,
    state_ancestors,
    new_state,
    unconditional,
    unconditional_stride,
    scale,
    bound,
    seeds,
    first_step,
    table,
    index,
    size,
    blocks,
    channels,
    WIDTH: tl.constexpr,
    INDEX_STRIDE: tl.constexpr,
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """One program does ``LANES`` blocks of one sample.

    ``inputs`` are the sample, the model's output, given noise and kept tensors, ``input_strides``
    from sample to sample; the samples of outputs and states follow each other.
    """
    COLUMNS: tl.constexpr = len(inputs) + (seeds is not None)
    program = tl.program_id(0)
    batch = (program // blocks).to(tl.int64)
    start = program % blocks * (BLOCK * LANES)
    position = tl.load(index + batch * INDEX_STRIDE)
    row = table + position * WIDTH
    sources = ()
    for i in tl.static_range(len(inputs)):
        source = batch
        if ancestors[i] is not None:
            source = tl.load(ancestors[i] + batch).to(tl.int64)
        sources = sources + (inputs[i] + source * input_strides[i],)
    if seeds is not None:
        seed = tl.load(seeds + batch)
        step = (first_step + position).to(tl.int32)
        if LANES == 4:
            counter = start // 4 + tl.arange(0, BLOCK)
            normals = _normals(seed, counter, step)
    limit = 1.0
    if bound is not None:
        limit = tl.load(bound + batch)
    coefficients = ()
    for i in tl.static_range(len(outputs) * COLUMNS):
        coefficients = coefficients + (tl.load(row + _HEAD + i),)
    for lane in tl.static_range(LANES):
        at = start + lane * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        x = _read(sources[0], at, inside)
        if state is not None:
            before = batch
            if state_ancestors is not None:
                before = tl.load(state_ancestors + batch).to(tl.int64)
            exact = _read(state + before * size, at, inside)
            # What a callback changed is taken, the rest is as it was before rounding.
            x = tl.where(exact.to(inputs[0].dtype.element_ty).to(tl.float32) == x, exact, x)
        u = _read(sources[1], at, inside)
        if unconditional is not None:
            other = _read(unconditional + batch * unconditional_stride, at, inside)
            u = other + tl.load(scale) * (u - other)
        if CLIP:
            u = tl.load(row) * x + tl.load(row + 1) * u
            # Written so that NaN stays.
            u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u)) / limit
        values = (x, u)
        if seeds is not None:
            if LANES == 4:
                values = values + (normals[lane],)
            else:
                element = at
                if channels is not None:
                    element = at % channels * (size // channels) + at // channels
                values = values + (_normal_of(seed, step, element),)
        for i in tl.static_range(2, len(inputs)):
            values = values + (_read(sources[i], at, inside),)
        for k in tl.static_range(len(outputs)):
            total = tl.zeros([BLOCK], tl.float32)
            for i in tl.static_range(COLUMNS):
                c = coefficients[k * COLUMNS + i]
                # Zero times what is not finite is nothing here.
                total += tl.where(c != 0.0, c * values[i], 0.0)
            target = outputs[k] + batch * size
            tl.store(target + at, total.to(outputs[k].dtype.element_ty), mask=inside)
            if k == 0 and new_state is not None:
                tl.store(new_state + batch * size + at, total, mask=inside)
