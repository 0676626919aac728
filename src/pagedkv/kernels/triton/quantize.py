"""quantize_kv on a GPU: a program quantises a block of rows, each read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import runtime
from .move_kernel import Form, Launch, vector_bytes
from .quantize_kernel import codes_of, quantize_rows, rows_a_program
from .variant import Variant

__all__ = ["compile_variants", "quantize_kv"]


def quantize_kv(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> None:
    """Fills values and scales, both contiguous; everything is checked."""
    if scales.numel():
        _launch(x, values, scales, runtime.has_e4m3(runtime.target_of(x.device))).run(x)


def _launch(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, has_e4m3: bool) -> Launch:
    num_tokens, num_heads, dim = x.shape
    tile, form = rows_a_program(dim), Form.of(x)
    num_bytes = vector_bytes(form)
    stride_token, stride_head = form.strides_in_vectors(num_bytes)
    codes = values if values.dtype == torch.int8 else values.view(torch.uint8)
    tensors = {"Rows": x, "Values": codes, "Scales": scales}
    numbers = {"num_rows": num_tokens * num_heads, "stride_token": stride_token, "stride_head": stride_head}
    constexprs = {
        "NUM_HEADS": num_heads,
        "DIM": dim,
        "VECTOR": num_bytes // x.element_size(),
        "CODES": codes_of(values.dtype, has_e4m3),
        **tile,
    }
    return Launch(_quantize_kv, triton.cdiv(num_tokens * num_heads, tile["BLOCK_ROWS"]), tensors, numbers, constexprs)


@triton.jit(do_not_specialize=["num_rows", "stride_token", "stride_head"])
def _quantize_kv(
    Rows,
    Values,
    Scales,
    num_rows: tl.int64,
    stride_token: tl.int64,  # in vectors
    stride_head: tl.int64,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    VECTOR: tl.constexpr,  # elements of x that addresses are multiples of
    CODES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """A program quantises BLOCK_ROWS rows; row = token * NUM_HEADS + head."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    source_row = (row // NUM_HEADS * stride_token + row % NUM_HEADS * stride_head) * VECTOR
    exists = row < num_rows
    quantize_rows(Rows, Values, Scales, source_row, row * DIM, row, exists, exists, DIM, BLOCK_DIM, CODES)


def compile_variants() -> list[Variant]:
    """Each dtype with each kind of codes, wide and odd rows."""
    variants = []
    for x_dtype, to, dim, has_e4m3 in (
        (torch.bfloat16, torch.float8_e4m3fn, 128, False),
        (torch.bfloat16, torch.float8_e4m3fn, 128, True),
        (torch.float16, torch.int8, 128, False),
        (torch.float32, torch.int8, 576, False),
        (torch.float32, torch.float8_e4m3fn, 33, False),
    ):
        x = torch.empty(64, 8, dim, dtype=x_dtype, device="meta")
        launch = _launch(x, torch.empty_like(x, dtype=to), x.new_empty(64, 8, dtype=torch.float32), has_e4m3)
        left_out = {"cuda:80": "it has no float8_e4m3fn", "hip:gfx942": "its bits are made as for sm_80"}
        variant = launch.variant(f"{x_dtype}-to-{to}-{dim}{'-native' if has_e4m3 else ''}".replace("torch.", ""))
        variants.append(variant._replace(left_out=left_out if has_e4m3 else {}))
    return variants
