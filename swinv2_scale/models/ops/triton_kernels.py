"""The kernels behind triton_attention.py, in Triton's language (mypy can't read that: no type hints here).

Letters: B images, L tokens of one map, N heads, D head_dim, T tiles of one shape, n tokens of a tile.

    i, j      a query's and a key's place in its tile, 0 .. n-1
    position  a place in ``Tiling.order``: a tile's n tokens are n consecutive positions, from ``first`` on. What is
              kept for each token and head (rq, rk, lse, delta: (B, N, L)) lies by position, q, k, v and out by token.
    logit     scale * q.k / (|q| |k|) + table[code_i - code_j + centre]. ``code`` is one int32 for each token of a tile,
              its coordinates times the table's strides: any number of axes, no division in a loop.

Raw q and k are what is multiplied, so that no operand is rounded; ``rq`` and ``rk``, 1/|q| and 1/|k|, go onto the
float32 product. Everything is in base 2: ``table`` comes multiplied by log2(e), ``lse`` is a log2. No atomics: every
number is written by one program, in an order of its sums that the launch alone decides.

Sizes are arguments that Triton compiles nothing for; a kernel is compiled for a head_dim, a type, its blocks, and
``full``: whether blocks divide the tile. ``width`` is D padded to a power of two, ``row`` the distance of two tokens.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl

#: Triton's interpreter, for tests: its dot takes bfloat16 for integers and its casts to bfloat16 cut off (3.9.0,
#: runtime/interpreter.py create_dot and _convert_float), so here it multiplies float32 and is handed rounded numbers.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
#: A table's entries as a plain load would go through shared memory, 58 KB instead of 25 a program (seen in SASS).
LOADS_BIAS_BY_ASM = tl.constexpr(torch.version.hip is None and not INTERPRETED.value)
LOG2E = tl.constexpr(1.4426950408889634)
#: Vectors that are shorter count as zero: the product of two would fall out of float32's normal numbers.
SHORTEST = tl.constexpr(2.0**-62)

SIZES = ("length", "heads", "tokens", "num_tiles", "start", "centre", "entries")
CLASSES = ("first_head", "num_heads", "rows_apart", "columns_apart", "first_class", "num_classes")


@triton.jit
def place(length, heads, tokens, num_tiles, start, block: tl.constexpr):
    """A program's block of its tile, head, image, the tile's first position, its place in what lies by position."""
    program = tl.program_id(0)
    num_blocks = tl.cdiv(tokens, block)
    head = (program // num_blocks) % heads
    tile = program // num_blocks // heads
    image = (tile // num_tiles).to(tl.int64)
    first = start + tile % num_tiles * tokens
    return program % num_blocks, head, image, first, (image * heads + head) * length + first


@triton.jit
def vector(at, is_valid, other: tl.constexpr, full: tl.constexpr):
    if full:
        return tl.load(at)
    return tl.load(at, mask=is_valid, other=other)


@triton.jit
def rows(base, token, row, is_valid, dim: tl.constexpr, width: tl.constexpr, full: tl.constexpr):
    """(tokens, width): zeros beyond dim, and in rows that are not valid."""
    d = tl.arange(0, width)
    at = base + token[:, None] * row + d[None, :]
    if width == dim:
        if full:
            return tl.load(at)
        return tl.load(at, mask=is_valid[:, None], other=0.0)
    return tl.load(at, mask=is_valid[:, None] & (d < dim)[None, :], other=0.0)


@triton.jit
def store_rows(base, token, row, value, is_valid, dim: tl.constexpr, width: tl.constexpr):
    d = tl.arange(0, width)
    at = base + token[:, None] * row + d[None, :]
    tl.store(at, narrow(value, base.dtype.element_ty), mask=is_valid[:, None] & (d < dim)[None, :])


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Round float32 to the nearest number of a type, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc):
    """a @ b (+ acc), float32 sums of unrounded products."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def entries_at(base, at):
    """base[at] for int32 at >= 0."""
    if LOADS_BIAS_BY_ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .u64 a; mul.wide.u32 a, $2, 4; add.u64 a, a, $1; ld.global.nc.f32 $0, [a]; }",
            "=f,l,r",
            [base.to(tl.int64), at],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return tl.load(base + at)


