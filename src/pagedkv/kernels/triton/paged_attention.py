"""paged_attention on a GPU: a launch for each height of tiles, and one that merges where keys were cut into chunks."""

from __future__ import annotations

import torch

from ..attention_options import AttentionOptions
from ..attention_plan import AttentionPlan
from ..pages import mark_written
from .attention_merge_kernel import Partials, merge_partials, new_partials
from .attention_work import work_of
from .paged_attention_form import Call, Form, Launch, form_of
from .paged_attention_kernel import attend_tile
from .runtime import on_device, target_of

__all__ = ["paged_attention"]


def paged_attention(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    plan: AttentionPlan,
    options: AttentionOptions,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Pages in NHD order; fills out and lse; everything is checked."""
    if not out.numel():
        return
    work = work_of(plan)
    partials = new_partials(work, plan.num_kv_heads, plan.value_dim)
    target = target_of(query.device)
    call = Call.of(query.dtype, key_pages.dtype, out.dtype, plan, options)
    with on_device(query):
        for kind, items in enumerate(work[:3]):
            if items.shape[0]:
                form, launch = form_of(kind, target, call)
                _launch(form, launch, items, query, key_pages, value_pages, plan, options, partials, out, lse)
        if partials is not None:
            merge_partials(
                partials,
                work.merges,
                out,
                lse,
                group=plan.group,
                sinks=options.sinks,
                value_scale=options.value_scale,
            )
    mark_written(*(tensor for tensor in (out, lse) if tensor is not None))


def _launch(
    form: Form,
    launch: Launch,
    items: torch.Tensor,
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    plan: AttentionPlan,
    options: AttentionOptions,
    partials: Partials | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    sums, stats = (None, None) if partials is None else partials
    if key_pages.dtype.itemsize == 1 and key_pages.dtype != torch.int8:
        key_pages, value_pages = key_pages.view(torch.uint8), value_pages.view(torch.uint8)
    key_scales, value_scales = options.key_scales, options.value_scales
    exp_tensors = (None, None) if options.exp_table is None else options.exp_table.tensors(query.device)
    num_programs = items.shape[0] * plan.num_kv_heads * (form.height // form.block_m)
    attend_tile[(num_programs,)](
        query,
        key_pages,
        value_pages,
        items,
        plan.query_indptr,
        plan.page_indptr,
        plan.page_indices,
        plan.seq_lens,
        plan.custom_mask,
        plan.mask_indptr,
        key_scales,
        value_scales,
        options.sinks,
        options.alibi_slopes,
        options.rope_table,
        *exp_tensors,
        out,
        lse,
        sums,
        stats,
        items.shape[0],
        query.shape[0],
        plan.num_kv_heads,
        options.sm_scale,
        options.soft_cap,
        options.value_scale,
        plan.window_left,
        *query.stride()[:2],
        *key_pages.stride()[:3],
        *value_pages.stride()[:3],
        *((0, 0, 0) if key_scales is None else _token_strides(key_scales)),
        *((0, 0, 0) if value_scales is None else _token_strides(value_scales)),
        FORM=form,
        **launch._asdict(),
    )


def _token_strides(scales: torch.Tensor) -> tuple[int, int, int]:
    """Strides of scales [N, Hk, P] by page, token and head."""
    page, head, token = scales.stride()
    return page, token, head
