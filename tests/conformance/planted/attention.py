"""Defects of attention: sizes, options that end others, numbers."""

from __future__ import annotations

import dataclasses
import math

import torch

from pagedkv.kernels import reference

from .numbers import cut_to

__all__ = ["ATTENTION"]

ATTENDS = reference.paged_attention


def options_are(**change):
    """Each named option is what its function makes of options and plan."""

    def attend(query, key_pages, value_pages, plan, options, out, lse):
        changed = {name: of(options, plan) for name, of in change.items()}
        ATTENDS(query, key_pages, value_pages, plan, dataclasses.replace(options, **changed), out, lse)

    return attend


def plan_is(**change):
    def attend(query, key_pages, value_pages, plan, options, out, lse):
        changed = {name: of(options, plan) for name, of in change.items()}
        ATTENDS(query, key_pages, value_pages, dataclasses.replace(plan, **changed), options, out, lse)

    return attend


def zeros(where):
    """Of a right result, what `where` gives of out, by query and plan, is zeroed."""

    def attend(query, key_pages, value_pages, plan, options, out, lse):
        ATTENDS(query, key_pages, value_pages, plan, options, out, lse)
        for part in where(out, query, plan):
            part.zero_()

    return attend


def unless(wrong, option):
    """The option is off when `wrong` holds."""
    off = 0.0 if option == "soft_cap" else None
    return options_are(**{option: lambda options, plan: off if wrong(options, plan) else getattr(options, option)})


def is_masked(options, plan):
    return plan.custom_mask is not None


def has_window(options, plan):
    return plan.window_left >= 0


def has_rope(options, plan):
    return options.rope_table is not None


def has_token_scales(options, plan):
    return options.key_scales is not None


def rows_of(out, plan, is_wrong):
    for sequence, seq_len in enumerate(plan.seq_lens.tolist()):
        if is_wrong(seq_len):
            yield out[slice(*plan.query_indptr[sequence : sequence + 2].tolist())]


def base_2(query, key_pages, value_pages, plan, options, out, lse):
    ATTENDS(query, key_pages, value_pages, plan, options, out, lse)
    if lse is not None:
        lse.div_(math.log(2))


def sums_chunks_unweighted(query, key_pages, value_pages, plan, options, out, lse):
    """The mean of out over the first 512 keys and over all, where there are more: chunks merged without their LSE."""
    ATTENDS(query, key_pages, value_pages, plan, options, out, lse)
    if plan.num_seqs and int(plan.seq_lens.max()) > 512:
        part = torch.empty_like(out)
        short = dataclasses.replace(plan, seq_lens=plan.seq_lens.clamp(max=512))
        ATTENDS(query, key_pages, value_pages, short, options, part, None)
        out.add_(part).div_(2)


def reads_the_tail(query, key_pages, value_pages, plan, options, out, lse):
    """0 times the slot after the last key of each sequence joins its rows."""
    ATTENDS(query, key_pages, value_pages, plan, options, out, lse)
    ends = plan.page_indptr[1:].tolist()
    for sequence, seq_len in enumerate(plan.seq_lens.tolist()):
        if seq_len % plan.page_size:
            slot = key_pages[int(plan.page_indices[ends[sequence] - 1]), seq_len % plan.page_size]
            for rows in rows_of(out, plan, lambda length, seq_len=seq_len: length == seq_len):
                rows.add_(0 * slot.float().sum())


def query_by_bfloat16(query, *others):
    ATTENDS(query.bfloat16().to(query.dtype), *others)


def cuts_off(query, key_pages, value_pages, plan, options, out, lse):
    exact = torch.empty(out.shape)
    ATTENDS(query, key_pages, value_pages, plan, options, exact, lse)
    out.copy_(exact)
    cut_to(out, exact)


def hides_nan(query, key_pages, value_pages, plan, options, out, lse):
    ATTENDS(query, key_pages, value_pages, plan, options, out, lse)
    out.nan_to_num_(0)


def nan_of_all_keys(query, key_pages, value_pages, plan, options, out, lse):
    """0 * NaN of keys that a row does not see gets into it."""
    ATTENDS(query, key_pages, value_pages, plan, options, out, lse)
    for sequence, seq_len in enumerate(plan.seq_lens.tolist()):
        first, last = plan.page_indptr[sequence : sequence + 2].tolist()
        values = value_pages[plan.page_indices[first:last].long()].flatten(0, 1)[:seq_len].float()
        out[slice(*plan.query_indptr[sequence : sequence + 2].tolist())] += (
            (0 * values).sum(0).repeat_interleave(plan.group, 0)
        )


def subnormal_codes_are_zero(query, key_pages, value_pages, plan, options, out, lse):
    if value_pages.dtype == torch.float8_e4m3fn:
        codes = value_pages.view(torch.uint8)
        value_pages = torch.where(codes & 0x78 == 0, codes & 0x80, codes).view(value_pages.dtype)
    ATTENDS(query, key_pages, value_pages, plan, options, out, lse)


