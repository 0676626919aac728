"""mla_attention on a GPU: one launch for each height of tiles that the batch has, and one that merges cut tiles."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton

from ..attention_options import AttentionOptions
from ..attention_plan import AttentionPlan
from ..pages import mark_written
from .attention_merge_kernel import merge_partials, new_partials
from .attention_work import tile_heights, work_of
from .mla_attention_kernel import attend_latents
from .runtime import on_device, target_of
from .variant import Variant

__all__ = ["Tile", "compile_variants", "mla_attention"]


class Tile(NamedTuple):
    """Rows and keys of one step of a program.

    whole_pages: only for pages of a multiple of `keys` tokens. edges_apart: EDGES_APART of the kernel, where it can be.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int = 2
    whole_pages: bool = False
    edges_apart: bool = False


# By target, for 16 bits. First for rows that are heads of one token: the first tile whose rows divide the heads. Then
# for any rows. 512 + 64 columns: the result of a tile of 64 rows takes half of the registers of 8 warps. Two blocks of
# 64 keys, the queries and the weights just fit into the shared memory of sm_90; the page ids of 64 keys are too many
# registers. Where registers (sm_80) or the 64 KiB of shared memory (gfx942) are too few for 64 rows, several programs
# share an item. Triton halves the stages where page ids are copied ahead, too: with 5 one block of latents more is on
# its way, for which GPUs that take the tiles of sm_80 have too little shared memory; whole pages on sm_90 rather leave
# the registers for a second program.
_TILES: dict[str, tuple[tuple[Tile, ...], Tile]] = {
    "cuda:80": ((Tile(32, 32, 8), Tile(16, 32, 8)), Tile(16, 32, 8)),
    "cuda:90": (
        (
            Tile(64, 64, 8, 2, whole_pages=True, edges_apart=True),
            Tile(64, 32, 8, 5, edges_apart=True),
            Tile(32, 32, 8, 2, whole_pages=True),
            Tile(32, 32, 8, 5),
            Tile(16, 32, 8, 5),
        ),
        Tile(16, 32, 8, 5),
    ),
    "cuda:100": ((Tile(64, 32, 8), Tile(32, 32, 8, 5), Tile(16, 32, 8, 5)), Tile(16, 32, 8, 5)),
    "hip:gfx942": ((Tile(32, 16, 8), Tile(16, 16, 8)), Tile(16, 16, 8)),
    # A program costs by its steps, not by their size.
    "interpreted": ((Tile(64, 64, 1), Tile(16, 64, 1)), Tile(64, 64, 1)),
}
# For float32, and for what is wider than 512 + 64: blocks of columns one after the other, and of the result several
# programs compute some columns each.
_CARE, _CARE_INTERPRETED = Tile(16, 16, 4, num_stages=1), Tile(64, 128, 1)
_CARE_COLUMNS, _CARE_VALUES = 64, 128


