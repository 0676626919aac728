"""store_kv: bitwise what a Python loop writes, and nothing else."""

import mmap

import pytest
import torch

import pagedkv
from pagedkv.testing.bits import same_bits, storage_bytes
from pagedkv.testing.page_views import PAGE_FORMS, kv_page_views

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CODES = [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]
# P, Hk, D, Dv
GEOMETRIES = [(1, 1, 1, 1), (3, 3, 7, 5), (16, 2, 64, 64), (16, 3, 32, 7)]


SCALE_FORMS = {
    "contiguous": lambda num_pages, heads, page_size: torch.empty(num_pages, heads, page_size),
    "transposed": lambda num_pages, heads, page_size: torch.empty(num_pages, page_size, heads).transpose(1, 2),
    "gaps": lambda num_pages, heads, page_size: torch.empty(num_pages + 1, heads + 2, 2 * page_size)[1:, 1:-1, ::2],
}


def naive_quantizing_store(key, value, pages, scales, slots, layout):
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        for codes, its_scales, new in zip(pages, scales, (key, value), strict=True):
            in_slot_order = codes if layout == "NHD" else codes.transpose(1, 2)
            page, offset = divmod(slot, in_slot_order.shape[1])
            row = pagedkv.quantize_kv(new[token : token + 1], codes.dtype, backend="reference")
            in_slot_order[page, offset] = row.values[0]
            its_scales[page, :, offset] = row.scales[0]


def naive_store(key, value, key_pages, value_pages, slots, layout):
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        for pages, new in ((key_pages, key), (value_pages, value)):
            in_slot_order = pages if layout == "NHD" else pages.transpose(1, 2)
            page, offset = divmod(slot, in_slot_order.shape[1])
            in_slot_order[page, offset] = new[token]


def fused_qkv(num_tokens, heads, dim, value_dim, dtype):
    """Key and value as slices of one projection: token stride larger than a row, last dim contiguous."""
    fused = torch.randn(num_tokens, heads * (2 * dim + value_dim)).to(dtype)
    _, key, value = fused.split([heads * dim, heads * dim, heads * value_dim], dim=1)
    return key.view(num_tokens, heads, dim), value.view(num_tokens, heads, value_dim)


@pytest.mark.parametrize("form", PAGE_FORMS)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", DTYPES + CODES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_store_kv_writes_what_a_loop_writes_and_nothing_else(geometry, dtype, layout, form, any_backend):
    page_size, heads, dim, value_dim = geometry
    num_pages = 5 if page_size > 1 else 40
    shape = {"page_size": page_size, "num_kv_heads": heads, "head_dim": dim, "value_dim": value_dim, "dtype": dtype}
    pages = kv_page_views(form, layout, num_pages=num_pages, **shape)
    expected = kv_page_views(form, layout, num_pages=num_pages, **shape)
    slots = torch.randint(0, num_pages * page_size, (33,))  # with duplicates
    slots[torch.randperm(33)[:4]] = torch.tensor([-1, -7, -(2**62), -1])
    key, value = fused_qkv(33, heads, dim, value_dim, dtype)
    pagedkv.store_kv(key, value, *pages, slots, layout=layout, backend=any_backend)
    naive_store(key, value, *expected, slots, layout)
    assert torch.equal(storage_bytes(*pages), storage_bytes(*expected))


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_store_kv_of_duplicates_keeps_the_last_with_any_number_of_threads(num_threads, dtype, any_backend):
    torch.set_num_threads(num_threads)
    key, value = torch.randn(2, 900, 4, 64).to(dtype)
    slots = torch.randint(0, 60, (900,))
    pages = kv_page_views("separate", "NHD", num_pages=4, page_size=16, num_kv_heads=4, head_dim=64, dtype=dtype)
    expected = kv_page_views("separate", "NHD", num_pages=4, page_size=16, num_kv_heads=4, head_dim=64, dtype=dtype)
    pagedkv.store_kv(key, value, *pages, slots, backend=any_backend)
    naive_store(key, value, *expected, slots, "NHD")
    assert torch.equal(storage_bytes(*pages), storage_bytes(*expected))


