"""Defects of attention over latents."""

from __future__ import annotations

import dataclasses
import math

from pagedkv.kernels import reference

__all__ = ["MLA"]

ATTENDS = reference.mla_attention


def without_rope(q_latent, q_rope, latent_pages, rope_pages, plan, options, out, lse):
    ATTENDS(q_latent, None, latent_pages, None, plan, options, out, lse)


def base_2(*arguments):
    ATTENDS(*arguments)
    if arguments[-1] is not None:
        arguments[-1].div_(math.log(2))


def writes_what_it_reads(q_latent, q_rope, latent_pages, *others):
    ATTENDS(q_latent, q_rope, latent_pages, *others)
    latent_pages.nan_to_num_(0.0)


def results(change):
    """Of a right result, something is lost: `change` gets out and the plan."""

    def attend(q_latent, q_rope, latent_pages, rope_pages, plan, options, out, lse):
        ATTENDS(q_latent, q_rope, latent_pages, rope_pages, plan, options, out, lse)
        change(out, plan)

    return attend


def no_lse_no_result(*arguments):
    ATTENDS(*arguments)
    if arguments[-1] is None:
        arguments[-2][-1].zero_()


def mask_or_window(q_latent, q_rope, latent_pages, rope_pages, plan, options, out, lse):
    if plan.custom_mask is not None:
        plan = dataclasses.replace(plan, window_left=-1)
    ATTENDS(q_latent, q_rope, latent_pages, rope_pages, plan, options, out, lse)


def long_sequences(out, plan):
    for sequence, seq_len in enumerate(plan.seq_lens.tolist()):
        if seq_len > 512:
            out[slice(*plan.query_indptr[sequence : sequence + 2].tolist())] = 0


MLA = {
    "the rotated part is left out": (without_rope, "decode"),
    "LSE in base 2": (base_2, "decode"),
    "pages are written": (writes_what_it_reads, "decode"),
    "heads beyond 16 are zero": (results(lambda out, plan: out[:, 16:].zero_()), "decode-128-heads"),
    "columns beyond 256 are zero": (results(lambda out, plan: out[..., 256:].zero_()), "decode-16-heads"),
    "rows beyond 64 are zero": (results(lambda out, plan: out[64:].zero_()), "prefill-130"),
    "more than 512 keys give zeros": (results(long_sequences), "decode-1100"),
    "a mask ends the window": (mask_or_window, "window-and-custom-mask"),
    "the last row without LSE": (no_lse_no_result, "prefill-without-lse-into-out"),
}
