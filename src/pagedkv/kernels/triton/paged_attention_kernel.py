"""Attention of one tile of query rows over a range of keys in pages: the kernel behind paged_attention."""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_logits import (
    add_marks,
    add_weighted,
    is_finite,
    load_tile,
    numbers_of,
    page_ids,
    soft_capped,
    to_float16_rows,
    token_rows,
    turned_tile,
)
from .exp_table_kernel import exp_by_table
from .language import LOG2E

__all__ = ["attend_tile"]


@triton.jit(do_not_specialize=["num_items", "num_tokens", "window_left"])
def attend_tile(
    Query,
    Keys,
    Values,
    Items,
    QueryIndptr,
    PageIndptr,
    PageIds,
    SeqLens,
    Mask,
    MaskIndptr,
    KeyScales,
    ValueScales,
    Sinks,
    Slopes,
    RopeTable,
    ExpEntries,
    ExpPowers,
    Out,
    Lse,
    Sums,
    Stats,
    num_items,
    num_tokens,
    num_kv_heads,
    sm_scale,
    soft_cap,
    value_scale,
    window_left,
    query_token,
    query_head,
    key_page,
    key_token,
    key_head,
    value_page,
    value_token,
    value_head,
    key_scale_page,
    key_scale_token,
    key_scale_head,
    value_scale_page,
    value_scale_token,
    value_scale_head,
    FORM: tl.constexpr,
):
    """A program computes FORM.block_m rows of an item, for one KV head.

    Items [num_items, 5]: kernels/attention_plan.py:DeviceWork. Sums and Stats: attention_merge_kernel.py:Partials, None
    where no item leaves partial rows. Names such as key_page are strides, in elements.
    """
    BLOCK_M: tl.constexpr = FORM.block_m
    BLOCK_V: tl.constexpr = FORM.block_v
    KIND: tl.constexpr = FORM.page_kind
    subtiles: tl.constexpr = FORM.height // FORM.block_m
    program = tl.program_id(0)
    subtile = program % subtiles
    if FORM.heads_outer:
        head = program // subtiles // num_items
        item = program // subtiles % num_items
    else:
        head = program // subtiles % num_kv_heads
        item = program // subtiles // num_kv_heads
    item_at = Items + item.to(tl.int64) * 5
    sequence = tl.load(item_at)
    if sequence < 0:
        return
    query_start = tl.load(QueryIndptr + sequence)
    query_len = tl.load(QueryIndptr + sequence + 1) - query_start
    item_row = tl.load(item_at + 1)
    first_row = item_row + subtile * FORM.block_m
    # In fixed-address buffers there may be a newer, larger batch than the one whose rows were given.
    num_rows = tl.minimum(query_len, num_tokens - query_start) * FORM.group
    stop_row = tl.minimum(tl.minimum(first_row + FORM.block_m, item_row + FORM.height), num_rows)
    if first_row >= stop_row:
        return
    seq_len = tl.load(SeqLens + sequence)
    start = tl.load(item_at + 2)
    key_stop = tl.load(item_at + 3)
    partial = tl.load(item_at + 4)

    rows = first_row + tl.arange(0, FORM.block_m)
    row_exists = rows < stop_row
    tokens = rows // FORM.group
    positions = seq_len - query_len + tokens
    first_position = seq_len - query_len + first_row // FORM.group
    last_position = seq_len - query_len + (stop_row - 1) // FORM.group
    heads = head * FORM.group + rows % FORM.group
    query_rows = (query_start + tokens).to(tl.int64) * query_token + heads.to(tl.int64) * query_head

    # Of the keys [start, stop), all rows see [full, after), in whole blocks; the others some rows only.
    stop = key_stop
    full_stop = key_stop
    if FORM.causal:
        stop = tl.minimum(stop, last_position + 1)
        full_stop = tl.minimum(full_stop, first_position + 1)
    full = start
    if FORM.has_window:
        seen_from = tl.maximum(first_position.to(tl.int64) - window_left, start) // FORM.edge_n * FORM.edge_n
        start = tl.maximum(start, tl.minimum(seen_from, key_stop).to(tl.int32))
        seen_by_all = tl.maximum(last_position.to(tl.int64) - window_left, start)
        seen_by_all = (seen_by_all + FORM.block_n - 1) // FORM.block_n * FORM.block_n
        full = tl.minimum(seen_by_all, 2147483647).to(tl.int32)
    num_full = 0
    if Mask is None:
        num_full = tl.maximum(full_stop - full, 0) // FORM.block_n
    full = tl.where(num_full > 0, full, start)
    after = full + num_full * FORM.block_n
    num_before = (full - start) // FORM.edge_n
    num_edges = num_before + tl.cdiv(tl.maximum(stop - after, 0), FORM.edge_n)

    # The unit of what is compared, in logits: a number, or one for each row.
    unit = sm_scale
    query, rest = query_rows, query_rows
    if FORM.query_as != "float32":
        columns = tl.arange(0, FORM.block_d)
        query = load_tile(Query, query_rows, columns, row_exists, FORM.head_dim, False, FORM.block_d <= FORM.head_dim)
        if FORM.rest_d > 0:
            columns = FORM.block_d + tl.arange(0, FORM.rest_d)
            fits: tl.constexpr = FORM.block_d + FORM.rest_d == FORM.head_dim
            rest = load_tile(Query, query_rows, columns, row_exists, FORM.head_dim, False, fits)
    if FORM.query_as == "float16":
        largest = tl.max(tl.abs(query.to(tl.float32)), 1)
        if FORM.rest_d > 0:
            largest = tl.maximum(largest, tl.max(tl.abs(rest.to(tl.float32)), 1))
            rest, undo = to_float16_rows(rest, largest)
        query, undo = to_float16_rows(query, largest)
        unit = sm_scale * undo
    slopes, mask_rows = unit, tokens
    if Slopes is not None:
        slopes = tl.load(Slopes + heads, mask=row_exists, other=0.0)
    if Mask is not None:
        mask_rows = tl.load(MaskIndptr + sequence) + tokens.to(tl.int64) * seq_len

    state = (
        tl.full((BLOCK_M,), float("-inf"), tl.float32),
        tl.zeros((BLOCK_M,), tl.float32),
        tl.zeros((BLOCK_M, BLOCK_V), tl.float32),
        0,
    )
    tile = (query, rest, unit, slopes, query_rows)
    sight = (positions, row_exists, Mask, mask_rows, window_left)
    page_list = PageIds + tl.load(PageIndptr + sequence)
    key_pages = (page_list, Keys + head.to(tl.int64) * key_head, key_page, key_token)
    value_pages = (page_list, Values + head.to(tl.int64) * value_head, value_page, value_token)
    scales = (
        KeyScales,
        head.to(tl.int64) * key_scale_head,
        key_scale_page,
        key_scale_token,
        ValueScales,
        head.to(tl.int64) * value_scale_head,
        value_scale_page,
        value_scale_token,
    )
    options = (Query, Slopes, RopeTable, ExpEntries, ExpPowers, soft_cap)
    if Mask is None:
        blocks = (full, num_full, 0, 0, stop)
        state = _attend_keys(
            state, blocks, tile, sight, key_pages, value_pages, scales, options, FORM, FORM.block_n, False
        )
    blocks = (start, num_edges, num_before, after - full, stop)
    state = _attend_keys(state, blocks, tile, sight, key_pages, value_pages, scales, options, FORM, FORM.edge_n, True)
    highest, total, acc, num_infinite = state
    MAY_VANISH: tl.constexpr = FORM.value_dtype == tl.float16 and (KIND == "number" or KIND == "e5m2")
    if MAY_VANISH:
        # Weights of float32 that are 0 as float16 made NaN of the infinite values that all rows see.
        num_infinite += tl.max(tl.where(acc != acc, 1, 0))
        blocks = (start, tl.cdiv(tl.maximum(stop - start, 0), FORM.edge_n), 0, 0, stop)
    if KIND != "integer" and num_infinite > 0:
        if MAY_VANISH:
            # That of a logit stays: it is in the sum of weights, too.
            acc = tl.where(acc != acc, 0.0, acc)
        acc = _mark_values(acc, blocks, sight, value_pages, FORM)

    if not FORM.is_natural:
        highest *= unit
    exists = row_exists[:, None] & (tl.arange(0, FORM.block_v) < FORM.value_dim)[None, :]
    columns = tl.arange(0, FORM.block_v)[None, :]
    if Sums is not None and partial >= 0:
        to = (partial + rows - item_row).to(tl.int64) * num_kv_heads + head
        tl.store(Sums + to[:, None] * FORM.value_dim + columns, acc * (1.0 / FORM.weight_scale), mask=exists)
        tl.store(Stats + to * 2, highest, mask=row_exists)
        tl.store(Stats + to * 2 + 1, total, mask=row_exists)
    else:
        if Sinks is not None:
            sinks = tl.load(Sinks + heads, mask=row_exists, other=0.0)
            of_keys, highest = highest, tl.maximum(highest, sinks)
        base = tl.where(highest == float("-inf"), 0.0, highest)
        if Sinks is not None:
            # Of a row that has seen nothing exp(-inf) = 0, however low the sink.
            rescale = tl.exp2((of_keys - base) * LOG2E)
            total = total * rescale + tl.exp2((sinks - base) * LOG2E)
            acc *= rescale[:, None]
        # Not `total > 0`: a NaN must show.
        is_empty = total == 0
        total = tl.where(is_empty, 1.0, total)
        divisor = tl.where(is_empty, 0.0, tl.math.div_rn(1.0, total)) * (value_scale / FORM.weight_scale)
        to = (query_start + tokens).to(tl.int64) * num_kv_heads * FORM.group + heads
        result = tl.where(is_empty[:, None], 0.0, acc * divisor[:, None])
        tl.store(Out + to[:, None] * FORM.value_dim + columns, result.to(Out.dtype.element_ty), mask=exists)
        if Lse is not None:
            tl.store(Lse + to, tl.where(is_empty, float("-inf"), base + tl.log(total)), mask=row_exists)