@pytest.mark.parametrize("dim", [128, 36], ids=["whole lines", "odd rows"])
@pytest.mark.parametrize("form", ["separate", "sliced"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_store_kv_of_many_bytes_is_bitwise_too(layout, form, dim, any_backend):
    # Above the size from which the native core writes past the caches.
    num_tokens, heads = 4 * 2**20 // (dim * 4 * 4 * 2) + 5, 4
    shape = {"num_pages": num_tokens // 16 + 2, "page_size": 16, "num_kv_heads": heads, "head_dim": dim}
    pages, expected = (kv_page_views(form, layout, **shape) for _ in range(2))
    slots = torch.randperm(shape["num_pages"] * 16)[:num_tokens]
    key, value = torch.randn(2, num_tokens, heads, dim)
    pagedkv.store_kv(key, value, *pages, slots, layout=layout, backend=any_backend)
    for target, new in zip(expected, (key, value), strict=True):
        (target if layout == "NHD" else target.transpose(1, 2))[slots // 16, slots % 16] = new
    assert torch.equal(storage_bytes(*pages), storage_bytes(*expected))


@pytest.mark.parametrize("scale_form", SCALE_FORMS)
@pytest.mark.parametrize("form", PAGE_FORMS)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype, target", [(torch.float32, torch.int8), (torch.bfloat16, torch.float8_e4m3fn)], ids=str)
@pytest.mark.parametrize("geometry", [(3, 3, 7, 5), (16, 2, 64, 40)], ids=str)
def test_store_kv_quantizes_each_token_and_head_and_writes_nothing_else(
    geometry, dtype, target, layout, form, scale_form, any_backend
):
    page_size, heads, dim, value_dim = geometry
    shape = {"page_size": page_size, "num_kv_heads": heads, "head_dim": dim, "value_dim": value_dim, "dtype": target}
    pages, expected = (kv_page_views(form, layout, num_pages=5, **shape) for _ in range(2))
    scales, expected_scales = ([SCALE_FORMS[scale_form](5, heads, page_size) for _ in range(2)] for _ in range(2))
    slots = torch.randint(0, 5 * page_size, (17,))  # with duplicates
    slots[torch.randperm(17)[:3]] = torch.tensor([-1, -7, -(2**62)])
    key, value = fused_qkv(17, heads, dim, value_dim, dtype)
    value[3, 0, 2] = torch.nan
    value[5] = 0
    pagedkv.store_kv(
        key,
        value,
        *pages,
        slots,
        key_scales=scales[0],
        value_scales=scales[1],
        layout=layout,
        backend=any_backend,
    )
    naive_quantizing_store(key, value, expected, expected_scales, slots, layout)
    assert torch.equal(storage_bytes(*pages), storage_bytes(*expected))
    assert torch.equal(storage_bytes(*scales), storage_bytes(*expected_scales))


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dim", [128, 36], ids=["whole lines", "odd rows"])
def test_store_kv_quantizes_many_tokens_with_any_number_of_threads(dim, layout, num_threads, any_backend):
    # Above the size from which the native core writes past the caches, keys and values of two dtypes.
    torch.set_num_threads(num_threads)
    num_tokens = 4 * 2**20 // (4 * 2 * dim) + 5
    num_pages = num_tokens // 16 + 2
    shape = {"num_pages": num_pages, "page_size": 16, "num_kv_heads": 4, "head_dim": dim, "dtype": torch.int8}
    pages, scales = kv_page_views("separate", layout, **shape), torch.empty(2, num_pages, 4, 16)
    slots = torch.randperm(num_pages * 16)[:num_tokens]
    key, value = torch.randn(num_tokens, 4, dim).bfloat16(), torch.randn(num_tokens, 4, dim)
    options = {"key_scales": scales[0], "value_scales": scales[1], "layout": layout}
    pagedkv.store_kv(key, value, *pages, slots, **options, backend=any_backend)
    for codes, its_scales, new in zip(pages, scales, (key, value), strict=True):
        expected = pagedkv.quantize_kv(new, torch.int8, backend="reference")
        in_slot_order = codes if layout == "NHD" else codes.transpose(1, 2)
        assert same_bits(in_slot_order[slots // 16, slots % 16], expected.values)
        assert same_bits(its_scales[slots // 16, :, slots % 16], expected.scales)
    assert int(scales.isnan().sum()) == 2 * 4 * (num_pages * 16 - num_tokens), "no other scale was written"


def test_store_kv_quantizes_numbers_that_lie_in_the_scales_as_they_were(any_backend):
    memory = torch.randn(2, 8, 1, 4)
    before = memory.clone()
    pages = torch.zeros(2, 8, 1, 1, 4, dtype=torch.int8)
    scales = memory[0, :, 0, 0].view(8, 1, 1), memory[1, :, 0, 1].view(8, 1, 1)
    slots = torch.arange(8).flip(0)
    pagedkv.store_kv(*memory, *pages, slots, key_scales=scales[0], value_scales=scales[1], backend=any_backend)
    for codes, its_scales, numbers in zip(pages, scales, before, strict=True):
        expected = pagedkv.quantize_kv(numbers, torch.int8, backend="reference")
        assert same_bits(codes[slots, 0], expected.values)
        assert same_bits(its_scales[slots, 0], expected.scales)


def test_store_kv_moves_codes_and_their_scales_separately(any_backend):
    # What `quantize_kv` gave elsewhere: scales are pages of one element a head.
    codes, scales = pagedkv.quantize_kv(torch.randn(3, 2, 8), torch.float8_e4m3fn)
    pages, page_scales = torch.zeros(2, 4, 4, 2, 8).to(codes.dtype), torch.zeros(2, 4, 2, 4)
    slots = torch.tensor([5, -1, 2])
    pagedkv.store_kv(codes, codes, *pages, slots, backend=any_backend)
    new_scales = scales[..., None]
    pagedkv.store_kv(new_scales, new_scales, *page_scales[..., None], slots, layout="HND", backend=any_backend)
    for which in (0, 1):
        assert same_bits(pages[which, 1, 1], codes[0])
        assert same_bits(page_scales[which, 0, :, 2], scales[2])
        assert int(page_scales[which].count_nonzero()) == 4


def test_store_kv_then_gather_kv_gives_back_every_bit_of_nan_and_zero(any_backend):
    key = torch.tensor([0x7FC00001, 0x7F800001, -0x80000000, 1], dtype=torch.int64).to(torch.int32).view(torch.float32)
    key = key.view(1, 1, 4)
    pages = kv_page_views("separate", "NHD", num_pages=2, page_size=2, num_kv_heads=1, head_dim=4)
    slots = torch.tensor([3])
    pagedkv.store_kv(key, key, *pages, slots, backend=any_backend)
    for read in pagedkv.gather_kv(*pages, slots, backend=any_backend):
        assert same_bits(read, key)


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_store_kv_of_nothing_writes_nothing(num_tokens, any_backend):
    pages = kv_page_views("separate", "NHD", num_pages=2, page_size=4, num_kv_heads=2, head_dim=8)
    before = storage_bytes(*pages)
    tokens = torch.randn(num_tokens, 2, 8)
    pagedkv.store_kv(tokens, tokens, *pages, torch.full((num_tokens,), -1), backend=any_backend)
    assert torch.equal(storage_bytes(*pages), before)


def test_store_kv_with_a_strided_slot_mapping(any_backend):
    pages = kv_page_views("separate", "NHD", num_pages=2, page_size=4, num_kv_heads=1, head_dim=8)
    slots = torch.tensor([[5, 99], [0, 99], [-1, 99]])[:, 0]
    key = torch.randn(3, 1, 8)
    pagedkv.store_kv(key, key, *pages, slots, backend=any_backend)
    assert same_bits(pages[0][1, 1], key[0])
    assert same_bits(pages[0][0, 0], key[1])
    assert int(pages[0].isnan().all(dim=(2, 3)).sum()) == 6


def test_store_kv_of_keys_that_lie_in_the_pages_moves_them_as_they_were(any_backend):
    pages = torch.randn(2, 4, 1, 8)
    values = torch.randn(2, 4, 1, 8)
    old, old_values = pages.clone(), values.clone()
    # Slot s takes what slot s - 1 held: in the wrong order one key would fill the page.
    pagedkv.store_kv(pages[0, :3], values[0, :3], pages, values, torch.tensor([1, 2, 3]), backend=any_backend)
    assert same_bits(pages[0, 1:], old[0, :3])
    assert same_bits(values[0, 1:], old_values[0, :3])
    # Crosswise: keys out of the value pages and the other way round.
    pagedkv.store_kv(old_values[1, :2], old[1, :2], old, old_values, torch.tensor([4, 5]), backend=any_backend)
    assert same_bits(old[1, :2], values[1, :2])
    assert same_bits(old_values[1, :2], pages[1, :2])


def call(**changed):
    """Arguments of a good call, with some replaced."""
    key_pages, value_pages = kv_page_views(
        "separate", "NHD", num_pages=4, page_size=8, num_kv_heads=2, head_dim=16, value_dim=8
    )
    good = {
        "key": torch.randn(5, 2, 16),
        "value": torch.randn(5, 2, 8),
        "key_pages": key_pages,
        "value_pages": value_pages,
        "slot_mapping": torch.tensor([0, 9, -1, 31, 8]),
    }
    return {**good, **changed}


REFUSED = {
    "slot beyond the pool": (
        {"slot_mapping": torch.tensor([0, 1, 32, 3, 40])},
        ValueError,
        r"slot_mapping must be below 32 \(N \* P slots\), got 32 at entry 2\.",
    ),
    "slots int32": (
        {"slot_mapping": torch.zeros(5, dtype=torch.int32)},
        TypeError,
        r"slot_mapping must have dtype int64, got int32\.",
    ),
    "too few slots": (
        {"slot_mapping": torch.zeros(4, dtype=torch.int64)},
        ValueError,
        r"slot_mapping must have shape \[T\] with T = 5 \(set by key\), got \[4\]\.",
    ),
    "key of another dtype": (
        {"key": torch.zeros(5, 2, 16).half()},
        TypeError,
        "key must have dtype float32, got float16",
    ),
    "value of another dtype": (
        {"value": torch.zeros(5, 2, 8).bfloat16()},
        TypeError,
        "value must have dtype float32, got bfloat16",
    ),
    "heads differ": (
        {"key": torch.zeros(5, 3, 16)},
        ValueError,
        r"key must have shape \[T, Hk, D\] with Hk = 2 \(set by key_pages\), D = 16 .*, got \[5, 3, 16\]",
    ),
    "value as wide as key": ({"value": torch.zeros(5, 2, 16)}, ValueError, r"value must have shape \[T, Hk, Dv\]"),
    "strided key": (
        {"key": torch.zeros(5, 2, 32)[..., ::2]},
        ValueError,
        r"key must have a contiguous last dimension \(stride 1\), got stride 2",
    ),
    "strided value": (
        {"value": torch.zeros(5, 2, 32)[..., ::4]},
        ValueError,
        r"value must have a contiguous last dimension \(stride 1\), got stride 4",
    ),
    "strided pages": (
        {"value_pages": torch.zeros(4, 8, 2, 16)[..., ::2]},
        ValueError,
        r"value_pages must have a contiguous last dimension \(stride 1\), got stride 2",
    ),
    "integer pages": (
        {"key_pages": torch.zeros(4, 8, 2, 16, dtype=torch.int32)},
        TypeError,
        "key_pages must have dtype float32 or float16 or bfloat16 or int8 or float8_e4m3fn or float8_e5m2, got int32",
    ),
    "scales of float pages": (
        {"key_scales": torch.ones(4, 2, 8), "value_scales": torch.ones(4, 2, 8)},
        ValueError,
        r"key_scales and value_scales must be None for float32 pages, got tensors\.",
    ),
    "pages of two dtypes": (
        {"value_pages": torch.zeros(4, 8, 2, 8).half()},
        TypeError,
        "value_pages must have the dtype of key_pages, torch.float32, got torch.float16",
    ),
    "expanded pages": (
        {"key_pages": torch.zeros(1, 8, 2, 16).expand(4, 8, 2, 16)},
        ValueError,
        r"key_pages must not be expanded, got stride 0 in dim 0 of \[4, 8, 2, 16\]",
    ),
    "pages that lie over each other": (
        {"key_pages": torch.zeros(2000).as_strided((4, 8, 2, 16), (128, 16, 64, 1))},
        ValueError,
        r"key_pages must not overlap itself, got strides \[128, 16, 64, 1\] of \[4, 8, 2, 16\]",
    ),
    "pages of three dims": (
        {"key_pages": torch.zeros(32, 2, 16)},
        ValueError,
        r"key_pages must have shape \[N, P, Hk, D\] \(layout NHD\), got \[32, 2, 16\]",
    ),
    "no tensor": ({"key": [1.0]}, TypeError, "key must be a torch.Tensor, got list"),
    "no pages": ({"value_pages": None}, TypeError, "value_pages must be a torch.Tensor, got NoneType"),
    "another device": (
        {"key": torch.zeros(5, 2, 16, device="meta")},
        ValueError,
        "key must be on cpu like key_pages, got meta",
    ),
    "an unknown layout": ({"layout": "DNH"}, ValueError, "layout must be 'NHD' or 'HND', got 'DNH'"),
    "a key with gradient": (
        {"key": torch.zeros(5, 2, 16, requires_grad=True)},
        ValueError,
        r"key must not require a gradient, got requires_grad=True\. Call under torch\.no_grad\(\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_store_kv_refuses_before_it_writes(case, any_backend):
    changed, error, message = REFUSED[case]
    arguments = call(**changed)
    pages = [arguments[name] for name in ("key_pages", "value_pages") if isinstance(arguments[name], torch.Tensor)]
    before = storage_bytes(*pages)
    with pytest.raises(error, match=message):
        pagedkv.store_kv(**arguments, backend=any_backend)
    assert torch.equal(storage_bytes(*pages), before)


def quantized_call(**changed):
    """The arguments of `call` with pages of int8 and scales."""
    pages = {name: torch.zeros(4, 8, 2, dim).to(torch.int8) for name, dim in (("key_pages", 16), ("value_pages", 8))}
    scales = {name: torch.full((4, 2, 8), torch.nan) for name in ("key_scales", "value_scales")}
    return {**call(), **pages, **scales, **changed}


REFUSED_QUANTIZED = {
    "slot beyond the pool": (
        {"slot_mapping": torch.tensor([0, 1, 32, 3, 40])},
        ValueError,
        r"slot_mapping must be below 32 \(N \* P slots\), got 32 at entry 2\.",
    ),
    "one of two scales": (
        {"value_scales": None},
        ValueError,
        r"value_scales must be given with key_scales, got None\.",
    ),
    "the other of two scales": ({"key_scales": None}, ValueError, "key_scales must be given with value_scales"),
    "numbers without scales": (
        {"key_scales": None, "value_scales": None},
        TypeError,
        r"key must have dtype int8, got float32\. Pass key_scales and value_scales to quantise on the way in\.",
    ),
    "codes with scales": (
        {"key": torch.zeros(5, 2, 16, dtype=torch.int8)},
        TypeError,
        r"key must have dtype float32 or float16 or bfloat16, got int8\. Without scales it is moved as it is\.",
    ),
    "values in float64": (
        {"value": torch.zeros(5, 2, 8).double()},
        TypeError,
        r"value must have dtype float32 or float16 or bfloat16, got float64\.$",
    ),
    "pages of float8_e5m2": (
        {
            name: torch.zeros(4, 8, 2, dim).to(torch.float8_e5m2)
            for name, dim in (("key_pages", 16), ("value_pages", 8))
        },
        ValueError,
        "key_scales and value_scales must be None for float8_e5m2 pages",
    ),
    "scales in the order of the pages": (
        {"key_scales": torch.ones(4, 8, 2)},
        ValueError,
        r"key_scales must have shape \[N, Hk, P\] with N = 4 .*, Hk = 2 .*, P = 8 .*, got \[4, 8, 2\]",
    ),
    "scales in float16": (
        {"value_scales": torch.ones(4, 2, 8).half()},
        TypeError,
        "value_scales must have dtype float32, got float16",
    ),
    "expanded scales": (
        {"value_scales": torch.ones(1, 2, 8).expand(4, 2, 8)},
        ValueError,
        r"value_scales must not be expanded, got stride 0 in dim 0 of \[4, 2, 8\]",
    ),
    "scales on another device": (
        {"key_scales": torch.ones(4, 2, 8, device="meta")},
        ValueError,
        "key_scales must be on cpu like key_pages, got meta",
    ),
    "scales that are numbers": ({"key_scales": 0.5}, TypeError, "key_scales must be a torch.Tensor, got float"),
    "scales with gradient": (
        {"key_scales": torch.ones(4, 2, 8, requires_grad=True)},
        ValueError,
        "key_scales must not require a gradient",
    ),
}


@pytest.mark.parametrize("case", REFUSED_QUANTIZED)
def test_store_kv_refuses_before_it_quantizes(case, any_backend):
    changed, error, message = REFUSED_QUANTIZED[case]
    arguments = quantized_call(**changed)
    names = ("key_pages", "value_pages", "key_scales", "value_scales")
    tensors = [arguments[name] for name in names if isinstance(arguments[name], torch.Tensor)]
    tensors = [tensor for tensor in tensors if tensor.device.type == "cpu"]
    before = storage_bytes(*tensors)
    with pytest.raises(error, match=message):
        pagedkv.store_kv(**arguments, backend=any_backend)
    assert torch.equal(storage_bytes(*tensors), before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_store_kv_takes_tensors_with_gradient_where_none_is_recorded(mode, any_backend):
    arguments = call(key=torch.randn(5, 2, 16, requires_grad=True))
    with mode():
        pagedkv.store_kv(**arguments, backend=any_backend)
    assert same_bits(arguments["key_pages"][1, 1], arguments["key"][1].detach())
    assert not arguments["key_pages"].requires_grad


def test_store_kv_addresses_in_64_bits(any_backend):
    # Two pages 2**31 elements apart; the memory between them is mapped and never touched.
    between = torch.frombuffer(mmap.mmap(-1, 2 * (2**31 + 128), flags=mmap.MAP_PRIVATE), dtype=torch.float16)
    pages = between.as_strided((2, 4, 2, 16), (2**31, 32, 16, 1))
    key = torch.randn(1, 2, 16).half()
    pagedkv.store_kv(key, key, pages, torch.empty(2, 4, 2, 16).half(), torch.tensor([6]), backend=any_backend)
    assert same_bits(pages[1, 2], key[0])
    for read in pagedkv.gather_kv(pages, pages, torch.tensor([6, 0]), backend=any_backend):
        assert same_bits(read, torch.cat([key, torch.zeros_like(key)]))


def test_store_kv_op_is_registered():
    torch.library.opcheck(torch.ops.pagedkv.store_kv.default, (*call().values(), "NHD", "auto"), test_utils=OPCHECKS)


def test_store_kv_op_with_scales_is_registered():
    *tensors, key_scales, value_scales = quantized_call().values()
    arguments = (*tensors, "NHD", "auto", key_scales, value_scales)
    torch.library.opcheck(torch.ops.pagedkv.store_kv.default, arguments, test_utils=OPCHECKS)


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("order", ["layer_first", "page_first"])
def test_store_kv_compiled_writes_each_layer_to_its_own_place(order):
    # Contiguous pages are one op of the graph; views that interleave run between graphs, or torch.compile would write
    # all layers to where the first one was.
    @torch.compile(backend="aot_eager", fullgraph=order == "layer_first")
    def scaled_store(key, value, key_pages, value_pages, slots):
        pagedkv.store_kv(key * 2, value, key_pages, value_pages, slots)

    spec = pagedkv.KVCacheSpec(3, 2, 16, page_size=8, dtype=torch.float32, order=order)
    pool, expected = pagedkv.KVPool(spec, 4), pagedkv.KVPool(spec, 4)
    for layer in range(3):
        key, value, slots = torch.randn(3, 2, 16), torch.randn(3, 2, 16), torch.tensor([1, -1, 30])
        scaled_store(key, value, pool.key_pages(layer), pool.value_pages(layer), slots)
        naive_store(key * 2, value, expected.key_pages(layer), expected.value_pages(layer), slots, "NHD")
        assert same_bits(pool.buffer, expected.buffer)


@pytest.mark.parametrize("order", ["layer_first", "page_first"])
def test_store_kv_compiled_quantizes_each_layer_to_its_own_place(order):
    @torch.compile(backend="aot_eager", fullgraph=order == "layer_first")
    def scaled_store(key, value, pages, scales, slots):
        pagedkv.store_kv(key * 2, value, *pages, slots, key_scales=scales[0], value_scales=scales[1])

    spec = pagedkv.KVCacheSpec(3, 2, 16, page_size=8, dtype=torch.int8, order=order)
    pool, expected = pagedkv.KVPool(spec, 4), pagedkv.KVPool(spec, 4)
    for layer in range(3):
        key, value, slots = torch.randn(3, 2, 16), torch.randn(3, 2, 16), torch.tensor([1, -1, 30])
        pages, its_pages = ((p.key_pages(layer), p.value_pages(layer)) for p in (pool, expected))
        scales, its_scales = ((p.key_scales(layer), p.value_scales(layer)) for p in (pool, expected))
        scaled_store(key, value, pages, scales, slots)
        naive_quantizing_store(key * 2, value, its_pages, its_scales, slots, "NHD")
        assert same_bits(pool.buffer, expected.buffer)
