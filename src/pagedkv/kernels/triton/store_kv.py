"""store_kv on a GPU: keys and values in one launch, of many tokens in two."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..pages import check_slots, mark_written
from . import runtime, shared_slots
from .move_kernel import Form, Launch, Tile, apart_from, lane_tensor, lanes_a_vector, tile_of, vector_bytes
from .quantize_kernel import codes_of, rows_a_program
from .store_kv_kernel import STRIDES, store_tokens
from .variant import Variant

__all__ = ["compile_variants", "store_kv"]

# The tile that sets shared slots right, and mostly only looks for them: many tokens, little of each at once.
_ROWS_SET_RIGHT, _VECTORS_SET_RIGHT = (1024 if runtime.IS_INTERPRETED else 128), 16
# Pairs of tokens that a program compares in one step.
_COMPARED = 1024


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    """Pages in NHD order, scales [N, Hk, P]; everything but the slots is checked, and they where that is asked for.

    A slot beyond the pool that is not refused is skipped.
    """
    if runtime.checks_bounds():
        check_slots("slot_mapping", slot_mapping, key_pages.shape[0] * key_pages.shape[1])
    written = [tensor for tensor in (key_pages, value_pages, key_scales, value_scales) if tensor is not None]
    key, value = (apart_from(tokens, written) for tokens in (key, value))
    sides = _Side(key, key_pages, key_scales), _Side(value, value_pages, value_scales)
    device = key_pages.device
    for launch in _launches(
        sides,
        slot_mapping.contiguous(),
        num_multiprocessors=runtime.num_multiprocessors(device),
        has_e4m3=runtime.has_e4m3(runtime.target_of(device)),
    ):
        launch.run(key_pages)
    mark_written(*written)


class _Side(NamedTuple):
    """Keys or values: tokens [T, Hk, D], pages [N, P, Hk, D] and, to quantise, scales [N, Hk, P]."""

    tokens: torch.Tensor
    pages: torch.Tensor
    scales: torch.Tensor | None


def _launches(sides: Sequence[_Side], slots: torch.Tensor, *, num_multiprocessors: int, has_e4m3: bool) -> list[Launch]:
    """What stores these tokens: nothing, one launch, or two."""
    pages, scales = sides[0].pages, sides[0].scales
    num_tokens, num_slots = slots.shape[0], pages.shape[0] * pages.shape[1]
    if not num_tokens * num_slots * pages.shape[2]:
        return []
    forms = tuple(
        _SideForm(Form.of(tokens), Form.of(pages), None if scales is None else scales.stride())
        for tokens, pages, scales in sides
    )
    tensors: dict[str, Any] = {"Slots": slots, "Claims": None}
    if scales is None:
        plan = _plan_to_move(forms, num_tokens, num_multiprocessors)
    else:
        plan = _plan_to_quantize(forms, num_tokens, codes_of(pages.dtype, has_e4m3))
    for side, (tokens, pages, scales) in zip(("Key", "Value"), sides, strict=True):
        if scales is None:
            tokens, pages = (lane_tensor(tensor, plan.vector_bytes) for tensor in (tokens, pages))
        elif pages.dtype != torch.int8:
            pages = pages.view(torch.uint8)
        tensors |= {side: tokens, f"{side}_pages": pages, f"{side}_scales": scales}
    if len(plan.steps) > 1:
        tensors["Claims"] = torch.empty(plan.num_claims, dtype=torch.int32, device=slots.device)
    return [Launch(store_tokens, step.num_programs, tensors, plan.numbers, step.constexprs) for step in plan.steps]


class _SideForm(NamedTuple):
    """What of a side decides how it is stored."""

    tokens: Form
    pages: Form
    scale_strides: tuple[int, ...] | None

    def num_vectors(self, num_bytes: int) -> int:
        """Of a token, all heads."""
        return self.tokens.shape[1:].numel() * self.tokens.element_size // num_bytes

    def strides(self, name: str, bytes_of_tokens: int, bytes_of_pages: int) -> dict[str, int]:
        """By the names of the kernel's parameters; those of tokens and pages in vectors of so many bytes."""
        strides = (
            *self.tokens.strides_in_vectors(bytes_of_tokens),
            *self.pages.strides_in_vectors(bytes_of_pages),
            *(self.scale_strides or (0, 0, 0)),
        )
        names = [parameter for parameter in STRIDES if parameter.startswith(f"stride_{name}_")]
        return dict(zip(names, strides, strict=True))