def mla_attention(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor | None,
    latent_pages: torch.Tensor,
    rope_pages: torch.Tensor | None,
    plan: AttentionPlan,
    options: AttentionOptions,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Fills out and lse; everything is checked; q_rope and rope_pages are None when R is 0."""
    if not q_latent.numel():
        return
    work = work_of(plan)
    partials = new_partials(work, 1, plan.value_dim)
    mask = None if plan.custom_mask is None else plan.custom_mask.view(torch.uint8)
    arguments = (
        *(q_latent, q_rope, latent_pages, rope_pages),
        *(plan.query_indptr, plan.page_indptr, plan.page_indices, plan.seq_lens, mask, plan.mask_indptr),
    )
    results = (out, lse, *((None, None) if partials is None else partials))
    numbers = (
        *(options.sm_scale, plan.window_left, q_latent.shape[0], plan.num_q_heads),
        *(stride for rows in (q_latent, q_rope, latent_pages, rope_pages) for stride in _strides(rows)),
    )
    target = _tiles_of(target_of(q_latent.device))
    is_16_bit = q_latent.dtype == latent_pages.dtype == out.dtype != torch.float32
    with on_device(q_latent):
        for items, height in zip(work[:3], tile_heights(plan.head_dim), strict=True):
            if not items.shape[0]:
                continue
            constants, launch, programs_per_item = _specialised(
                target,
                height,
                plan.num_q_heads,
                plan.value_dim,
                plan.head_dim - plan.value_dim,
                plan.page_size,
                plan.causal,
                plan.window_left >= 0,
                mask is not None,
                is_16_bit,
            )
            grid = (items.shape[0] * programs_per_item,)
            attend_latents[grid](*arguments, items, *results, *numbers, **constants, **launch)
        if partials is not None:
            merge_partials(partials, work.merges, out, lse, group=plan.num_q_heads)
    mark_written(out)


def _strides(rows: torch.Tensor | None) -> Sequence[int]:
    return (0, 0) if rows is None else rows.stride()[:2]


def _tiles_of(target: str) -> str:
    """The target whose tiles fit this one."""
    if target in _TILES:
        return target
    if target.startswith("hip"):
        return "hip:gfx942"
    # 12.0 and later 12 are GPUs without the tensor memory of 10, and with little shared memory.
    return "cuda:100" if target.startswith("cuda:10") else "cuda:80"


@functools.lru_cache(maxsize=1024)
def _specialised(
    target: str,
    height: int,
    num_heads: int,
    latent_dim: int,
    rope_dim: int,
    page_size: int,
    causal: bool,
    has_window: bool,
    has_mask: bool,
    is_16_bit: bool,
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Constants of the kernel, warps and stages, and how many programs compute an item of `height` rows."""
    latents, ropes = (max(triton.next_power_of_2(dim), 16) for dim in (latent_dim, max(rope_dim, 1)))
    with_care = not is_16_bit or latents > 512 or ropes > 64
    care = _CARE_INTERPRETED if target == "interpreted" else _CARE
    # Reading a mask takes the registers that a tile of 64 rows leaves.
    tile = care if with_care else _tile(target, min(height, 32) if has_mask else height, num_heads, page_size)
    rows = min(tile.rows, height)
    is_one_token = not with_care and num_heads % rows == 0
    tiles_per_item = triton.cdiv(height, rows)
    values = latents if target == "interpreted" or not with_care else min(latents, _CARE_VALUES)
    constants = {
        "PAGE_SIZE": page_size,
        "LATENT_DIM": latent_dim,
        "ROPE_DIM": rope_dim,
        "CAUSAL": causal,
        "HAS_WINDOW": has_window,
        "ONE_TOKEN": is_one_token,
        "EDGES_APART": is_one_token and tile.edges_apart and not has_mask,
        # On NVIDIA Triton copies latents to shared memory ahead of time only so, for tiles below 64 rows. What a mask
        # decides about is not copied ahead, and would take more shared memory. On AMD, values would be read from shared
        # memory two bytes at a time.
        "KEYS_FIRST": not (with_care or target.startswith("hip") or (is_one_token and has_mask)),
        "WITH_CARE": with_care,
        "IN_FLOAT32": not is_16_bit,
        "TILES_PER_ITEM": tiles_per_item,
        "BLOCK_ROWS": rows,
        "BLOCK_KEYS": tile.keys,
        "BLOCK_LATENT": latents,
        "BLOCK_ROPE": ropes,
        "BLOCK_VALUES": values,
        "CARE_KEYS": care.keys,
        "CARE_COLUMNS": latents if target == "interpreted" else min(latents, _CARE_COLUMNS),
    }
    launch = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return constants, launch, tiles_per_item * triton.cdiv(latent_dim, values)


def _tile(target: str, most_rows: int, num_heads: int, page_size: int) -> Tile:
    tiles, any_rows = _TILES[target]
    for tile in tiles:
        fits = most_rows % tile.rows == num_heads % tile.rows == 0
        if fits and (page_size % tile.keys == 0 or not tile.whole_pages):
            return tile
    return any_rows


def compile_variants() -> list[Variant]:
    """Each tile of each target; between them every dtype and every option."""
    # Heads, page size, rope width, dtypes of queries and pages, window instead of causality, what is absent.
    cases: list[tuple[int, int, int, str, str, bool, tuple[str, ...]]] = [
        (128, 64, 64, "bf16", "bf16", False, ("Mask", "Mask_indptr")),
        (128, 64, 64, "fp16", "fp16", True, ("Lse",)),
        (128, 64, 64, "fp16", "fp16", True, ("Mask", "Mask_indptr", "Lse")),
        (128, 16, 64, "bf16", "bf16", False, ("Mask", "Mask_indptr")),
        (128, 16, 64, "bf16", "bf16", True, ()),
        (32, 16, 64, "bf16", "bf16", False, ("Mask", "Mask_indptr", "Sums", "Stats")),
        (16, 1, 0, "fp16", "fp16", False, ("Q_rope", "Rope_pages", "Mask", "Mask_indptr")),
        (16, 64, 64, "bf16", "bf16", True, ("Mask", "Mask_indptr")),
        (5, 16, 64, "bf16", "bf16", True, ()),
        (128, 64, 128, "bf16", "bf16", False, ("Mask", "Mask_indptr")),
        (16, 16, 64, "fp32", "fp32", True, ()),
        (128, 64, 64, "fp32", "bf16", False, ("Mask", "Mask_indptr", "Lse")),
    ]
    return [variant for case in cases for variant in _variants(*case)]


def _variants(
    num_heads: int, page_size: int, rope_dim: int, query: str, pages: str, has_window: bool, absent: tuple[str, ...]
) -> list[Variant]:
    """One call as each target computes it."""
    targets = [target for target in _TILES if target != "interpreted"]
    visible = not has_window, has_window, "Mask" not in absent
    shape = 64, num_heads, 512, rope_dim, page_size, *visible, query == pages != "fp32"
    specialised = {target: _specialised(target, *shape)[:2] for target in targets}
    types = {name: kind for name, kind in _signature(query, pages).items() if name not in absent}
    variants = {}
    for constants, launch in specialised.values():
        tile = f"{constants['BLOCK_ROWS']}x{constants['BLOCK_KEYS']}x{launch['num_stages']}"
        options = ("-window" if has_window else "") + ("" if "Mask" in absent else "-mask")
        name = f"mla-{query}-{pages}-H{num_heads}-P{page_size}-R{rope_dim}-{tile}{options}"
        variants[name] = Variant(
            name,
            attend_latents,
            types,
            {**dict.fromkeys(absent), **constants},
            frozenset(name for name, kind in types.items() if kind.startswith("*") or name.startswith("stride")),
            **launch,
            left_out={
                target: "it takes another tile" for target, other in specialised.items() if other != (constants, launch)
            },
        )
    return list(variants.values())


def _signature(query: str, pages: str) -> dict[str, str]:
    """Pointers start with a capital letter, constants are all capitals."""
    names = [name for name in attend_latents.arg_names if not name.isupper()]
    types = {name: "*i32" if name[0].isupper() else "i32" for name in names}
    types |= dict.fromkeys(("Q_latent", "Q_rope", "Out"), f"*{query}")
    types |= dict.fromkeys(("Latent_pages", "Rope_pages"), f"*{pages}")
    types |= dict.fromkeys(("Lse", "Sums", "Stats"), "*fp32")
    return types | {"Mask": "*u8", "Mask_indptr": "*i64", "sm_scale": "fp32"}