@triton.jit(do_not_specialize=["length", "heads"])
def inverse_norms(qkv, order, rq, rk, length, heads, dim: tl.constexpr, width: tl.constexpr, block: tl.constexpr):
    """rq, rk (B, N, L) float32 = 1/|q|, 1/|k|; 0 for a zero vector. Grid (blocks of positions, N, B)."""
    head = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    position = tl.program_id(0) * block + tl.arange(0, block)
    is_valid = position < length
    token = tl.load(order + position, mask=is_valid, other=0).to(tl.int32)
    base = qkv + image * length * (3 * heads * dim) + head * dim
    for which in tl.static_range(2):
        x = rows(base + which * (heads * dim), token, 3 * heads * dim, is_valid, dim, width, False).to(tl.float32)
        # By the largest entry first: squares of small numbers underflow, of large ones overflow.
        largest = tl.max(tl.abs(x), 1)
        x = x / tl.where(largest > 0, largest, 1.0)[:, None]
        norm = largest * tl.sqrt(tl.sum(x * x, 1))
        to = rq if which == 0 else rk
        inverse = tl.where(norm > SHORTEST, 1.0 / tl.where(norm > SHORTEST, norm, 1.0), 0.0)
        tl.store(to + (image * heads + head) * length + position, inverse, mask=is_valid)


