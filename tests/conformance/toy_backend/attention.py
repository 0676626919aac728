"""Attention row by row and head by head, in float64."""

from __future__ import annotations

import math

import numpy as np

__all__ = ["paged_attention"]


def paged_attention(query, key_pages, value_pages, plan, options, out, lse):
    """Fills out and, when it is asked for, lse."""
    starts = plan.query_indptr.tolist()
    for sequence in range(plan.num_seqs):
        rows = range(starts[sequence], starts[sequence + 1])
        num_tokens = num_keys(plan, sequence) if rows else 0
        slots = np.array([slot_of(plan, sequence, token) for token in range(num_tokens)], int).reshape(-1, 2)
        for row in rows:
            position = int(plan.seq_lens[sequence]) - rows.stop + row
            tokens = np.array([token for token in range(num_tokens) if is_seen(plan, sequence, position, token)], int)
            for head in range(plan.num_q_heads):
                at = *slots[tokens].T, kv_head(plan, head)
                element = query[row, head].numpy().astype(np.float64)
                keys, values = (pages.numpy()[at].astype(np.float64) for pages in (key_pages, value_pages))
                logits = keys @ element * options.sm_scale
                logits = changed(logits, tokens - position, head, options)
                result, log_sum = softmax_sum(logits, values, head, options)
                out[row, head] = out.new_tensor(result * options.value_scale)
                if lse is not None:
                    lse[row, head] = log_sum


def num_keys(plan, sequence):
    return int(plan.seq_lens[sequence])


def kv_head(plan, head):
    return head // (plan.num_q_heads // plan.num_kv_heads)


def slot_of(plan, sequence, token):
    page, offset = divmod(token, plan.page_size)
    return int(plan.page_indices[int(plan.page_indptr[sequence]) + page]), offset


def is_seen(plan, sequence, position, token):
    return (
        (not plan.causal or is_past(position, token))
        and is_in_window(plan, position, token)
        and is_kept(plan, sequence, position, token)
    )


def is_past(position, token):
    return token <= position


def is_in_window(plan, position, token):
    return plan.window_left < 0 or token >= position - plan.window_left


def is_kept(plan, sequence, position, token):
    if plan.custom_mask is None:
        return True
    kv_len = int(plan.seq_lens[sequence])
    q_len = int(plan.query_indptr[sequence + 1] - plan.query_indptr[sequence])
    row = position - (kv_len - q_len)
    return bool(plan.custom_mask[int(plan.mask_indptr[sequence]) + row * kv_len + token])


def changed(logits, distances, head, options):
    if options.soft_cap:
        logits = options.soft_cap * np.tanh(logits / options.soft_cap)
    if options.alibi_slopes is not None:
        logits = logits + float(options.alibi_slopes[head]) * distances
    return logits


def softmax_sum(logits, values, head, options):
    """The weighted sum of the values and the logarithm of the denominator, which a sink joins."""
    joining = [] if options.sinks is None else [float(options.sinks[head])]
    highest = max([*logits.tolist(), *joining], default=-math.inf)
    if highest == -math.inf:
        return np.zeros(values.shape[1]), -math.inf
    weights = np.exp(logits - highest)
    total = weights.sum() + sum(math.exp(sink - highest) for sink in joining)
    return weights @ values / total, log_of(highest, total)


def log_of(highest, total):
    return highest + math.log(total)