@triton.jit
def _attend_keys(
    state,
    blocks,
    tile,
    sight,
    key_pages,
    value_pages,
    scales,
    options,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_EDGE: tl.constexpr,
):
    """The state of online softmax after some blocks of keys: maximum and sum of weights [M], sum of values [M, Dv], and
    of edges whether values that are NaN or infinite were left out of that sum.

    blocks: the first key, how many blocks, after which of them so many keys are left out, the end of all keys.
    """
    highest, total, acc, num_infinite = state
    first, num_blocks, jump_after, jump, stop = blocks
    query, rest, unit, slopes, query_rows = tile
    positions, row_exists = sight[0], sight[1]
    page_list, Keys, key_page, key_token = key_pages
    Values, value_page, value_token = value_pages[1], value_pages[2], value_pages[3]
    KeyScales, key_scale_head, key_scale_page, key_scale_token = scales[0], scales[1], scales[2], scales[3]
    ValueScales, value_scale_head, value_scale_page, value_scale_token = scales[4], scales[5], scales[6], scales[7]
    Query, Slopes, RopeTable, ExpEntries, ExpPowers, soft_cap = options
    KIND: tl.constexpr = FORM.page_kind
    VALUE_DTYPE: tl.constexpr = FORM.value_dtype
    columns = tl.arange(0, FORM.block_d)
    value_columns = tl.arange(0, FORM.block_v)
    first += tl.where(jump_after == 0, jump, 0)
    pages = page_ids(page_list, first, stop, FORM.page_size, BLOCK)
    infinite = tl.zeros((BLOCK,), tl.int32)
    for number in tl.range(0, num_blocks, num_stages=FORM.edge_stages if IS_EDGE else None):
        keys = first + tl.arange(0, BLOCK)
        exists = keys < stop
        key_rows = token_rows(pages, first, key_page, key_token, FORM.page_size, BLOCK)
        value_rows = token_rows(pages, first, value_page, value_token, FORM.page_size, BLOCK)
        if KeyScales is not None:
            scale_rows = token_rows(pages, first, key_scale_page, key_scale_token, FORM.page_size, BLOCK)
            key_scales = tl.load(KeyScales + key_scale_head + scale_rows, mask=exists, other=0.0)
        if ValueScales is not None:
            scale_rows = token_rows(pages, first, value_scale_page, value_scale_token, FORM.page_size, BLOCK)
            value_scales = tl.load(ValueScales + value_scale_head + scale_rows, mask=exists, other=0.0)
        # The pages of the next block now, so that its loads need not wait for them.
        first += BLOCK
        if IS_EDGE:
            first += tl.where(number + 1 == jump_after, jump, 0)
        pages = page_ids(page_list, first, stop, FORM.page_size, BLOCK)

        if FORM.query_as == "float32":
            BLOCK_M: tl.constexpr = FORM.block_m
            logits = tl.zeros((BLOCK_M, BLOCK), tl.float32)
            fits: tl.constexpr = FORM.head_dim % FORM.block_d == 0
            for column in range(0, FORM.head_dim, FORM.block_d):
                at = column + columns
                if FORM.rope_dim > 0:
                    q = turned_tile(Query, query_rows, at, row_exists, positions, RopeTable, "number", FORM)
                    k = turned_tile(Keys, key_rows, at, exists, keys, RopeTable, KIND, FORM)
                else:
                    q = load_tile(Query, query_rows, at, row_exists, FORM.head_dim, False, fits).to(tl.float32)
                    k = load_tile(Keys, key_rows, at, exists, FORM.head_dim, not IS_EDGE, fits)
                    k = numbers_of(k, KIND, tl.float32, FORM.has_e4m3)
                logits = tl.dot(q, tl.trans(k), logits, input_precision="ieee")
        else:
            k = load_tile(Keys, key_rows, columns, exists, FORM.head_dim, not IS_EDGE, FORM.block_d <= FORM.head_dim)
            logits = tl.dot(query, tl.trans(numbers_of(k, KIND, query.dtype, FORM.has_e4m3)))
            if FORM.rest_d > 0:
                at = FORM.block_d + tl.arange(0, FORM.rest_d)
                rest_fits: tl.constexpr = FORM.block_d + FORM.rest_d == FORM.head_dim
                k = load_tile(Keys, key_rows, at, exists, FORM.head_dim, not IS_EDGE, rest_fits)
                logits = tl.dot(rest, tl.trans(numbers_of(k, KIND, query.dtype, FORM.has_e4m3)), logits)
        values = load_tile(
            Values, value_rows, value_columns, exists, FORM.value_dim, not IS_EDGE, FORM.block_v == FORM.value_dim
        )
        values = numbers_of(values, KIND, VALUE_DTYPE, FORM.has_e4m3)

        if KeyScales is not None:
            logits *= key_scales[None, :]
        factor = unit * LOG2E
        if FORM.is_natural:
            logits *= unit[:, None] if FORM.query_as == "float16" else unit
            factor = LOG2E
            if FORM.has_cap:
                logits = soft_capped(logits, soft_cap)
            if Slopes is not None:
                logits += slopes[:, None] * (keys[None, :] - positions[:, None]).to(tl.float32)
        if IS_EDGE:
            visible = _visible(keys, stop, sight, FORM)
            logits = tl.where(visible, logits, float("-inf"))

        new_highest = tl.maximum(highest, tl.max(logits, 1))
        # A row that has seen nothing: exp(-inf - -inf) would be NaN.
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        decay = tl.exp2((highest - base) * factor)
        if FORM.table_steps > 0:
            weights = exp_by_table(logits - base[:, None], ExpEntries, ExpPowers, FORM)
        elif FORM.query_as == "float16" and not FORM.is_natural:
            weights = tl.exp2((logits - base[:, None]) * factor[:, None])
        else:
            weights = tl.exp2((logits - base[:, None]) * factor)
        total = total * decay + tl.sum(weights, 1)
        highest = new_highest
        acc *= decay[:, None]
        if ValueScales is not None:
            weights *= value_scales[None, :]
            if IS_EDGE:
                weights = tl.where(visible, weights, 0.0)
        if FORM.weight_scale != 1.0:
            weights *= FORM.weight_scale
        if IS_EDGE and KIND != "integer":
            # What is not finite must reach the rows that see it, and 0 * NaN no other.
            finite = is_finite(values)
            infinite = tl.maximum(infinite, tl.max(tl.where(finite, 0, 1), 1))
            values = tl.where(finite, values, 0.0).to(values.dtype)
        acc = add_weighted(weights, values, acc, FORM.num_parts, not IS_EDGE)
    if IS_EDGE:
        num_infinite = tl.sum(infinite, 0)
    return highest, total, acc, num_infinite