@triton.jit(do_not_specialize=SIZES)
def forward(
    qkv, order, code, rq, rk, scale, table, out, lse,
    length, heads, tokens, num_tiles, start, centre, entries,
    dim: tl.constexpr, width: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, full: tl.constexpr,
):  # fmt: skip
    """out (B, L, N, D) and lse (B, N, L) of a block of queries against all keys of its tile, with a running maximum."""
    block, head, image, first, at = place(length, heads, tokens, num_tiles, start, block_m)
    row = 3 * heads * dim
    qkv += image * length * row + head * dim
    table += head * entries
    i = block * block_m + tl.arange(0, block_m)
    is_query = i < tokens
    token_i = vector(order + first + i, is_query, 0, full).to(tl.int32)
    q = rows(qkv, token_i, row, is_query, dim, width, full)
    rq_i = vector(rq + at + i, is_query, 0.0, full) * (tl.load(scale + head) * LOG2E)
    code_i = vector(code + i, is_query, 0, full) + centre
    largest = tl.full([block_m], float("-inf"), tl.float32)
    total = tl.zeros([block_m], tl.float32)
    mean = tl.zeros([block_m, width], tl.float32)
    for j0 in range(0, tokens, block_n):
        j = j0 + tl.arange(0, block_n)
        is_key = j < tokens
        token_j = vector(order + first + j, is_key, 0, full).to(tl.int32)
        k = rows(qkv + heads * dim, token_j, row, is_key, dim, width, full)
        v = rows(qkv + 2 * heads * dim, token_j, row, is_key, dim, width, full)
        rk_j = vector(rk + at + j, is_key, 0.0, full)
        bias = entries_at(table, code_i[:, None] - vector(code + j, is_key, 0, full)[None, :])
        logit = dot(q, tl.trans(k), None) * rq_i[:, None] * rk_j[None, :] + bias
        if not full:
            logit = tl.where(is_key[None, :], logit, float("-inf"))
        larger = tl.maximum(largest, tl.max(logit, 1))
        p = tl.exp2(logit - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(p, 1)
        mean = dot(narrow(p, v.dtype), v, mean * shrink[:, None])
        largest = larger
    store_rows(
        out + (image * length * heads + head) * dim, token_i, heads * dim, mean / total[:, None], is_query, dim, width
    )
    tl.store(lse + at + i, largest + tl.log2(total), mask=is_query)


@triton.jit(do_not_specialize=SIZES)
def query_gradient(
    qkv, order, code, rq, rk, scale, table, out, dout, lse, delta, dqkv,
    length, heads, tokens, num_tiles, start, centre, entries,
    dim: tl.constexpr, width: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, full: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries, and delta (B, N, L) = rowsum(P * dP) for the kernels that follow.

    delta is first taken as out . dout, where ``out`` has been rounded. Rows of dS = P * (dP - delta) sum to zero, so
    what they do sum to is delta's error; left in, it makes the scale's gradient 6 % wrong (docs/numerics.md).
    """
    block, head, image, first, at = place(length, heads, tokens, num_tiles, start, block_m)
    row = 3 * heads * dim
    qkv += image * length * row + head * dim
    table += head * entries
    of_out = (image * length * heads + head) * dim
    i = block * block_m + tl.arange(0, block_m)
    is_query = i < tokens
    token_i = vector(order + first + i, is_query, 0, full).to(tl.int32)
    q = rows(qkv, token_i, row, is_query, dim, width, full)
    do = rows(dout + of_out, token_i, heads * dim, is_query, dim, width, full)
    y = rows(out + of_out, token_i, heads * dim, is_query, dim, width, full)
    delta_i = tl.sum(y.to(tl.float32) * do.to(tl.float32), 1)
    scale_h = tl.load(scale + head)
    rq_i = vector(rq + at + i, is_query, 0.0, full)
    rq_log = rq_i * (scale_h * LOG2E)
    lse_i = vector(lse + at + i, is_query, float("inf"), full)  # exp2(-inf) = 0: rows beyond the tile add nothing
    code_i = vector(code + i, is_query, 0, full) + centre
    lost = tl.zeros([block_m], tl.float32)
    dq = tl.zeros([block_m, width], tl.float32)
    for j0 in range(0, tokens, block_n):
        j = j0 + tl.arange(0, block_n)
        is_key = j < tokens
        token_j = vector(order + first + j, is_key, 0, full).to(tl.int32)
        k = rows(qkv + heads * dim, token_j, row, is_key, dim, width, full)
        v = rows(qkv + 2 * heads * dim, token_j, row, is_key, dim, width, full)
        rk_j = vector(rk + at + j, is_key, 0.0, full)
        bias = entries_at(table, code_i[:, None] - vector(code + j, is_key, 0, full)[None, :])
        p = tl.exp2(dot(q, tl.trans(k), None) * rq_log[:, None] * rk_j[None, :] + (bias - lse_i[:, None]))
        if not full:
            p = tl.where(is_key[None, :], p, 0.0)
        ds = p * (dot(do, tl.trans(v), None) - delta_i[:, None])
        lost += tl.sum(ds, 1)
        dq = dot(narrow(ds * rk_j[None, :], k.dtype), k, dq)
    unit = q.to(tl.float32) * rq_i[:, None]
    dq = (dq - unit * tl.sum(unit * dq, 1)[:, None]) * (rq_i * scale_h)[:, None]
    store_rows(dqkv + image * length * row + head * dim, token_i, row, dq, is_query, dim, width)
    tl.store(delta + at + i, delta_i + lost, mask=is_query)


@triton.jit(do_not_specialize=SIZES)
def key_gradient(
    qkv, order, code, rq, rk, scale, table, dout, lse, delta, dqkv,
    length, heads, tokens, num_tiles, start, centre, entries,
    dim: tl.constexpr, width: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, full: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys; scores are held transposed, (keys, queries)."""
    block, head, image, first, at = place(length, heads, tokens, num_tiles, start, block_n)
    row = 3 * heads * dim
    qkv += image * length * row + head * dim
    dout += (image * length * heads + head) * dim
    table += head * entries
    j = block * block_n + tl.arange(0, block_n)
    is_key = j < tokens
    token_j = vector(order + first + j, is_key, 0, full).to(tl.int32)
    k = rows(qkv + heads * dim, token_j, row, is_key, dim, width, full)
    v = rows(qkv + 2 * heads * dim, token_j, row, is_key, dim, width, full)
    rk_j = vector(rk + at + j, is_key, 0.0, full)
    rk_log = rk_j * LOG2E
    code_j = vector(code + j, is_key, 0, full) - centre
    scale_h = tl.load(scale + head)
    dk = tl.zeros([block_n, width], tl.float32)
    dv = tl.zeros([block_n, width], tl.float32)
    for i0 in range(0, tokens, block_m):
        i = i0 + tl.arange(0, block_m)
        is_query = i < tokens
        token_i = vector(order + first + i, is_query, 0, full).to(tl.int32)
        q = rows(qkv, token_i, row, is_query, dim, width, full)
        do = rows(dout, token_i, heads * dim, is_query, dim, width, full)
        rq_i = vector(rq + at + i, is_query, 0.0, full) * scale_h
        lse_i = vector(lse + at + i, is_query, float("inf"), full)
        delta_i = vector(delta + at + i, is_query, 0.0, full)
        bias = entries_at(table, vector(code + i, is_query, 0, full)[None, :] - code_j[:, None])
        p = tl.exp2(dot(k, tl.trans(q), None) * rk_log[:, None] * rq_i[None, :] + (bias - lse_i[None, :]))
        if not full:
            p = tl.where(is_key[:, None], p, 0.0)
        dv = dot(narrow(p, do.dtype), do, dv)
        ds = p * (dot(v, tl.trans(do), None) - delta_i[None, :])
        dk = dot(narrow(ds * rq_i[None, :], q.dtype), q, dk)
    unit = k.to(tl.float32) * rk_j[:, None]
    dk = (dk - unit * tl.sum(unit * dk, 1)[:, None]) * rk_j[:, None]
    dqkv += image * length * row + head * dim
    store_rows(dqkv + heads * dim, token_j, row, dk, is_key, dim, width)
    store_rows(dqkv + 2 * heads * dim, token_j, row, dv, is_key, dim, width)


@triton.jit(do_not_specialize=(*SIZES, "num_images", "share", *CLASSES))
def table_blocks(
    qkv, order, code, rq, rk, scale, table, dout, lse, delta, blocks, shares,
    length, heads, tokens, num_tiles, start, centre, entries,
    num_images, share, first_head, num_heads, rows_apart, columns_apart, first_class, num_classes,
    dim: tl.constexpr, width: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, full: tl.constexpr,
):  # fmt: skip
    """blocks (parts, num_heads, num_classes, block_m, block_n): dS, summed over a class of blocks and a part of tiles.

    And shares (parts, num_heads, num_classes): dS * cos, summed likewise and over the block, for the scale.

    Shifting i and j by a common multiple of block_m, block_n and the tokens of one slab (a step along the tile's first
    axis) keeps i - j and moves whole slabs: the table's entries stay the same. So block pairs (r, c) and
    (r + rows_apart, c + columns_apart) are of one class. One program walks through one class, in one head and ``share``
    tiles, with the block of biases and the block of sums in registers.
    """
    program = tl.program_id(0)
    number = first_class + program % num_classes
    head_here = (program // num_classes) % num_heads
    part = program // num_classes // num_heads
    head = first_head + head_here
    num_rows = tl.cdiv(tokens, block_m)
    num_columns = tl.cdiv(tokens, block_n)
    # Classes 0 .. top-1 start in the first rows, at any column; the others further down, in the first columns.
    top = rows_apart * num_columns
    r = tl.where(number < top, number // num_columns, rows_apart + (number - top) // columns_apart)
    c = tl.where(number < top, number % num_columns, (number - top) % columns_apart)
    num_shifts = tl.minimum((num_rows - 1 - r) // rows_apart, (num_columns - 1 - c) // columns_apart) + 1
    scale_log = tl.load(scale + head) * LOG2E
    # Of the first block; where it hangs over the tile's end there is no second one.
    code_i = tl.load(code + tl.minimum(r * block_m + tl.arange(0, block_m), tokens - 1))
    code_j = tl.load(code + tl.minimum(c * block_n + tl.arange(0, block_n), tokens - 1))
    bias = tl.load(table + head * entries + ((code_i + centre)[:, None] - code_j[None, :]))
    total = tl.zeros([block_m, block_n], tl.float32)
    along = tl.zeros([block_m], tl.float32)
    row = 3 * heads * dim
    tile = part * share
    image = tile // num_tiles
    tile = tile % num_tiles
    shift = 0
    for _ in range(tl.minimum(share, num_images * num_tiles - part * share) * num_shifts):
        b = image.to(tl.int64)
        first = start + tile * tokens
        at = (b * heads + head) * length + first
        base = qkv + b * length * row + head * dim
        i = (r + shift * rows_apart) * block_m + tl.arange(0, block_m)
        j = (c + shift * columns_apart) * block_n + tl.arange(0, block_n)
        is_query = i < tokens
        is_key = j < tokens
        token_i = vector(order + first + i, is_query, 0, full).to(tl.int32)
        token_j = vector(order + first + j, is_key, 0, full).to(tl.int32)
        q = rows(base, token_i, row, is_query, dim, width, full)
        k = rows(base + heads * dim, token_j, row, is_key, dim, width, full)
        v = rows(base + 2 * heads * dim, token_j, row, is_key, dim, width, full)
        do = rows(dout + (b * length * heads + head) * dim, token_i, heads * dim, is_query, dim, width, full)
        rq_i = vector(rq + at + i, is_query, 0.0, full)
        rk_j = vector(rk + at + j, is_key, 0.0, full)
        lse_i = vector(lse + at + i, is_query, float("inf"), full)
        delta_i = vector(delta + at + i, is_query, 0.0, full)
        cosine = dot(q, tl.trans(k), None) * rq_i[:, None] * rk_j[None, :]
        p = tl.exp2(cosine * scale_log + bias - lse_i[:, None])
        if not full:
            p = tl.where(is_key[None, :], p, 0.0)
        ds = p * (dot(do, tl.trans(v), None) - delta_i[:, None])
        total += ds
        along += tl.sum(ds * cosine, 1)
        # The next shift, tile, image, without divisions.
        shift += 1
        is_over = (shift == num_shifts).to(tl.int32)
        shift *= 1 - is_over
        tile += is_over
        is_over = (tile == num_tiles).to(tl.int32)
        tile *= 1 - is_over
        image += is_over
    tl.store(shares + program, tl.sum(along, 0))
    to = blocks + program.to(tl.int64) * (block_m * block_n)
    tl.store(to + tl.arange(0, block_m)[:, None] * block_n + tl.arange(0, block_n)[None, :], total)


@triton.jit(do_not_specialize=(*SIZES, *CLASSES, "slabs", "height", "breadth", "stride0", "stride1", "num_parts"))
def table_sum(
    blocks, dtable,
    tokens, slabs, height, breadth, entries, stride0, stride1, centre,
    num_parts, first_head, num_heads, rows_apart, columns_apart, first_class, num_classes,
    block_m: tl.constexpr, block_n: tl.constexpr, block_x: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    """dtable (N, entries) += the sum of ``blocks`` over all pairs of tokens of one offset, in a fixed order.

    Of a tile's shape (slabs, height, breadth), the last two 1 where it has fewer axes. Grid: (blocks of offsets inside
    a slab, offsets along the first axis, num_heads).
    """
    plane = height * breadth
    d0 = tl.program_id(1) - (slabs - 1)
    head_here = tl.program_id(2)
    c = tl.program_id(0) * block_c + tl.arange(0, block_c)
    is_offset = c < (2 * height - 1) * (2 * breadth - 1)
    d1 = c // (2 * breadth - 1) - (height - 1)
    d2 = c % (2 * breadth - 1) - (breadth - 1)
    num_columns = tl.cdiv(tokens, block_n)
    top = rows_apart * num_columns
    depth = tl.minimum(rows_apart * block_m // plane, slabs - tl.abs(d0))  # later slabs are shifts of these
    total = tl.zeros([block_c], tl.float32)
    for part in range(num_parts):
        base = blocks + (part * num_heads + head_here).to(tl.int64) * num_classes * (block_m * block_n)
        for slab in range(depth):
            for x0 in range(0, plane, block_x):
                x = x0 + tl.arange(0, block_x)
                y1 = (x // breadth)[:, None] - d1[None, :]
                y2 = (x % breadth)[:, None] - d2[None, :]
                i = (slab + tl.maximum(d0, 0)) * plane + x
                j = (slab + tl.maximum(-d0, 0)) * plane + y1 * breadth + y2
                is_pair = (y1 >= 0) & (y1 < height) & (y2 >= 0) & (y2 < breadth)
                is_pair = is_pair & is_offset[None, :] & (x < plane)[:, None]
                r = (i // block_m)[:, None]
                k = j // block_n
                number = tl.where(r < rows_apart, r * num_columns + k, top + (r - rows_apart) * columns_apart + k)
                number -= first_class
                is_pair = is_pair & (number >= 0) & (number < num_classes)
                at = number * (block_m * block_n) + (i % block_m)[:, None] * block_n + j % block_n
                total += tl.sum(tl.load(base + at, mask=is_pair, other=0.0), 0)
    to = dtable + (first_head + head_here) * entries + centre + d0 * stride0 + d1 * stride1 + d2
    tl.store(to, tl.load(to, mask=is_offset, other=0.0) + total, mask=is_offset)
