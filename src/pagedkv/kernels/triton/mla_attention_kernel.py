"""Latent attention of one tile of rows over one chunk of keys.

Rows are tokens x heads of one sequence, so that all heads read a latent once. A block of latents is loaded once and
serves as keys and as values, of which one is transposed. What is not finite gets into no row that does not see it:
where all rows of a tile see the same keys, what they do not see is never loaded; elsewhere a tile that comes out with
something that is not finite is computed once more with care. Of the rows that see a latent with an infinite element,
each weighs it as NaN or, where that makes its logit -inf, as 0: in this column the result is NaN either way.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .language import LOG2E

__all__: list[str] = []


@triton.jit(do_not_specialize=["num_tokens"])
def attend_latents(
    Q_latent,
    Q_rope,
    Latent_pages,
    Rope_pages,
    Query_indptr,
    Page_indptr,
    Page_indices,
    Seq_lens,
    Mask,
    Mask_indptr,
    Items,
    Out,
    Lse,
    Sums,
    Stats,
    sm_scale: tl.float32,
    window_left,
    num_tokens,
    num_heads,
    stride_q_latent_token,
    stride_q_latent_head,
    stride_q_rope_token,
    stride_q_rope_head,
    stride_latent_page,
    stride_latent_token,
    stride_rope_page,
    stride_rope_token,
    PAGE_SIZE: tl.constexpr,
    LATENT_DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    ONE_TOKEN: tl.constexpr,
    EDGES_APART: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
    WITH_CARE: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
    TILES_PER_ITEM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_LATENT: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
    CARE_KEYS: tl.constexpr,
    CARE_COLUMNS: tl.constexpr,
):
    """A program computes BLOCK_ROWS rows of one item, which has TILES_PER_ITEM times as many.

    ONE_TOKEN: the rows of a tile are heads of one token. EDGES_APART: of such, without a mask: logits are masked in the
    blocks alone that need it. KEYS_FIRST: latents are loaded as [keys, columns] and transposed for the logits, else the
    other way round. WITH_CARE: computed so from the start, and BLOCK_VALUES columns of the result by a program;
    without, BLOCK_VALUES is BLOCK_LATENT, all columns. IN_FLOAT32: products of float32; without, query, pages and
    result share a dtype of 16 bits.
    """
    num_parts: tl.constexpr = (LATENT_DIM + BLOCK_VALUES - 1) // BLOCK_VALUES
    program = tl.program_id(0)
    first_column = program % num_parts * BLOCK_VALUES
    program = program // num_parts
    item = Items + (program // TILES_PER_ITEM).to(tl.int64) * 5
    seq = tl.load(item)
    if seq < 0:
        return
    skipped_rows = program % TILES_PER_ITEM * BLOCK_ROWS
    first_row = tl.load(item + 1) + skipped_rows
    start, stop = tl.load(item + 2), tl.load(item + 3)
    first_token = tl.load(Query_indptr + seq)
    q_len = tl.load(Query_indptr + seq + 1) - first_token
    # In fixed-address buffers there may be a newer, larger batch than the one whose rows were given.
    num_rows = tl.minimum(q_len, num_tokens - first_token) * num_heads
    if first_row >= num_rows:
        return
    kv_len = tl.load(Seq_lens + seq)
    pages = Page_indices + tl.load(Page_indptr + seq)

    row = first_row + tl.arange(0, BLOCK_ROWS)
    row_exists = row < num_rows
    head = (row % num_heads).to(tl.int64)
    q_latent_at = (first_token + row // num_heads).to(tl.int64) * stride_q_latent_token + head * stride_q_latent_head
    q_rope_at = (first_token + row // num_heads).to(tl.int64) * stride_q_rope_token + head * stride_q_rope_head

    # A row sees the keys from first_seen up to last_seen, and of these those in its row of the mask.
    token = row // num_heads
    if ONE_TOKEN:
        token = first_row // num_heads
    last_seen = kv_len - q_len + token
    if ONE_TOKEN and CAUSAL:
        stop = tl.minimum(stop, last_seen + 1)
    first_seen = last_seen.to(tl.int64) - window_left
    mask_row = token
    if Mask is not None:
        mask_row = Mask + tl.load(Mask_indptr + seq) + token.to(tl.int64) * kv_len

    highest = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    weight_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
    total = tl.zeros((BLOCK_ROWS, BLOCK_VALUES), tl.float32)
    needs_care = True
    if not WITH_CARE:
        key = tl.arange(0, BLOCK_KEYS)
        column = tl.arange(0, BLOCK_LATENT)
        rope_column = tl.arange(0, BLOCK_ROPE)
        q_latent = _rows(Q_latent, q_latent_at, row_exists, column, LATENT_DIM)
        if ROPE_DIM:
            q_rope = _rows(Q_rope, q_rope_at, row_exists, rope_column, ROPE_DIM)
        for block_start in tl.range(start, stop, BLOCK_KEYS):
            at_key = block_start + key
            is_held = at_key < stop
            if ONE_TOKEN:
                is_held = _seen(at_key, is_held, first_seen, last_seen, Mask, mask_row, False, HAS_WINDOW)
            page, offset = _slots(pages, block_start, at_key, is_held, PAGE_SIZE, BLOCK_KEYS)
            latent_at = page * stride_latent_page + offset * stride_latent_token
            if KEYS_FIRST:
                values = _rows(Latent_pages, latent_at, is_held, column, LATENT_DIM)
                latent = tl.trans(values)
            else:
                latent = _columns_first(Latent_pages, latent_at, is_held, column, LATENT_DIM, BLOCK_LATENT)
                values = tl.trans(latent)
            logits = tl.dot(q_latent, latent, input_precision="ieee")
            if ROPE_DIM:
                rope_at = page * stride_rope_page + offset * stride_rope_token
                rope = _columns_first(Rope_pages, rope_at, is_held, rope_column, ROPE_DIM, BLOCK_ROPE)
            if EDGES_APART:
                # Of a product that leads to another one, Triton has a warp compute all keys of its rows: with 64 rows
                # and 8 warps each is computed twice. It does not follow a result through a branch taken at run time,
                # nor a sum of two results that are scaled before.
                logits *= sm_scale
                if ROPE_DIM:
                    logits = tl.fma(tl.dot(q_rope, rope, input_precision="ieee"), sm_scale, logits)
                is_edge = block_start + BLOCK_KEYS > stop
                if HAS_WINDOW:
                    is_edge |= block_start < first_seen
                if is_edge:
                    logits = tl.where(is_held[None, :], logits, float("-inf"))
            else:
                if ROPE_DIM:
                    logits = tl.dot(q_rope, rope, logits, input_precision="ieee")
                is_seen = is_held[None, :]
                if not ONE_TOKEN:
                    is_seen = _seen(
                        at_key[None, :],
                        is_seen,
                        first_seen[:, None],
                        last_seen[:, None],
                        Mask,
                        mask_row[:, None],
                        CAUSAL,
                        HAS_WINDOW,
                    )
                logits = tl.where(is_seen, logits * sm_scale, float("-inf"))
            weights, rescale, highest = _weights(logits, highest)
            weight_sum = weight_sum * rescale + tl.sum(weights, 1)
            total = tl.dot(weights.to(values.dtype), values, total * rescale[:, None], input_precision="ieee")
        needs_care = False
        if not ONE_TOKEN:
            # Something not finite: it may have come from keys that a row does not see, as a product with 0.
            needs_care = tl.max(tl.max((tl.abs(total) < float("inf")).to(tl.int32) ^ 1, 1), 0) > 0

    if needs_care:
        few_keys = tl.arange(0, CARE_KEYS)
        some_columns = tl.arange(0, CARE_COLUMNS)
        value_column = first_column + tl.arange(0, BLOCK_VALUES)
        # The rows one by one, also where they are heads of one token.
        each_last = kv_len - q_len + row // num_heads
        each_first = each_last.to(tl.int64) - window_left
        each_mask = row
        if Mask is not None:
            each_mask = Mask + tl.load(Mask_indptr + seq) + (row // num_heads).to(tl.int64) * kv_len
        highest = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
        weight_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
        total = tl.zeros((BLOCK_ROWS, BLOCK_VALUES), tl.float32)
        num_infinite = tl.zeros((CARE_KEYS,), tl.int32)
        for block_start in tl.range(start, stop, CARE_KEYS, num_stages=1):
            at_key = block_start + few_keys
            is_held = at_key < stop
            page, offset = _slots(pages, block_start, at_key, is_held, PAGE_SIZE, CARE_KEYS)
            latent_at = page * stride_latent_page + offset * stride_latent_token
            logits = tl.zeros((BLOCK_ROWS, CARE_KEYS), tl.float32)
            for first in tl.range(0, LATENT_DIM, CARE_COLUMNS, num_stages=1):
                a = _rows(Q_latent, q_latent_at, row_exists, first + some_columns, LATENT_DIM)
                b = _columns_first(Latent_pages, latent_at, is_held, first + some_columns, LATENT_DIM, CARE_COLUMNS)
                logits = _product(a, b, logits, IN_FLOAT32)
            if ROPE_DIM:
                rope_at = page * stride_rope_page + offset * stride_rope_token
                for first in tl.range(0, ROPE_DIM, CARE_COLUMNS, num_stages=1):
                    a = _rows(Q_rope, q_rope_at, row_exists, first + some_columns, ROPE_DIM)
                    b = _columns_first(Rope_pages, rope_at, is_held, first + some_columns, ROPE_DIM, CARE_COLUMNS)
                    logits = _product(a, b, logits, IN_FLOAT32)
            is_seen = _seen(
                at_key[None, :],
                is_held[None, :],
                each_first[:, None],
                each_last[:, None],
                Mask,
                each_mask[:, None],
                CAUSAL,
                HAS_WINDOW,
            )
            logits = tl.where(is_seen, logits * sm_scale, float("-inf"))
            weights, rescale, highest = _weights(logits, highest)
            weight_sum = weight_sum * rescale + tl.sum(weights, 1)
            values = _rows(Latent_pages, latent_at, is_held, value_column, LATENT_DIM)
            # 0 * NaN must not get into the rows that do not see it.
            is_finite = tl.abs(values.to(tl.float32)) < float("inf")
            num_infinite += tl.sum(is_finite.to(tl.int32) ^ 1, 1)
            values = tl.where(is_finite, values, 0.0).to(values.dtype)
            if not IN_FLOAT32:
                weights = weights.to(values.dtype)
            total = _product(weights, values, total * rescale[:, None], IN_FLOAT32)
        if tl.max(num_infinite, 0) > 0:
            for block_start in tl.range(start, stop, CARE_KEYS, num_stages=1):
                at_key = block_start + few_keys
                is_held = at_key < stop
                page, offset = _slots(pages, block_start, at_key, is_held, PAGE_SIZE, CARE_KEYS)
                latent_at = page * stride_latent_page + offset * stride_latent_token
                values = _rows(Latent_pages, latent_at, is_held, value_column, LATENT_DIM)
                is_infinite = tl.where(tl.abs(values.to(tl.float32)) < float("inf"), 0.0, 1.0).to(tl.bfloat16)
                is_seen = _seen(
                    at_key[None, :],
                    is_held[None, :],
                    each_first[:, None],
                    each_last[:, None],
                    Mask,
                    each_mask[:, None],
                    CAUSAL,
                    HAS_WINDOW,
                )
                marks = tl.dot(tl.where(is_seen, 1.0, 0.0).to(tl.bfloat16), is_infinite, input_precision="ieee")
                total = tl.where(marks > 0, float("nan"), total)

    # The rows of a tile are neighbours in out and in partials: nothing but their first one was kept through the loop,
    # which needs the registers.
    row = tl.arange(0, BLOCK_ROWS)
    column = first_column + tl.arange(0, BLOCK_VALUES)
    row_exists = row < (BLOCK_ROWS if ONE_TOKEN else num_rows - first_row)
    is_stored = row_exists[:, None] & (column < LATENT_DIM)[None, :]
    has_stats = row_exists & (first_column == 0)
    is_final = True
    if Sums is not None:
        partial_row = tl.load(Items + (program // TILES_PER_ITEM).to(tl.int64) * 5 + 4)
        is_final = partial_row < 0
        if partial_row >= 0:
            first = (partial_row + skipped_rows).to(tl.int64)
            Sums += first * LATENT_DIM
            Stats += first * 2
            tl.store(Sums + (row * LATENT_DIM)[:, None] + column[None, :], total, mask=is_stored)
            tl.store(Stats + row * 2, highest, mask=has_stats)
            tl.store(Stats + row * 2 + 1, weight_sum, mask=has_stats)
    if is_final:
        first = first_token.to(tl.int64) * num_heads + first_row
        Out += first * LATENT_DIM
        # Not `weight_sum > 0`: a NaN must show.
        is_empty = weight_sum == 0
        weight_sum = tl.where(is_empty, 1.0, weight_sum)
        result = (total * tl.math.div_rn(1.0, weight_sum)[:, None]).to(Out.dtype.element_ty)
        tl.store(Out + (row * LATENT_DIM)[:, None] + column[None, :], result, mask=is_stored)
        if Lse is not None:
            lse = tl.where(is_empty, float("-inf"), highest + tl.log(weight_sum))
            tl.store(Lse + first + row, lse, mask=has_stats)


@triton.jit
def _slots(pages, block_start, at_key, is_held, PAGE_SIZE: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """Page and offset of each key of a block, which starts at a multiple of BLOCK_KEYS."""
    if PAGE_SIZE % BLOCK_KEYS == 0:
        # One page for all: its id is read once, and its tokens are neighbours.
        page = tl.load(pages + block_start // PAGE_SIZE).to(tl.int64)
        offset = block_start % PAGE_SIZE + (at_key - block_start)
    else:
        page = tl.load(pages + at_key // PAGE_SIZE, mask=is_held, other=0).to(tl.int64)
        offset = at_key % PAGE_SIZE
    return page, offset.to(tl.int64)


@triton.jit
def _rows(Rows, at, exists, column, DIM: tl.constexpr):
    """[rows, columns]: the rows at the elements `at`; zeros for those that do not exist and beyond DIM."""
    return tl.load(Rows + at[:, None] + column[None, :], mask=exists[:, None] & (column < DIM)[None, :], other=0.0)


@triton.jit
def _columns_first(Rows, at, exists, column, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """[columns, rows]: the same, transposed; BLOCK columns, of which the first is a multiple of BLOCK."""
    is_read = exists[None, :]
    if DIM % BLOCK != 0:
        is_read &= (column < DIM)[:, None]
    return tl.load(Rows + at[None, :] + column[:, None], mask=is_read, other=0.0)


@triton.jit
def _seen(key, is_held, first_seen, last_seen, Mask, mask_row, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Which keys that are held each row sees, by causality, window and mask."""
    is_seen = is_held
    if CAUSAL:
        is_seen = is_seen & (key <= last_seen)
    if HAS_WINDOW:
        is_seen = is_seen & (key >= first_seen)
    if Mask is not None:
        is_seen = is_seen & (tl.load(mask_row + key, mask=is_seen, other=0) != 0)
    return is_seen


@triton.jit
def _product(a, b, total, IN_FLOAT32: tl.constexpr):
    if IN_FLOAT32:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _weights(logits, highest):
    """Weights, the factor for what was summed before, and the new highest logit of each row."""
    new_highest = tl.maximum(highest, tl.max(logits, 1))
    # Rows that have seen no key yet: exp(-inf - -inf) would be NaN. Natural units keep the logit of one key exact.
    base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    return tl.exp2((logits - base[:, None]) * LOG2E), tl.exp2((highest - base) * LOG2E), new_highest