def pages_are(ids):
    return plan_is(page_indices=lambda options, plan: ids(plan.page_indices))


def alike_is_the_same(options, plan):
    """Sequences that begin on the page of the first one get all of its pages."""
    starts, ids = plan.page_indptr.tolist(), plan.page_indices.clone()
    for start in starts[1:-1]:
        if start < len(ids) and ids[start] == ids[0]:
            ids[start : start + starts[1]] = ids[: starts[1]]
    return ids


ATTENTION = {
    "pages of sequences that begin alike are the same": (plan_is(page_indices=alike_is_the_same), "shared-pages"),
    "more than 512 keys give zeros": (
        zeros(lambda out, query, plan: rows_of(out, plan, lambda seq_len: seq_len > 512)),
        "decode-1100",
    ),
    "chunks are merged without weights": (sums_chunks_unweighted, "decode-1100"),
    "more than 16 sequences give zeros": (
        zeros(lambda out, query, plan: [out] if plan.num_seqs > 16 else []),
        "decode-20-sequences",
    ),
    "more than 64 sequences give zeros": (
        zeros(lambda out, query, plan: [out] if plan.num_seqs > 64 else []),
        "decode-70-sequences",
    ),
    "rows beyond 128 are zero": (zeros(lambda out, query, plan: [out[128:]]), "prefill-130"),
    "rows beyond 256 are zero": (zeros(lambda out, query, plan: [out[256:]]), "prefill-270"),
    "heads beyond 32 are zero": (zeros(lambda out, query, plan: [out[:, 32:]]), "decode-40-heads"),
    "heads beyond 64 are zero": (zeros(lambda out, query, plan: [out[:, 64:]]), "decode-128-heads"),
    "columns beyond 128 are zero": (zeros(lambda out, query, plan: [out[..., 128:]]), "head-dim-192-bfloat16"),
    "head dim 128 gives zeros": (
        zeros(lambda out, query, plan: [out] if query.shape[2] == 128 else []),
        "head-dim-128-float16",
    ),
    "page size 256 gives zeros": (
        zeros(lambda out, query, plan: [out] if plan.page_size == 256 else []),
        "page-size-256-HND",
    ),
    "page ids are cut to 16 bits": (pages_are(lambda ids: ids % 65536), "page-ids-past-65535"),
    "the mask ends the soft cap": (unless(is_masked, "soft_cap"), "custom-mask-and-soft-cap"),
    "the mask ends the sinks": (unless(is_masked, "sinks"), "custom-mask-and-sinks"),
    "the mask ends the rotation": (unless(is_masked, "rope_table"), "custom-mask-and-rope"),
    "the window ends the mask": (
        plan_is(custom_mask=lambda options, plan: None if has_window(options, plan) else plan.custom_mask),
        "window-and-custom-mask",
    ),
    "the window ends the slopes": (unless(has_window, "alibi_slopes"), "window-and-alibi"),
    "the rotation ends the slopes": (unless(has_rope, "alibi_slopes"), "alibi-and-rope"),
    "the rotation ends the sinks": (unless(has_rope, "sinks"), "sinks-and-rope"),
    "scales end the rotation": (unless(has_token_scales, "rope_table"), "rope-and-int8"),
    "scales end the sinks": (unless(has_token_scales, "sinks"), "sinks-and-int8"),
    "the table ends the soft cap": (
        unless(lambda options, plan: options.exp_table is not None, "soft_cap"),
        "soft-cap-and-softmax-table",
    ),
    "negative slopes are positive": (
        options_are(
            alibi_slopes=lambda options, plan: None if options.alibi_slopes is None else options.alibi_slopes.abs()
        ),
        "alibi-negative",
    ),
    "large sinks are clamped": (
        options_are(sinks=lambda options, plan: None if options.sinks is None else options.sinks.clamp(max=8)),
        "sinks-that-outweigh",
    ),
    "scales of keys serve values": (options_are(value_scales=lambda options, plan: options.key_scales), "int8"),
    "scale 0 is the default": (
        options_are(sm_scale=lambda options, plan: options.sm_scale or plan.head_dim**-0.5),
        "scale-0",
    ),
    "LSE in base 2": (base_2, "decode"),
    "the last page's tail is read": (reads_the_tail, "decode"),
    "the query is rounded to bfloat16": (query_by_bfloat16, "decode"),
    "bfloat16 is cut, not rounded": (cuts_off, "one-key-float32-query-float32-out-bfloat16"),
    "subnormal codes are zero": (
        subnormal_codes_are_zero,
        "one-key-float8_e4m3fn-query-float32-out-float32",
    ),
    "a NaN that is owned is hidden": (hides_nan, "value-is-NaN-float16"),
    "infinity that is owned is hidden": (hides_nan, "value-is-infinite-float32"),
    "a NaN gets into rows that do not see it": (nan_of_all_keys, "value-is-NaN-bfloat16"),
}
