"""Triton kernels of head-shifted attention, forward and backward; `stdha.py` defines the op.

One grid program works on one head of one frame; where that head's keys and values lie is a matter
of one address, so a shifted head costs what a spatial head costs and nothing is copied or moved.

    forward   `resident`: keys and values of the frame stay on the chip while the queries pass by;
              one softmax over the whole row. For heads of 64 and up to 272 tokens in half
              precision; 197 keys are held as 128 + 64 + 16, 257 as 256 + 16.
              `streamed`: keys and values pass by the queries, with a running softmax. For the rest.
    backward  `fused`: a program owns one frame's keys. Each query frame reads one key frame, so
              it also owns the whole gradient of the queries of its readers (none, one or two
              frames): five products, no atomics, the same bits every time. Up to 256 tokens, and
              257, whose last key is handled by plain arithmetic instead of a tile of its own.
              `query` and `key_value`: two kernels, seven products. For the rest.

Softmax and sums are float32, in base 2: `lse` is log2 of the sum of 2^(scale_log2 * score).
Token counts and offsets are compile-time constants (one compilation a model): that and no hoisting
out of loops (`disable_licm`) leave registers for three programs an SM instead of spills.
Rejected: keys in generic tiles of 128 (1.7 to 2.2 times the work at 197 and 257 tokens), query
tiles of 128 (spills), shifted copies of keys and values (`stdha.py` has them, for the CPU).
"""

import triton
import triton.language as tl

from zeroi2v_kernels.dot import _dot


@triton.jit
def _head_offset(head, HEAD_OFFSETS: tl.constexpr):
    offset = 0
    for h in tl.static_range(len(HEAD_OFFSETS)):
        if HEAD_OFFSETS[h] != 0:
            offset = tl.where(head == h, HEAD_OFFSETS[h], offset)
    return offset


@triton.jit
def _key_frame(frame, head, T, HEAD_OFFSETS: tl.constexpr):
    """The frame whose keys `head` of `frame` reads."""
    shifted = frame + _head_offset(head, HEAD_OFFSETS)
    return tl.where((shifted >= 0) & (shifted < T), shifted, frame)


@triton.jit
def _load(
    ptr, start, stride,
    END: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr = True,
):  # fmt: skip
    """Rows `start ... start + ROWS` of a matrix of END rows, zeros past its end: [ROWS, D]."""
    rows = start + tl.arange(0, ROWS)
    pointers = ptr + rows[:, None] * stride + tl.arange(0, D)[None, :]
    if MASKED:
        return tl.load(pointers, mask=rows[:, None] < END, other=0.0)
    return tl.load(pointers)


