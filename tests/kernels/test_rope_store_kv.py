"""rope_store_kv: bit for bit apply_rope, then store_kv."""

import mmap

import pytest
import torch

import pagedkv
from pagedkv import Llama31Scaling, RotaryEmbedding
from pagedkv.testing.bits import same_bits, storage_bytes
from pagedkv.testing.conformance.judge import assert_same_memory, placed
from pagedkv.testing.page_views import PAGE_FORMS, kv_page_views

ROPES = {
    "half": RotaryEmbedding(64),
    "interleaved": RotaryEmbedding(16, interleaved=True),
    "partial": RotaryEmbedding(24, theta=500.0),
    "llama31": RotaryEmbedding(64, theta=500000.0, llama31=Llama31Scaling()),
}


def call(dtype=torch.float32, pages=None, *, layout="NHD", form="separate", **changed):
    """Arguments of a good call, with some replaced; `pages` is the dtype of codes."""
    key_pages, value_pages = kv_page_views(
        form, layout, num_pages=4, page_size=8, num_kv_heads=2, head_dim=64, value_dim=24, dtype=pages or dtype
    )
    good = {
        "query": torch.randn(5, 6, 64).to(dtype),
        "key": torch.randn(5, 2, 64).to(dtype),
        "value": torch.randn(5, 2, 24).to(dtype),
        "positions": torch.tensor([0, 17, 5, 100000, -3]),
        "rope": ROPES["half"],
        "key_pages": key_pages,
        "value_pages": value_pages,
        "slot_mapping": torch.tensor([0, 9, -1, 31, 9]),
        "layout": layout,
    }
    if pages is not None:
        good |= {name: torch.full((4, 2, 8), torch.nan) for name in ("key_scales", "value_scales")}
    return {**good, **changed}


WRITTEN = ("key_pages", "value_pages", "key_scales", "value_scales")


def written(arguments):
    """What the call may write, as bytes, with those around it."""
    return storage_bytes(*(arguments[name] for name in WRITTEN if isinstance(arguments.get(name), torch.Tensor)))


def in_two_calls(arguments, backend):
    """What is returned, and copies of the arguments once all is written; the reference turns for the native core."""
    expected = placed(arguments, torch.device("cpu"))
    positions, rope = expected.pop("positions"), expected.pop("rope")
    turn = {"backend": "reference" if backend == "cpu" else backend}
    turned = pagedkv.apply_rope(expected.pop("query"), positions, rope, **turn)
    key = pagedkv.apply_rope(expected["key"], positions, rope, **turn)
    pagedkv.store_kv(**{**expected, "key": key}, backend=backend)
    return turned, expected


def assert_as_in_two_calls(arguments, backend):
    turned, expected = in_two_calls(arguments, backend)
    assert same_bits(pagedkv.rope_store_kv(**arguments, backend=backend), turned)
    assert_same_memory(arguments, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ROPES)
def test_rope_store_kv_is_apply_rope_then_store_kv(name, dtype, any_backend):
    assert_as_in_two_calls(call(dtype, rope=ROPES[name]), any_backend)


