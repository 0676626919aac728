"""gather_kv: bitwise what a Python loop reads."""

import pytest
import torch

import pagedkv
from pagedkv.testing.bits import same_bits, storage_bytes
from pagedkv.testing.page_views import PAGE_FORMS, kv_page_views

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CODES = [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]
# P, Hk, D, Dv
GEOMETRIES = [(1, 1, 1, 1), (3, 3, 7, 5), (16, 2, 64, 64), (16, 3, 32, 7)]


def filled(form, layout, **shape):
    """Pages with random content, NaN in the gaps around them."""
    pages = kv_page_views(form, layout, **shape)
    for view in pages:
        view.copy_(torch.randn(view.shape) * (20 if view.dtype == torch.int8 else 1))
    return pages


def naive_gather(pages, slots, layout):
    in_slot_order = pages if layout == "NHD" else pages.transpose(1, 2)
    rows = []
    for slot in slots.tolist():
        page, offset = divmod(slot, in_slot_order.shape[1])
        rows.append(in_slot_order[page, offset] if slot >= 0 else torch.zeros_like(in_slot_order[0, 0]))
    return torch.stack(rows)


@pytest.mark.parametrize("form", PAGE_FORMS)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", DTYPES + CODES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_gather_kv_reads_what_a_loop_reads(geometry, dtype, layout, form, any_backend):
    page_size, heads, dim, value_dim = geometry
    shape = {"page_size": page_size, "num_kv_heads": heads, "head_dim": dim, "value_dim": value_dim, "dtype": dtype}
    pages = filled(form, layout, num_pages=6, **shape)
    before = storage_bytes(*pages)
    slots = torch.randint(0, 6 * page_size, (33,))  # with repetitions
    slots[torch.randperm(33)[:3]] = torch.tensor([-1, -7, -(2**62)])
    for read, view in zip(pagedkv.gather_kv(*pages, slots, layout=layout, backend=any_backend), pages, strict=True):
        assert same_bits(read, naive_gather(view, slots, layout))
        assert read.is_contiguous()
    assert torch.equal(storage_bytes(*pages), before)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dim", [128, 36], ids=["whole lines", "odd rows"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_gather_kv_of_many_bytes_with_any_number_of_threads(layout, dim, num_threads, any_backend):
    # Above the size from which the native core writes past the caches.
    torch.set_num_threads(num_threads)
    num_tokens = 4 * 2**20 // (dim * 4 * 4 * 2) + 5
    pages = filled("interleaved", layout, num_pages=40, page_size=16, num_kv_heads=4, head_dim=dim)
    slots = torch.randint(-1, 40 * 16, (num_tokens,))
    for read, view in zip(pagedkv.gather_kv(*pages, slots, layout=layout, backend=any_backend), pages, strict=True):
        in_slot_order = view if layout == "NHD" else view.transpose(1, 2)
        expected = in_slot_order[slots.clamp(min=0) // 16, slots.clamp(min=0) % 16]
        expected[slots < 0] = 0
        assert same_bits(read, expected)


def test_gather_kv_of_nothing_and_of_strided_slots(any_backend):
    pages = filled("separate", "NHD", num_pages=2, page_size=4, num_kv_heads=3, head_dim=8, value_dim=16)
    key, value = pagedkv.gather_kv(*pages, torch.zeros(0, dtype=torch.int64), backend=any_backend)
    assert key.shape == (0, 3, 8)
    assert value.shape == (0, 3, 16)
    slots = torch.tensor([[5, 99], [-2, 99], [0, 99]])[:, 0]
    key, _ = pagedkv.gather_kv(*pages, slots, backend=any_backend)
    assert same_bits(key, naive_gather(pages[0], slots, "NHD"))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_gather_kv_reads_scales_as_pages_of_one_element_a_head(layout, any_backend):
    pages = filled("sliced", layout, num_pages=3, page_size=4, num_kv_heads=2, head_dim=8, value_dim=6)
    codes = [torch.zeros_like(view, dtype=torch.int8) for view in pages]
    scales = torch.zeros(2, 3, 4, 2).transpose(2, 3)
    slots = torch.tensor([11, 0, 6])
    key, value = torch.randn(3, 2, 8), torch.randn(3, 2, 6)
    options = {"layout": layout, "backend": any_backend}
    pagedkv.store_kv(key, value, *codes, slots, key_scales=scales[0], value_scales=scales[1], **options)
    asked = torch.tensor([6, -1, 11])
    key_codes, value_codes = pagedkv.gather_kv(*codes, asked, **options)
    key_scale, value_scale = pagedkv.gather_kv(*scales[..., None], asked, layout="HND", backend=any_backend)
    for its_codes, its_scales, new in ((key_codes, key_scale, key), (value_codes, value_scale, value)):
        expected = pagedkv.quantize_kv(new, torch.int8)
        assert same_bits(its_codes[[0, 2]], expected.values[[2, 0]])
        assert same_bits(its_scales[[0, 2], :, 0], expected.scales[[2, 0]])
        assert int(its_codes[1].count_nonzero()) == int(its_scales[1].count_nonzero()) == 0


REFUSED = {
    "slot beyond the pool": (
        {"slots": torch.tensor([0, 8, 9])},
        ValueError,
        r"slots must be below 8 \(N \* P slots\), got 8 at entry 1\.",
    ),
    "slots int32": ({"slots": torch.zeros(2).int()}, TypeError, r"slots must have dtype int64, got int32\."),
    "slots of two dims": (
        {"slots": torch.zeros(2, 2).long()},
        ValueError,
        r"slots must have shape \[T\], got \[2, 2\]",
    ),
    "pages of two shapes": (
        {"value_pages": torch.zeros(2, 5, 1, 8)},
        ValueError,
        r"value_pages must have shape \[N, P, Hk, Dv\] with N = 2 \(set by key_pages\), P = 4 \(set by key_pages\)",
    ),
    "strided pages": (
        {"key_pages": torch.zeros(2, 4, 1, 16)[..., ::2]},
        ValueError,
        "key_pages must have a contiguous last dimension",
    ),
    "integer pages": (
        {"key_pages": torch.zeros(2, 4, 1, 8).int()},
        TypeError,
        "key_pages must have dtype float32 .* or int8 or float8_e4m3fn or float8_e5m2, got int32",
    ),
    "another device": (
        {"slots": torch.zeros(2, dtype=torch.int64, device="meta")},
        ValueError,
        "slots must be on cpu like key_pages, got meta",
    ),
    "pages with gradient": (
        {"value_pages": torch.zeros(2, 4, 1, 8, requires_grad=True)},
        ValueError,
        "value_pages must not require a gradient",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_gather_kv_refuses(case, any_backend):
    changed, error, message = REFUSED[case]
    good = {
        "key_pages": torch.zeros(2, 4, 1, 8),
        "value_pages": torch.zeros(2, 4, 1, 8),
        "slots": torch.tensor([0, 7]),
    }
    with pytest.raises(error, match=message):
        pagedkv.gather_kv(**{**good, **changed}, backend=any_backend)


def test_gather_kv_op_is_registered_and_compiles():
    pages = filled("page_first", "HND", num_pages=3, page_size=4, num_kv_heads=2, head_dim=8, value_dim=16)
    slots = torch.tensor([7, -1, 0])
    torch.library.opcheck(torch.ops.pagedkv.gather_kv.default, (*pages, slots, "HND", "auto"))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def doubled(key_pages, value_pages, slots):
        key, value = pagedkv.gather_kv(key_pages, value_pages, slots, layout="HND")
        return key * 2, value * 2

    for read, view in zip(doubled(*pages, slots), pages, strict=True):
        assert same_bits(read, naive_gather(view, slots, "HND") * 2)