@triton.jit
def _visible(keys, stop, sight, FORM: tl.constexpr):
    """[M, N]: which keys each row sees."""
    positions, row_exists, Mask, mask_rows, window_left = sight
    visible = row_exists[:, None] & (keys < stop)[None, :]
    if FORM.causal:
        visible = visible & (keys[None, :] <= positions[:, None])
    if FORM.has_window:
        visible = visible & (positions[:, None] - keys[None, :] <= window_left)
    if Mask is not None:
        visible = visible & (tl.load(Mask + mask_rows[:, None] + keys[None, :], mask=visible, other=0) != 0)
    return visible


@triton.jit
def _mark_values(acc, blocks, sight, value_pages, FORM: tl.constexpr):
    """acc with what it is where rows see a value of these blocks that is NaN or infinite."""
    BLOCK: tl.constexpr = 16
    KIND: tl.constexpr = FORM.page_kind
    first, num_blocks, jump_after, jump, stop = blocks
    page_list, Values, value_page, value_token = value_pages
    columns = tl.arange(0, FORM.block_v)
    before = first + jump_after * FORM.edge_n
    for number in tl.range(0, num_blocks * (FORM.edge_n // BLOCK), num_stages=1):
        start = first + number * BLOCK
        start += tl.where(start >= before, jump, 0)
        keys = start + tl.arange(0, BLOCK)
        pages = page_ids(page_list, start, stop, FORM.page_size, BLOCK)
        rows = token_rows(pages, start, value_page, value_token, FORM.page_size, BLOCK)
        values = load_tile(Values, rows, columns, keys < stop, FORM.value_dim, False, FORM.block_v == FORM.value_dim)
        values = numbers_of(values, KIND, tl.float32, FORM.has_e4m3)
        acc = add_marks(acc, _visible(keys, stop, sight, FORM), values)
    return acc