@triton.jit
def _store(ptr, start, stride, x, END: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr):
    rows = start + tl.arange(0, ROWS)
    pointers = ptr + rows[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(pointers, x.to(ptr.dtype.element_ty), mask=rows[:, None] < END)


@triton.jit
def _scores(query, key, first, N: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr):
    """<query, key>, -inf for keys past the N-th: [BLOCK_M, KEYS]."""
    scores = _dot(query, tl.trans(key))
    if MASKED:
        scores = tl.where(first + tl.arange(0, KEYS)[None, :] < N, scores, float("-inf"))
    return scores


@triton.jit(do_not_specialize=["T"])
def _forward_resident_kernel(
    q_ptr, kv_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qt, stride_qn, stride_qh,
    stride_kb, stride_kt, stride_kn, stride_kh, stride_kv,
    T, scale_log2,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HEAD_OFFSETS: tl.constexpr,
    SEGMENTS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    H: tl.constexpr = len(HEAD_OFFSETS)
    frame_id = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    batch = frame_id // T
    frame = frame_id % T
    q_ptr += batch * stride_qb + frame * stride_qt + head * stride_qh
    source = _key_frame(frame, head, T, HEAD_OFFSETS)
    kv_ptr += batch * stride_kb + source * stride_kt + head * stride_kh
    out_ptr += (frame_id * M * H + head) * D
    lse_ptr += (frame_id * H + head) * M

    keys, values = (), ()
    for i in tl.static_range(len(SEGMENTS)):
        keys = keys + (_load(kv_ptr, SEGMENTS[i][0], stride_kn, N, SEGMENTS[i][1], D),)
        values = values + (
            _load(kv_ptr + stride_kv, SEGMENTS[i][0], stride_kn, N, SEGMENTS[i][1], D),
        )

    step = tl.num_programs(1) * BLOCK_M
    for start in tl.range(tl.program_id(1) * BLOCK_M, M, step, disable_licm=True):
        query = _load(q_ptr, start, stride_qn, M, BLOCK_M, D)
        scores = ()
        peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        for i in tl.static_range(len(SEGMENTS)):
            s = _scores(
                query,
                keys[i],
                SEGMENTS[i][0],
                N,
                SEGMENTS[i][1],
                SEGMENTS[i][0] + SEGMENTS[i][1] > N,
            )
            scores = scores + (s,)
            peak = tl.maximum(peak, tl.max(s, 1))
        peak *= scale_log2
        total = tl.zeros((BLOCK_M,), tl.float32)
        out = tl.zeros((BLOCK_M, D), tl.float32)
        for i in tl.static_range(len(SEGMENTS)):
            p = tl.exp2(scores[i] * scale_log2 - peak[:, None])
            total += tl.sum(p, 1)
            out += _dot(p.to(query.dtype), values[i])
        _store(out_ptr, start, H * D, out * (1 / total)[:, None], M, BLOCK_M, D)
        rows = start + tl.arange(0, BLOCK_M)
        tl.store(lse_ptr + rows, peak + tl.log2(total), mask=rows < M)


@triton.jit(do_not_specialize=["T"])
def _forward_streamed_kernel(
    q_ptr, kv_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qt, stride_qn, stride_qh,
    stride_kb, stride_kt, stride_kn, stride_kh, stride_kv,
    T, scale_log2,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HEAD_OFFSETS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    H: tl.constexpr = len(HEAD_OFFSETS)
    TILES: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    frame_id = (tl.program_id(0) // (H * TILES)).to(tl.int64)
    head = tl.program_id(0) // TILES % H
    start = tl.program_id(0) % TILES * BLOCK_M
    batch = frame_id // T
    frame = frame_id % T
    q_ptr += batch * stride_qb + frame * stride_qt + head * stride_qh
    source = _key_frame(frame, head, T, HEAD_OFFSETS)
    kv_ptr += batch * stride_kb + source * stride_kt + head * stride_kh
    out_ptr += (frame_id * M * H + head) * D
    lse_ptr += (frame_id * H + head) * M

    query = _load(q_ptr, start, stride_qn, M, BLOCK_M, D)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, D), tl.float32)
    for first in tl.range(0, N // BLOCK_N * BLOCK_N, BLOCK_N, disable_licm=True):
        key = _load(kv_ptr, first, stride_kn, N, BLOCK_N, D, False)
        value = _load(kv_ptr + stride_kv, first, stride_kn, N, BLOCK_N, D, False)
        scores = _scores(query, key, first, N, BLOCK_N, False)
        peak, total, out = _online(scores, value, peak, total, out, scale_log2)
    if TAIL:
        rest: tl.constexpr = N // BLOCK_N * BLOCK_N
        key = _load(kv_ptr, rest, stride_kn, N, TAIL, D)
        value = _load(kv_ptr + stride_kv, rest, stride_kn, N, TAIL, D)
        scores = _scores(query, key, rest, N, TAIL, True)
        peak, total, out = _online(scores, value, peak, total, out, scale_log2)
    _store(out_ptr, start, H * D, out * (1 / total)[:, None], M, BLOCK_M, D)
    rows = start + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + rows, peak + tl.log2(total), mask=rows < M)


@triton.jit
def _online(scores, value, peak, total, out, scale_log2):
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
    p = tl.exp2(scores * scale_log2 - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(p, 1)
    out = out * shrink[:, None] + _dot(p.to(value.dtype), value)
    return new_peak, total, out


@triton.jit
def _readers(frame, head, T, HEAD_OFFSETS: tl.constexpr):
    """Who reads the keys of `frame`: the frame at -offset (if any), `frame` itself (if at an edge).

    Returns that frame, or `frame` if there is none, and the number of readers, 0 to 2; the second
    of two is `frame`.
    """
    offset = _head_offset(head, HEAD_OFFSETS)
    shifted = (frame - offset >= 0) & (frame - offset < T)
    edge = (frame + offset < 0) | (frame + offset >= T)
    return tl.where(shifted, frame - offset, frame), shifted.to(tl.int32) + edge.to(tl.int32)


@triton.jit(do_not_specialize=["T"])
def _backward_fused_kernel(
    q_ptr, kv_ptr, out_ptr, lse_ptr, grad_ptr, dq_ptr, dkv_ptr,
    stride_qb, stride_qt, stride_qn, stride_qh,
    stride_kb, stride_kt, stride_kn, stride_kh, stride_kv,
    stride_gb, stride_gt, stride_gn, stride_gh,
    stride_dqb, stride_dqt, stride_dqn, stride_dqh,
    stride_dkb, stride_dkt, stride_dkn, stride_dkh, stride_dkv,
    T, scale, scale_log2,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HEAD_OFFSETS: tl.constexpr,
    BLOCK_M: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    H: tl.constexpr = len(HEAD_OFFSETS)
    TILES: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    EXTRA: tl.constexpr = N == KEYS + 1
    frame_id = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    batch = frame_id // T
    source = frame_id % T
    kv_ptr += batch * stride_kb + source * stride_kt + head * stride_kh
    dkv_ptr += batch * stride_dkb + source * stride_dkt + head * stride_dkh
    q_ptr += batch * stride_qb + head * stride_qh
    grad_ptr += batch * stride_gb + head * stride_gh
    dq_ptr += batch * stride_dqb + head * stride_dqh
    out_ptr += (batch * T * M * H + head) * D
    lse_ptr += (batch * T * H + head) * M

    columns = tl.arange(0, D)
    key_rows = tl.arange(0, KEYS)
    key = _load(kv_ptr, 0, stride_kn, N, KEYS, D, KEYS > N)
    value = _load(kv_ptr + stride_kv, 0, stride_kn, N, KEYS, D, KEYS > N)
    dkey = tl.zeros((KEYS, D), tl.float32)
    dvalue = tl.zeros((KEYS, D), tl.float32)
    if EXTRA:
        dlast_key = tl.zeros((D,), tl.float32)
        dlast_value = tl.zeros((D,), tl.float32)
    reader, num_readers = _readers(source, head, T, HEAD_OFFSETS)
    for step in tl.range(0, num_readers * TILES, disable_licm=True):
        frame = tl.where(step < TILES, reader, source)
        start = step % TILES * BLOCK_M
        rows = start + tl.arange(0, BLOCK_M)
        query = _load(q_ptr + frame * stride_qt, start, stride_qn, M, BLOCK_M, D)
        grad = _load(grad_ptr + frame * stride_gt, start, stride_gn, M, BLOCK_M, D)
        out = _load(out_ptr + frame * (M * H * D), start, H * D, M, BLOCK_M, D)
        lse = tl.load(lse_ptr + frame * (M * H) + rows, mask=rows < M, other=float("inf"))
        delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
        scores = _dot(key, tl.trans(query))
        if KEYS > N:
            scores = tl.where(key_rows[:, None] < N, scores, float("-inf"))
        p = tl.exp2(scores * scale_log2 - lse[None, :])
        dvalue += _dot(p.to(query.dtype), grad)
        ds = p * (_dot(value, tl.trans(grad)) - delta[None, :])
        ds = ds.to(query.dtype)
        dkey += _dot(ds, query)
        dquery = tl.trans(_dot(tl.trans(key), ds))
        if EXTRA:
            last_key = tl.load(kv_ptr + KEYS * stride_kn + columns).to(tl.float32)
            last_value = tl.load(kv_ptr + stride_kv + KEYS * stride_kn + columns).to(tl.float32)
            q = query.to(tl.float32)
            g = grad.to(tl.float32)
            last_p = tl.exp2(tl.sum(q * last_key[None, :], 1) * scale_log2 - lse)
            last_ds = last_p * (tl.sum(g * last_value[None, :], 1) - delta)
            dlast_value += tl.sum(last_p[:, None] * g, 0)
            dlast_key += tl.sum(last_ds[:, None] * q, 0)
            dquery += last_ds[:, None] * last_key[None, :]
        _store(dq_ptr + frame * stride_dqt, start, stride_dqn, dquery * scale, M, BLOCK_M, D)
    _store(dkv_ptr, 0, stride_dkn, dkey * scale, N, KEYS, D)
    _store(dkv_ptr + stride_dkv, 0, stride_dkn, dvalue, N, KEYS, D)
    if EXTRA:
        last_ptr = dkv_ptr + KEYS * stride_dkn + columns
        tl.store(last_ptr, (dlast_key * scale).to(dkv_ptr.dtype.element_ty))
        tl.store(last_ptr + stride_dkv, dlast_value.to(dkv_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["T"])
def _backward_query_kernel(
    q_ptr, kv_ptr, out_ptr, lse_ptr, grad_ptr, dq_ptr, delta_ptr,
    stride_qb, stride_qt, stride_qn, stride_qh,
    stride_kb, stride_kt, stride_kn, stride_kh, stride_kv,
    stride_gb, stride_gt, stride_gn, stride_gh,
    stride_dqb, stride_dqt, stride_dqn, stride_dqh,
    T, scale, scale_log2,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HEAD_OFFSETS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, RELOAD: tl.constexpr,
):  # fmt: skip
    H: tl.constexpr = len(HEAD_OFFSETS)
    TILES: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    frame_id = (tl.program_id(0) // (H * TILES)).to(tl.int64)
    head = tl.program_id(0) // TILES % H
    start = tl.program_id(0) % TILES * BLOCK_M
    batch = frame_id // T
    frame = frame_id % T
    source = _key_frame(frame, head, T, HEAD_OFFSETS)
    q_ptr += batch * stride_qb + frame * stride_qt + head * stride_qh
    kv_ptr += batch * stride_kb + source * stride_kt + head * stride_kh
    grad_ptr += batch * stride_gb + frame * stride_gt + head * stride_gh
    dq_ptr += batch * stride_dqb + frame * stride_dqt + head * stride_dqh
    out_ptr += (frame_id * M * H + head) * D
    rows = start + tl.arange(0, BLOCK_M)
    stats = (frame_id * H + head) * M + rows

    query = _load(q_ptr, start, stride_qn, M, BLOCK_M, D)
    grad = _load(grad_ptr, start, stride_gn, M, BLOCK_M, D)
    out = _load(out_ptr, start, H * D, M, BLOCK_M, D)
    lse = tl.load(lse_ptr + stats, mask=rows < M, other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta_ptr + stats, delta, mask=rows < M)
    dquery = tl.zeros((BLOCK_M, D), tl.float32)
    for first in tl.range(0, N // BLOCK_N * BLOCK_N, BLOCK_N, disable_licm=True):
        if RELOAD:  # operands of float32 products, kept in registers across steps, would spill
            query = _load(q_ptr, start, stride_qn, M, BLOCK_M, D)
            grad = _load(grad_ptr, start, stride_gn, M, BLOCK_M, D)
        key = _load(kv_ptr, first, stride_kn, N, BLOCK_N, D, False)
        value = _load(kv_ptr + stride_kv, first, stride_kn, N, BLOCK_N, D, False)
        s = _scores(query, key, first, N, BLOCK_N, False)
        ds = tl.exp2(s * scale_log2 - lse[:, None]) * (_dot(grad, tl.trans(value)) - delta[:, None])
        dquery += _dot(ds.to(query.dtype), key)
    if TAIL:
        rest: tl.constexpr = N // BLOCK_N * BLOCK_N
        key = _load(kv_ptr, rest, stride_kn, N, TAIL, D)
        value = _load(kv_ptr + stride_kv, rest, stride_kn, N, TAIL, D)
        s = _scores(query, key, rest, N, TAIL, True)
        ds = tl.exp2(s * scale_log2 - lse[:, None]) * (_dot(grad, tl.trans(value)) - delta[:, None])
        dquery += _dot(ds.to(query.dtype), key)
    _store(dq_ptr, start, stride_dqn, dquery * scale, M, BLOCK_M, D)


@triton.jit(do_not_specialize=["T"])
def _backward_key_value_kernel(
    q_ptr, kv_ptr, lse_ptr, delta_ptr, grad_ptr, dkv_ptr,
    stride_qb, stride_qt, stride_qn, stride_qh,
    stride_kb, stride_kt, stride_kn, stride_kh, stride_kv,
    stride_gb, stride_gt, stride_gn, stride_gh,
    stride_dkb, stride_dkt, stride_dkn, stride_dkh, stride_dkv,
    T, scale, scale_log2,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HEAD_OFFSETS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    H: tl.constexpr = len(HEAD_OFFSETS)
    TILES: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    KEY_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    frame_id = (tl.program_id(0) // (H * KEY_TILES)).to(tl.int64)
    head = tl.program_id(0) // KEY_TILES % H
    first = tl.program_id(0) % KEY_TILES * BLOCK_N
    batch = frame_id // T
    source = frame_id % T
    kv_ptr += batch * stride_kb + source * stride_kt + head * stride_kh
    dkv_ptr += batch * stride_dkb + source * stride_dkt + head * stride_dkh
    q_ptr += batch * stride_qb + head * stride_qh
    grad_ptr += batch * stride_gb + head * stride_gh
    stats = (batch * T * H + head) * M

    key = _load(kv_ptr, first, stride_kn, N, BLOCK_N, D)
    value = _load(kv_ptr + stride_kv, first, stride_kn, N, BLOCK_N, D)
    dkey = tl.zeros((BLOCK_N, D), tl.float32)
    dvalue = tl.zeros((BLOCK_N, D), tl.float32)
    reader, num_readers = _readers(source, head, T, HEAD_OFFSETS)
    for step in tl.range(0, num_readers * TILES, disable_licm=True):
        frame = tl.where(step < TILES, reader, source)
        start = step % TILES * BLOCK_M
        rows = start + tl.arange(0, BLOCK_M)
        query = _load(q_ptr + frame * stride_qt, start, stride_qn, M, BLOCK_M, D)
        grad = _load(grad_ptr + frame * stride_gt, start, stride_gn, M, BLOCK_M, D)
        lse = tl.load(lse_ptr + stats + frame * (M * H) + rows, mask=rows < M, other=float("inf"))
        delta = tl.load(delta_ptr + stats + frame * (M * H) + rows, mask=rows < M, other=0.0)
        p = tl.exp2(_dot(key, tl.trans(query)) * scale_log2 - lse[None, :])  # [BLOCK_N, BLOCK_M]
        ds = p * (_dot(value, tl.trans(grad)) - delta[None, :])
        dvalue += _dot(p.to(query.dtype), grad)
        dkey += _dot(ds.to(query.dtype), query)
    _store(dkv_ptr, first, stride_dkn, dkey * scale, N, BLOCK_N, D)
    _store(dkv_ptr + stride_dkv, first, stride_dkn, dvalue, N, BLOCK_N, D)