@pytest.mark.parametrize("pages", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("name", ROPES)
def test_rope_store_kv_quantizes_the_turned_key(name, pages, any_backend):
    arguments = call(torch.bfloat16, pages, rope=ROPES[name])
    # Rows of NaN, of zeros, and one whose largest element is turned, or is not.
    arguments["key"][0, 0, 3], arguments["key"][1], arguments["key"][3, 1, 63] = torch.nan, 0, 100
    assert_as_in_two_calls(arguments, any_backend)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("form", PAGE_FORMS)
def test_rope_store_kv_honours_strides(form, layout, any_backend):
    packed = torch.randn(5, 6 * 64 + 2 * 64 + 2 * 24)
    query, key, value = (
        part.unflatten(1, (-1, width))
        for part, width in zip(packed.split([6 * 64, 2 * 64, 2 * 24], 1), (64, 64, 24), strict=True)
    )
    positions = torch.tensor([[3, 99]] * 5)[:, 0]
    slots = torch.stack([torch.tensor([4, 0, -1, 31, 9]), torch.full((5,), 99)], 1)[:, 0]
    tensors = {"query": query, "key": key, "value": value, "positions": positions, "slot_mapping": slots}
    assert_as_in_two_calls(call(form=form, layout=layout, **tensors), any_backend)


def test_rope_store_kv_turns_queries_whose_key_is_not_stored(any_backend):
    arguments = call(slot_mapping=torch.tensor([-1, -(2**62), -1, -1, -1]))
    before = written(arguments)
    turned = pagedkv.rope_store_kv(**arguments, backend=any_backend)
    assert torch.equal(written(arguments), before)
    assert not turned.isnan().any()
    assert same_bits(turned[0], arguments["query"][0]), "at position 0 nothing turns"
    assert not torch.equal(turned[1], arguments["query"][1])


def test_rope_store_kv_of_other_numbers_of_heads_and_tokens(any_backend):
    for num_tokens, num_heads in ((0, 6), (5, 0), (1, 2), (33, 3)):
        assert_as_in_two_calls(
            call(
                query=torch.randn(num_tokens, num_heads, 64),
                key=torch.randn(num_tokens, 2, 64),
                value=torch.randn(num_tokens, 2, 24),
                positions=torch.arange(num_tokens),
                slot_mapping=torch.randint(-1, 32, (num_tokens,)),
            ),
            any_backend,
        )


def test_rope_store_kv_without_kv_heads_turns_queries(any_backend):
    nothing = torch.empty(5, 0, 64)
    pages = torch.empty(4, 8, 0, 64)
    arguments = call(key=nothing, value=nothing, key_pages=pages, value_pages=pages)
    turned = pagedkv.rope_store_kv(**arguments, backend=any_backend)
    assert same_bits(turned, pagedkv.apply_rope(arguments["query"], arguments["positions"], ROPES["half"]))


def test_rope_store_kv_in_a_tensor_of_the_caller(any_backend):
    arguments = call(torch.float16)
    expected, _ = in_two_calls(arguments, any_backend)
    out = torch.empty(5, 6, 64, dtype=torch.float16)
    assert pagedkv.rope_store_kv(**arguments, out=out, backend=any_backend) is out
    assert same_bits(out, expected)


def test_rope_store_kv_of_tokens_that_lie_in_the_pages_takes_them_as_they_were(any_backend):
    key_pages, value_pages = torch.randn(4, 8, 2, 64), torch.randn(4, 8, 2, 24)
    tokens = {"query": key_pages[1, :5], "key": key_pages[0, :5], "value": value_pages[0, :5]}
    slots = torch.tensor([1, 2, 3, 8, 9])
    pages = {"key_pages": key_pages, "value_pages": value_pages}
    apart = call(**{name: tensor.clone() for name, tensor in (tokens | pages).items()}, slot_mapping=slots)
    arguments = call(**tokens, **pages, slot_mapping=slots)
    turned = pagedkv.rope_store_kv(**arguments, backend=any_backend)
    assert same_bits(turned, pagedkv.rope_store_kv(**apart, backend=any_backend))
    for name in pages:
        assert same_bits(arguments[name], apart[name])


def test_rope_store_kv_addresses_in_64_bits(any_backend):
    # Pages, and tokens, 2**31 elements apart; the memory between them is mapped and never touched.
    between = torch.frombuffer(mmap.mmap(-1, 2 * (2**31 + 2048), flags=mmap.MAP_PRIVATE), dtype=torch.float16)
    pages = between.as_strided((2, 8, 2, 64), (2**31, 128, 64, 1))
    query = between[1024:].as_strided((2, 2, 64), (2**31, 64, 1))
    key = torch.randn(2, 2, 64).half()
    query.copy_(key)
    arguments = call(
        torch.float16,
        query=query,
        key=key,
        value=key,
        key_pages=pages,
        value_pages=torch.zeros(2, 8, 2, 64).half(),
        positions=torch.tensor([3, 7]),
        slot_mapping=torch.tensor([-1, 11]),
    )
    turned = pagedkv.rope_store_kv(**arguments, backend=any_backend)
    assert same_bits(turned, pagedkv.rope_store_kv(**{**arguments, "query": key}, backend=any_backend))
    assert same_bits(pages[1, 3], turned[1])
    assert same_bits(arguments["value_pages"][1, 3], key[1])


REFUSED = {
    "query of another width": ({"query": torch.zeros(5, 6, 32)}, ValueError, "query must have shape .* D = 64"),
    "too few queries": ({"query": torch.zeros(4, 6, 64)}, ValueError, "query must have shape .* T = 5"),
    "query of codes": ({"query": torch.zeros(5, 6, 64).to(torch.int8)}, TypeError, "query must have dtype float32 or"),
    "strided query": ({"query": torch.zeros(5, 6, 128)[..., ::2]}, ValueError, "query must have a contiguous last"),
    "query elsewhere": (
        {"query": torch.zeros(5, 6, 64, device="meta")},
        ValueError,
        "query must be on cpu like key_pages, got meta",
    ),
    "positions int32": (
        {"positions": torch.zeros(5, dtype=torch.int32)},
        TypeError,
        "positions must have dtype int64, got int32",
    ),
    "too few positions": ({"positions": torch.zeros(4).long()}, ValueError, r"positions must have shape \[T\] with T"),
    "no rope": ({"rope": 10000.0}, TypeError, "rope must be a RotaryEmbedding, got float"),
    "rope wider than heads": (
        {"rope": RotaryEmbedding(128)},
        ValueError,
        r"rope\.dim must be at most 64 \(D of query\), got 128",
    ),
    "slot beyond the pool": (
        {"slot_mapping": torch.tensor([0, 1, 32, 3, 40])},
        ValueError,
        r"slot_mapping must be below 32 \(N \* P slots\), got 32 at entry 2\.",
    ),
    "key of another dtype": ({"key": torch.zeros(5, 2, 64).half()}, TypeError, "key must have dtype float32, got"),
    "value of another shape": ({"value": torch.zeros(5, 3, 24)}, ValueError, "value must have shape"),
    "expanded pages": (
        {"key_pages": torch.zeros(1, 8, 2, 64).expand(4, 8, 2, 64)},
        ValueError,
        "key_pages must not be expanded",
    ),
    "out of another shape": ({"out": torch.zeros(5, 6, 63)}, ValueError, r"out must have shape \[T, Hq, D\]"),
    "out of another dtype": ({"out": torch.zeros(5, 6, 64).half()}, TypeError, "out must have dtype float32, got"),
    "strided out": ({"out": torch.zeros(6, 5, 64).transpose(0, 1)}, ValueError, "out must be contiguous"),
    "a query with gradient": (
        {"query": torch.zeros(5, 6, 64, requires_grad=True)},
        ValueError,
        "query must not require a gradient",
    ),
    "an unknown layout": ({"layout": "DNH"}, ValueError, "layout must be 'NHD' or 'HND', got 'DNH'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rope_store_kv_refuses_before_it_writes(case, any_backend):
    changed, error, message = REFUSED[case]
    arguments = call(**{"out": torch.full((5, 6, 64), 7.0), **changed})
    before, out = written(arguments), arguments["out"].clone()
    with pytest.raises(error, match=message):
        pagedkv.rope_store_kv(**arguments, backend=any_backend)
    assert torch.equal(written(arguments), before)
    assert torch.equal(arguments["out"], out)


def test_rope_store_kv_refuses_to_turn_codes(any_backend):
    codes = {name: torch.zeros(5, 2, dim).to(torch.int8) for name, dim in (("key", 64), ("value", 24))}
    arguments = call(pages=torch.int8, **codes, key_scales=None, value_scales=None)
    with pytest.raises(TypeError, match="key must have dtype float32 or float16 or bfloat16, got int8"):
        pagedkv.rope_store_kv(**arguments, backend=any_backend)


@pytest.mark.parametrize("name", ["query", "key", "value_pages"])
def test_rope_store_kv_refuses_a_result_that_lies_in_another_argument(name, any_backend):
    memory = torch.randn(3000)
    shape = {"query": (5, 6, 64), "key": (5, 2, 64), "value_pages": (4, 8, 2, 24)}[name]
    there = memory[100:].as_strided(shape, torch.empty(shape).stride())
    arguments = call(**{name: there}, out=memory[:1920].view(5, 6, 64))
    with pytest.raises(ValueError, match=f"out must not overlap {name}"):
        pagedkv.rope_store_kv(**arguments, backend=any_backend)


def op_arguments(arguments, rope=None):
    tensors = ("query", "key", "value", "positions", "key_pages", "value_pages", "slot_mapping")
    scales = arguments.get("key_scales"), arguments.get("value_scales")
    return (*(arguments[name] for name in tensors), *scales, arguments["rope"].pack(), arguments["layout"], "auto")


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("pages", [None, torch.int8], ids=str)
def test_rope_store_kv_op_is_registered(pages):
    arguments = op_arguments(call(pages=pages))
    torch.library.opcheck(torch.ops.pagedkv.rope_store_kv.default, arguments, test_utils=OPCHECKS)


@pytest.mark.parametrize("order", ["layer_first", "page_first"])
@pytest.mark.parametrize("has_out", [False, True])
def test_rope_store_kv_compiled_writes_each_layer_to_its_own_place(order, has_out):
    rope = ROPES["llama31"]

    @torch.compile(backend="aot_eager", fullgraph=order == "layer_first")
    def step(query, key, value, positions, key_pages, value_pages, slots, out):
        return pagedkv.rope_store_kv(query, key * 2, value, positions, rope, key_pages, value_pages, slots, out=out)

    spec = pagedkv.KVCacheSpec(3, 2, 64, page_size=8, dtype=torch.float32, order=order)
    pool, expected = pagedkv.KVPool(spec, 4), pagedkv.KVPool(spec, 4)
    slots, positions = torch.tensor([1, -1, 30]), torch.tensor([5, 6, 7])
    for layer in range(3):
        query, key, value = torch.randn(3, 6, 64), torch.randn(3, 2, 64), torch.randn(3, 2, 64)
        out = torch.empty_like(query) if has_out else None
        turned = step(query, key, value, positions, pool.key_pages(layer), pool.value_pages(layer), slots, out)
        expected.store(layer, pagedkv.apply_rope(key * 2, positions, rope), value, slots)
        assert same_bits(turned, pagedkv.apply_rope(query, positions, rope))
        assert same_bits(pool.buffer, expected.buffer)
        assert out is None or same_bits(out, turned)
