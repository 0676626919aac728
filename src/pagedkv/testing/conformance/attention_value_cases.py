"""paged_attention where its result is known bit by bit: rows that see one key, and keys and values that are NaN."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import torch

from ...shapes import QUANTISED_DTYPES, dtype_name
from .attention_judge import assert_close, batch_of, run_unchanged
from .bit_patterns import bit_patterns
from .case import Check

__all__ = ["attention_value_checks"]

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
I8, E4M3, E5M2 = torch.int8, torch.float8_e4m3fn, torch.float8_e5m2

# Dtypes of pages, query and out.
ONE_KEY = [
    (F32, F32, F16),
    (F32, F32, BF16),
    (F16, F32, F32),
    (BF16, F32, F32),
    (F16, F16, F16),
    (BF16, BF16, BF16),
    *((codes, query, query) for codes in (I8, E4M3, E5M2) for query in (F32, BF16)),
]

# What the key or the value of one token holds in one column: [NaN, infinity] must show in the rows that see it.
MARKS = {
    "key-is-NaN": ("key", math.nan),
    "value-is-NaN": ("value", math.nan),
    "value-is-infinite": ("value", math.inf),
    "value-is-minus-infinite": ("value", -math.inf),
}


def attention_value_checks() -> dict[str, Check]:
    """Checks by situation."""
    checks: dict[str, Check] = {}
    for dtypes in ONE_KEY:
        pages, query, out = map(dtype_name, dtypes)
        checks[f"one-key-{pages}-query-{query}-out-{out}"] = partial(_gives_the_value, *dtypes)
    for name, (which, mark) in MARKS.items():
        for dtype in (F32, F16, BF16):
            checks[f"{name}-{dtype_name(dtype)}"] = partial(_shows, which, mark, dtype)
    return checks


def _gives_the_value(
    dtype: torch.dtype, query_dtype: torch.dtype, out_dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """A row that sees one key gives its value, rounded once to nearest, and its logit for LSE."""
    one = {"key_scales": 1.0, "value_scales": 1.0} if dtype in QUANTISED_DTYPES else {}
    settings = {"dtype": dtype, "query_dtype": query_dtype, "out_dtype": out_dtype, "num_kv_heads": 4, **one}
    batch = batch_of([1] * 3, [1] * 3, {**settings, "head_dim": 64})
    owned = batch.table.indices.long()
    values = _finite_values(dtype, 3, 4, 64)
    batch.value_pages.view(torch.uint8)[owned, 0] = values.view(torch.uint8)
    # One column of the query is 1 and all others are 0: the logit is the key's element there.
    batch.query.zero_()[..., 0] = 1
    batch.options["sm_scale"] = 1.0
    state = run_unchanged(batch, backend, device)
    wanted = values.float().to(out_dtype).repeat_interleave(2, 1)
    keys = batch.key_pages[owned, 0, :, 0].float().repeat_interleave(2, 1)
    assert state.out.dtype == out_dtype, f"out must have dtype {out_dtype}, got {state.out.dtype}."
    for name, actual, expected in (("out", state.out, wanted), ("lse", state.lse, keys)):
        wrong = (actual != expected).sum()
        assert not wrong, (
            f"{name} of a row that sees one key must be exact, got {wrong} of {actual.numel()} that are not."
        )


def _finite_values(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Every finite code of 8 bits; of more bits any number that a float32 holds without being subnormal."""
    if dtype == F32:
        return torch.randn(shape) * 100
    values = bit_patterns(*shape, dtype=dtype)
    if dtype.itemsize == 1:
        codes = torch.arange(math.prod(shape)).to(torch.uint8).view(dtype)
        values = codes.view(shape)
    numbers = values.float()
    usable = numbers.isfinite() & ((numbers == 0) | (numbers.abs() >= torch.finfo(F32).tiny))
    return torch.where(usable, numbers, 1.0).to(dtype)


def _shows(which: str, mark: float, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Rows that see the token show the mark, a NaN of a key in all columns; no other element does."""
    token, head, column = 12, 1, 5
    batch = batch_of([1, 20], [9, 20], {"dtype": dtype, "window_left": 6})
    clean = dataclasses.replace(batch, key_pages=batch.key_pages.clone(), value_pages=batch.value_pages.clone())
    pages = batch.key_pages if which == "key" else batch.value_pages
    page = int(batch.table.indices[int(batch.table.indptr[1])])
    pages[page, token, head, column] = mark
    state = run_unchanged(batch, backend, device)
    rows = slice(1 + token, 1 + token + 7)
    heads = slice(head * 2, head * 2 + 2)
    at = (rows, heads) if which == "key" else (rows, heads, column)
    shown = state.out[at]
    is_shown = shown.isnan() if math.isnan(mark) else shown == mark
    assert is_shown.all(), f"out of rows that see a {which} of {mark} must be {mark}, got {shown[~is_shown]}."
    exact = run_unchanged(clean, "reference", torch.device("cpu"))
    state.out[at] = exact.out[at]
    if which == "key":
        assert state.lse[at].isnan().all(), f"lse of rows that see a key of NaN must be NaN, got {state.lse[at]}."
        state.lse[at] = exact.lse[at]
    assert_close(state, clean)
