"""mla_attention on the Triton back end: what the conformance cases do not reach, as the tiles of each target."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pagedkv
from pagedkv.kernels.attention_plan import DeviceWork
from pagedkv.kernels.merge_states import AttentionState
from pagedkv.kernels.triton import mla_attention
from pagedkv.kernels.triton.attention_work import work_of
from pagedkv.kernels.triton.runtime import IS_INTERPRETED, target_of
from pagedkv.testing.conformance.judge import placed
from pagedkv.testing.mla_batch import mla_batch
from pagedkv.testing.mla_numeric import assert_mla_close, mla_oracle

DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Interpreted, the tiles of any GPU can run; on a GPU its own.
TARGETS = [*mla_attention._TILES] if IS_INTERPRETED else [mla_attention._tiles_of(target_of(DEVICE))]
# One that loads latents row by row, and one that does column by column.
BOTH_ORDERS = ["cuda:90", "hip:gfx942"] if IS_INTERPRETED else TARGETS


def run(batch, **changes):
    there = placed({**batch.arguments(), **changes}, DEVICE)
    return AttentionState(*(part.cpu() for part in dataclasses.replace(batch, **there).run(backend="triton")))


def assert_close(batch, **changes):
    assert_mla_close(run(batch, **changes), **batch.arguments())


def take_tiles_of(target, monkeypatch):
    monkeypatch.setattr(mla_attention, "target_of", lambda device: target)


# New and all tokens of each sequence, and the settings of `mla_batch`.
BATCHES = {
    "H64-one-page-for-all-keys": ([1, 2], [70, 20], {"num_heads": 64, "dtype": BF16, "page_size": 64}),
    "H64-window-of-whole-blocks": (
        [1, 2],
        [300, 193],
        {"num_heads": 64, "dtype": BF16, "page_size": 64, "window_left": 70},
    ),
    "H64-whole-blocks-not-causal": ([2], [192], {"num_heads": 64, "dtype": F16, "page_size": 16, "causal": False}),
    "H64-R0": ([1], [130], {"num_heads": 64, "dtype": BF16, "page_size": 64, "rope_dim": 0}),
    "H64-window-P3": ([1, 2], [70, 20], {"num_heads": 64, "dtype": F16, "page_size": 3, "window_left": 9}),
    "H32-joined": ([3], [40], {"num_heads": 32, "dtype": BF16, "form": "joined"}),
    "H16-R0": ([1, 5], [70, 20], {"num_heads": 16, "dtype": BF16, "rope_dim": 0}),
    "H5-some-rows-of-several-tokens": ([1, 9, 2], [40, 33, 1], {"num_heads": 5, "dtype": F16, "window_left": 5}),
    "H48-not-causal": ([2], [35], {"num_heads": 48, "dtype": BF16, "causal": False}),
    "f32-two-programs-of-columns": ([2], [35], {"latent_dim": 200, "rope_dim": 72}),
    "bf16-wider-than-512": ([1], [20], {"latent_dim": 520, "rope_dim": 8, "num_heads": 2, "dtype": BF16}),
    "bf16-rope-wider-than-64": ([1, 4], [20, 18], {"rope_dim": 100, "num_heads": 16, "dtype": BF16}),
    "f16-pages-of-f32-query": ([1, 4], [20, 18], {"dtype": F16, "query_dtype": F32}),
    "bf16-query-of-f16-pages": ([1, 4], [20, 18], {"dtype": F16, "query_dtype": BF16}),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", BATCHES)
def test_the_tiles_of_each_target_are_as_exact_as_torch(name, target, monkeypatch):
    take_tiles_of(target, monkeypatch)
    q_lens, kv_lens, settings = BATCHES[name]
    assert_close(mla_batch(q_lens, kv_lens, **settings))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("num_heads, dtype", [(16, BF16), (3, BF16), (3, F32)])
def test_a_mask_hides_a_key_that_is_not_finite(num_heads, dtype, target, monkeypatch):
    take_tiles_of(target, monkeypatch)
    mask = torch.rand(6, 40) < 0.7
    mask[:, 0], mask[:, 10], mask[2, 10] = True, False, True
    batch = mla_batch([6], [40], num_heads=num_heads, dtype=dtype, custom_mask=mask.flatten(), page_size=1)
    expected = mla_oracle(**batch.arguments(), arithmetic=F32)
    batch.latent_pages[int(batch.table.indices[10]), 0, 7] = math.nan
    state = run(batch)
    assert state.out[2].isnan().all()
    assert state.lse[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(state.out[others].float(), expected.out[others], atol=0.02, rtol=0.02)
    torch.testing.assert_close(state.lse[others], expected.lse[others])


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("mark", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["latent_pages", "rope_pages"])
def test_what_is_not_finite_shows_in_the_rows_that_see_it_alone(part, mark, dtype):
    batch = mla_batch([20], [30], dtype=dtype, window_left=4, page_size=1)
    clean = run(batch)
    getattr(batch, part)[int(batch.table.indices[17]), 0, 3] = mark
    state = run(batch)
    # Rows stand at 10 .. 29: those from 17 to 21 see it.
    sees = torch.zeros(20, dtype=torch.bool)
    sees[7:12] = True
    assert torch.equal(state.out[~sees], clean.out[~sees]) or dtype == BF16
    assert state.out[~sees].isfinite().all()
    assert state.lse[~sees].isfinite().all()
    expected = mla_oracle(**batch.arguments(), arithmetic=F32)
    assert not state.out[sees & ~expected.out.isfinite().all(-1).all(-1)].isfinite().all()
    if math.isnan(mark) or part == "latent_pages":
        assert not state.out[sees].isfinite().all(-1).any()


def assert_as_reference(batch):
    """Both NaN at the same places, and elsewhere within some roundings."""
    state, expected = run(batch), batch.run(backend="reference")
    for part, of_reference in zip(state, expected, strict=True):
        torch.testing.assert_close(part.isnan(), of_reference.isnan())
        torch.testing.assert_close(part, of_reference, equal_nan=True, rtol=0.02, atol=0.02)
    return state


# Heads, dtype and width by which the kernel goes its ways: rows of one token, rows of several, float32, and float32
# with two programs of columns.
WAYS = {"one-token": (16, BF16, 64), "some-tokens": (3, F16, 64), "f32": (3, F32, 64), "f32-parts": (3, F32, 200)}


@pytest.mark.parametrize("target", BOTH_ORDERS)
@pytest.mark.parametrize("way", WAYS)
def test_an_infinite_latent_that_pushes_its_logit_down_shows_in_its_column_alone(way, target, monkeypatch):
    """Its weight is 0: what is left of it is 0 * inf."""
    take_tiles_of(target, monkeypatch)
    num_heads, dtype, width = WAYS[way]
    batch = mla_batch([4, 1], [40, 9], num_heads=num_heads, dtype=dtype, latent_dim=width, page_size=1)
    batch.q_latent.abs_().add_(0.1)
    batch.latent_pages[int(batch.table.indices[37]), 0, width - 2] = -math.inf
    state = assert_as_reference(batch)
    # Rows stand at 36 .. 39 of the first sequence: those from 37 on see it.
    wrong = torch.zeros(5, num_heads, width, dtype=torch.bool)
    wrong[1:4, :, width - 2] = True
    assert torch.equal(state.out.isnan(), wrong)
    assert state.lse.isfinite().all()


@pytest.mark.parametrize("target", BOTH_ORDERS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mark", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"window_left": 9}, {"causal": False}, {"masked": True}], ids=str)
def test_what_is_not_finite_gets_as_far_as_in_the_reference(options, mark, way, target, monkeypatch):
    take_tiles_of(target, monkeypatch)
    num_heads, dtype, width = WAYS[way]
    mask = torch.rand(5 * 40 + 2 * 9) < 0.5 if options.get("masked") else None
    options = {name: value for name, value in options.items() if name != "masked"}
    batch = mla_batch(
        [5, 2],
        [40, 9],
        num_heads=num_heads,
        dtype=dtype,
        latent_dim=width,
        page_size=1,
        custom_mask=mask,
        **options,
    )
    of_first = batch.table.indices[:40].long()
    batch.latent_pages[of_first[37], 0, 3] = mark
    batch.latent_pages[of_first[30], 0, width - 1] = -mark
    batch.rope_pages[of_first[39], 0, 1] = mark
    batch.q_latent[6, 1, 5] = mark
    batch.q_rope[0, 2, 0] = mark
    assert_as_reference(batch)


def test_queries_that_are_not_finite_leave_finite_latents_alone():
    """All rows of a tile have infinite logits, but no latent is at fault: weights of 0 and latents give 0."""
    batch = mla_batch([1], [20], num_heads=16, rope_dim=0)
    batch.q_latent.zero_()[..., 0] = -math.inf
    batch.latent_pages[..., 0] = batch.latent_pages[..., 0].abs().add_(1)
    state = assert_as_reference(batch)
    assert not state.out.any()
    assert torch.equal(state.lse, torch.full((1, 16), -math.inf))


def test_an_infinite_rope_key_that_pushes_its_logit_down_is_not_seen():
    batch = mla_batch([1], [5], num_heads=1, page_size=1)
    batch.q_rope.abs_()
    batch.rope_pages[int(batch.table.indices[2]), 0, 3] = -math.inf
    state, expected = run(batch), mla_oracle(**batch.arguments())
    torch.testing.assert_close(state.out.double(), expected.out)
    torch.testing.assert_close(state.lse.double(), expected.lse)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_one_key_gives_its_latent_and_its_logit(dtype, target, monkeypatch):
    take_tiles_of(target, monkeypatch)
    batch = mla_batch([1] * 3, [1] * 3, num_heads=16, dtype=dtype, sm_scale=1.0)
    batch.q_latent.zero_()[..., 0], batch.q_rope[:] = 1, 0
    state = run(batch)
    latent = batch.latent_pages[batch.table.indices.long(), 0]
    assert torch.equal(state.out, latent[:, None].expand(-1, 16, -1))
    assert torch.equal(state.lse, latent[:, :1].float().expand(-1, 16))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_chunks_are_merged_where_one_has_seen_nothing(dtype):
    mask = torch.rand(2, 1100) < 0.9
    mask[0, 256:512], mask[1, :1024] = False, False
    batch = mla_batch([2], [1100], num_heads=16, dtype=dtype, causal=False, custom_mask=mask.flatten())
    plan = placed({"plan": batch.plan}, DEVICE)["plan"]
    assert work_of(plan).num_partial_rows == 2 * 16 * 5 or not IS_INTERPRETED
    assert_close(batch)


def test_nan_of_one_chunk_shows_after_the_merge():
    batch = mla_batch([1, 1], [600, 600], num_heads=16, dtype=BF16, page_size=1)
    batch.latent_pages[int(batch.table.indices[300]), 0, 0] = math.nan
    state = run(batch)
    assert state.out[0].isnan().all()
    assert state.lse[0].isnan().all()
    assert state.out[1].isfinite().all()


def test_items_and_merges_that_are_none_do_nothing():
    """As in buffers of fixed size, where a captured graph finds the next plan."""
    batch = mla_batch([1, 2], [600, 40], num_heads=16, dtype=BF16)
    plan = placed({"plan": batch.plan}, DEVICE)["plan"]
    work = work_of(plan)
    no_item = torch.full((3, 5), -1, dtype=torch.int32, device=DEVICE)
    items = [torch.cat([part, no_item]) for part in work[:3]]
    padded = DeviceWork(*items, torch.cat([work.merges, no_item.new_zeros(3, 5)]), work.num_partial_rows + 7)
    there = placed({name: t for name, t in batch.arguments().items() if name != "plan"}, DEVICE)
    padded_plan = dataclasses.replace(plan, device_work=padded)
    for out, expected in zip(
        pagedkv.mla_attention(**there, plan=padded_plan, return_lse=True, backend="triton"), run(batch), strict=True
    ):
        assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("num_heads, dtype", [(16, BF16), (3, BF16), (3, F32)])
def test_the_widest_window_of_negative_positions_sees_all(num_heads, dtype):
    """The start of the window is below what 32 bits hold."""
    settings = {"num_heads": num_heads, "dtype": dtype, "window_left": 2**31 - 1, "causal": False}
    assert_close(mla_batch([7, 1], [3, 20], **settings))


def test_out_counts_as_written():
    batch = mla_batch([1, 4], [20, 18])
    out = torch.empty(5, 3, 64, device=DEVICE)
    version = out._version
    pagedkv.mla_attention(**placed(batch.arguments(), DEVICE), out=out, backend="triton")
    assert out._version > version


@pytest.mark.parametrize("target", [target for target in mla_attention._TILES if target != "interpreted"])
@pytest.mark.parametrize("num_heads", [1, 8, 16, 20, 32, 48, 64, 128])
@pytest.mark.parametrize("height", [16, 64, 128])
@pytest.mark.parametrize("has_mask", [False, True])
def test_the_tiles_of_an_item_cover_its_rows(height, num_heads, target, has_mask):
    constants, launch, num_programs = mla_attention._specialised(
        target, height, num_heads, 512, 64, 16, True, False, has_mask, True
    )
    assert constants["BLOCK_ROWS"] * constants["TILES_PER_ITEM"] == height
    assert num_programs == constants["TILES_PER_ITEM"]
    assert constants["ONE_TOKEN"] == (num_heads % constants["BLOCK_ROWS"] == 0)
    assert not constants["EDGES_APART"] or (constants["ONE_TOKEN"] and not has_mask)
    # A chunk of keys starts at a multiple of 256.
    assert 256 % constants["BLOCK_KEYS"] == 256 % constants["CARE_KEYS"] == 0
    assert set(launch) == {"num_warps", "num_stages"}


def test_every_case_is_compiled_for_every_target():
    """Variants of the same name would replace each other."""
    variants = mla_attention.compile_variants()
    targets = mla_attention._TILES.keys() - {"interpreted"}
    num_cases = {target: sum(target not in variant.left_out for variant in variants) for target in targets}
    assert set(num_cases.values()) == {12}, num_cases


READ_COMPILED = """
import json, re
from pagedkv.kernels.triton import mla_attention
from pagedkv.testing.triton_compile_worker import _compile