class _Step(NamedTuple):
    """A launch but for what it shares with the other."""

    num_programs: int
    constexprs: dict[str, Any]


class _Plan(NamedTuple):
    """The launches but for their tensors."""

    vector_bytes: int
    num_claims: int
    numbers: dict[str, int]
    steps: list[_Step]


_SideForms = tuple[_SideForm, ...]
_SIDES = ("key", "value")


@functools.lru_cache(maxsize=4096)
def _plan_to_move(sides: _SideForms, num_tokens: int, num_multiprocessors: int) -> _Plan:
    moved = [form for side in sides for form in (side.tokens, side.pages) if side.tokens.shape.numel()]
    num_bytes = vector_bytes(*moved)
    widths = [side.num_vectors(num_bytes) for side in sides]
    numbers: dict[str, int] = {}
    constexprs: dict[str, Any] = {"CODES": "moved"}
    for name, side, width in zip(_SIDES, sides, widths, strict=True):
        _, num_heads, dim = side.tokens.shape
        # Heads that lie end to end are one run.
        is_one_run = num_heads == 1 or side.tokens.strides[1] == side.pages.strides[2] == dim
        row, lanes = width if is_one_run else width // num_heads, lanes_a_vector(num_bytes)
        numbers |= side.strides(name, num_bytes, num_bytes)
        constexprs |= _of_side(name, ROW=row, WIDTH=width, VECTOR=lanes, PAGES_VECTOR=lanes)
    tile = tile_of(num_tokens, widths, num_bytes, num_multiprocessors)
    tiles = [tile, Tile(_ROWS_SET_RIGHT, tuple(min(vectors, _VECTORS_SET_RIGHT) for vectors in tile.vectors))]
    num_chunks = [[-(-width // block) for width, block in zip(widths, of.vectors, strict=True)] for of in tiles]
    return _plan(sides, num_tokens, num_bytes, numbers, constexprs, tiles, num_chunks)


@functools.lru_cache(maxsize=4096)
def _plan_to_quantize(sides: _SideForms, num_tokens: int, codes: str) -> _Plan:
    numbers: dict[str, int] = {}
    constexprs: dict[str, Any] = {"CODES": codes}
    for name, side in zip(_SIDES, sides, strict=True):
        dim, of_tokens, of_pages = side.tokens.shape[2], vector_bytes(side.tokens), vector_bytes(side.pages)
        vector = of_tokens // side.tokens.element_size
        numbers |= side.strides(name, of_tokens, of_pages)
        constexprs |= _of_side(name, ROW=dim, WIDTH=dim, VECTOR=vector, PAGES_VECTOR=of_pages)
    tiles = [rows_a_program(side.tokens.shape[2]) for side in sides]
    tile = Tile(min(of["BLOCK_ROWS"] for of in tiles), tuple(of["BLOCK_DIM"] for of in tiles))
    num_heads = sides[0].tokens.shape[1]  # each a chunk
    return _plan(sides, num_tokens, 1, numbers, constexprs, [tile] * 2, [[num_heads] * 2] * 2)


def _plan(
    sides: _SideForms,
    num_tokens: int,
    num_bytes: int,
    numbers: dict[str, int],
    constexprs: dict[str, Any],
    tiles: Sequence[Tile],
    num_chunks: Sequence[Sequence[int]],
) -> _Plan:
    """With the tile of the first and of the second launch, and in how many chunks each cuts keys and values."""
    num_pages, page_size = sides[0].pages.shape[:2]
    num_claims = shared_slots.num_claims(num_pages * page_size)
    numbers |= {"num_tokens": num_tokens, "num_slots": num_pages * page_size, "claims_mask": num_claims - 1}
    ways = ("look ahead",) if shared_slots.looks_ahead(num_tokens) else ("claim", "set right")
    steps = []
    for way, tile, chunks in zip(ways, tiles, num_chunks, strict=False):
        of_step: dict[str, Any] = {"SHARED_SLOTS": way, "PAGE_SIZE": page_size, "BLOCK_ROWS": tile.rows}
        # Half as many where shared slots are set right: with more, that kernel spills registers on sm_100.
        compared = _COMPARED // 2 if way == "set right" else _COMPARED
        of_step["SCAN"] = max(32, min(256, compared // tile.rows))
        for name, block, number in zip(_SIDES, tile.vectors, chunks, strict=True):
            of_step |= _of_side(name, BLOCK=block, CHUNKS=number)
        num_programs = -(-num_tokens // tile.rows) * (1 if way == "set right" else sum(chunks))
        if sum(chunks):
            steps.append(_Step(num_programs, constexprs | of_step))
    return _Plan(num_bytes, num_claims, numbers, steps)


def _of_side(name: str, **numbers: int) -> dict[str, int]:
    return {f"{name.upper()}_{of}": number for of, number in numbers.items()}


def compile_variants() -> list[Variant]:
    """Vectors of each width, one run of heads and several, each way with shared slots, each kind of codes."""
    bf16, f32, int8, e4m3 = torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn
    variants = []
    for num_tokens, num_heads, dims, dtype, to, heads_first, has_e4m3 in (
        (256, 8, (128, 128), bf16, None, False, False),
        (16384, 8, (128, 128), bf16, None, False, False),
        (16384, 8, (128, 128), bf16, None, True, False),
        (16384, 1, (512, 64), bf16, None, False, False),
        (256, 2, (80, 14), f32, None, True, False),
        (256, 2, (80, 13), f32, None, False, False),
        (256, 2, (81, 13), bf16, None, True, False),
        (256, 1, (33, 0), int8, None, False, False),
        (256, 8, (128, 128), bf16, e4m3, False, False),
        (16384, 8, (128, 128), bf16, e4m3, False, True),
        (16384, 8, (192, 128), f32, e4m3, True, False),
        (256, 8, (128, 128), bf16, int8, True, False),
        (16384, 8, (64, 80), bf16, int8, False, False),
    ):
        slots = torch.empty(num_tokens, dtype=torch.int64, device="meta")
        sides = []
        for dim in dims:
            tokens = torch.empty(num_tokens, num_heads, dim, dtype=dtype, device="meta")
            pages = tokens.new_empty(1024, 16, num_heads, dim, dtype=to or dtype)
            if heads_first:
                pages = tokens.new_empty(1024, num_heads, 16, dim, dtype=to or dtype).transpose(1, 2)
            scales = None if to is None else slots.new_empty(1024, num_heads, 16, dtype=torch.float32)
            sides.append(_Side(tokens, pages, scales))
        left_out = {"cuda:80": "it has no float8_e4m3fn", "hip:gfx942": "its codes are made as for sm_80"}
        words = [f"T{num_tokens}", f"H{num_heads}", *map(str, dims), str(dtype)[6:], str(to)[6:] if to else "moved"]
        words += ["HND" if heads_first else "NHD", *(["native"] if has_e4m3 else [])]
        launches = _launches(sides, slots, num_multiprocessors=132, has_e4m3=has_e4m3)
        for number, launch in enumerate(launches, start=1):
            variant = launch.variant("-".join([*words, f"launch{number}"]))
            variants.append(variant._replace(left_out=left_out if has_e4m3 else {}))
    return variants
