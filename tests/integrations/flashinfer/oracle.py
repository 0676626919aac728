"""Attention of one sequence in float64, row by row of the definition: what the module is held against."""

import math

import torch


def turned(x, positions, *, theta=1e4, scale=1.0):
    """[T, H, D] rotated, column i with i + D / 2."""
    half = x.shape[-1] // 2
    angles = positions.double()[:, None] * (theta ** (-torch.arange(half).double() / half) / scale)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    low, high = x[..., :half], x[..., half:]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def attend(
    q, k, v, *, causal=False, mask=None, window_left=-1, soft_cap=0.0, sm_scale=None, slopes=None, sinks=None, rope=None
):
    """q [Tq, Hq, D], k [Tk, Hk, D], v [Tk, Hk, Dv], mask [Tq, Tk] bool, rope a dict for `turned`.

    Returns out [Tq, Hq, Dv] and lse [Tq, Hq], base 2, both float64. ALiBi counts from the row's index.
    """
    num_rows, num_keys = q.shape[0], k.shape[0]
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // max(1, k.shape[1])
    rows = torch.arange(num_rows) + num_keys - num_rows
    keys = torch.arange(num_keys)
    if rope is not None:
        q, k = turned(q, rows, **rope), turned(k, keys, **rope)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = torch.einsum("qhd,khd->hqk", q, k) * (1 / math.sqrt(q.shape[2]) if sm_scale is None else sm_scale)
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    if slopes is not None:
        logits = logits + slopes.double()[:, None, None] * (keys - torch.arange(num_rows)[:, None])
    seen = torch.ones(num_rows, num_keys, dtype=torch.bool) if mask is None else mask.clone()
    if causal:
        seen &= keys <= rows[:, None]
    if window_left >= 0:
        seen &= keys >= rows[:, None] - window_left
    logits = logits.masked_fill(~seen, -math.inf)
    if sinks is not None:
        extra = sinks.double()[:, None, None].expand(-1, num_rows, 1)
        lse = torch.logsumexp(torch.cat([logits, extra], -1), -1)
    else:
        lse = torch.logsumexp(logits, -1) if num_keys else torch.full(logits.shape[:2], -math.inf).double()
    weights = torch.exp(logits - lse[..., None].nan_to_num(neginf=0.0))
    return torch.einsum("hqk,khd->qhd", weights, v), lse.T / math.log(2)