found = []
for target in ("cuda:80", "cuda:90"):
    for variant in mla_attention.compile_variants():
        if variant.constexprs["KEYS_FIRST"] and target not in variant.left_out:
            text = _compile(variant, target).asm["ptx"]
            products = re.findall(r"wgmma[.]mma_async.*m64n([0-9]+)k16", text)
            num_copies = len(re.findall(r"cp[.]async[.]cg[.]shared[.]global", text))
            rows, keys = variant.constexprs["BLOCK_ROWS"], variant.constexprs["BLOCK_KEYS"]
            found.append([target, rows, keys, products, num_copies])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled():
    """Target, rows, keys, widths of the products on the tensor cores of sm_90, and copies to shared memory."""
    cache = str(Path(__file__).resolve().parents[3] / "build" / "triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": cache, "TRITON_HOME": cache, "PAGEDKV_NATIVE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", READ_COMPILED], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_the_tensor_cores_of_sm_90_compute_no_logit_twice(compiled):
    """512 + 64 columns, 16 at a time: 36 products of half of the keys for each group of 4 warps, and no more."""
    of = [(keys, products) for target, rows, keys, products, _ in compiled if (target, rows) == ("cuda:90", 64)]
    assert sorted(keys for keys, _ in of) == [32, 64, 64]
    for keys, products in of:
        assert {width: products.count(width) for width in products} == {str(keys // 2): 36, "256": keys // 16}


def test_latents_are_copied_to_shared_memory_beside_the_products(compiled):
    """Each thread copies at least 8 times 16 bytes of a block; where Triton loads latents itself, ropes only."""
    assert all(num_copies >= 8 for *_, num_copies in compiled), compiled
