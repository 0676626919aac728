"""store_mla: bitwise what a Python loop writes, and nothing else."""

import pytest
import torch

import pagedkv
from pagedkv.testing.bits import same_bits, storage_bytes
from pagedkv.testing.mla_batch import MLA_PAGE_FORMS, mla_page_views

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# P, C, R
GEOMETRIES = [(1, 1, 1), (3, 7, 5), (16, 40, 8), (64, 512, 64), (16, 40, 0)]


def naive_store(latent, rope, latent_pages, rope_pages, slots):
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            page, offset = divmod(slot, latent_pages.shape[1])
            latent_pages[page, offset] = latent[token]
            rope_pages[page, offset] = rope[token]


def down_projected(num_tokens, latent_dim, rope_dim, dtype):
    """Latent and rope key as slices of one projection, as models compute them."""
    return torch.randn(num_tokens, latent_dim + rope_dim).to(dtype).split([latent_dim, rope_dim], 1)


@pytest.mark.parametrize("form", MLA_PAGE_FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_store_mla_writes_what_a_loop_writes_and_nothing_else(geometry, dtype, form, any_backend):
    page_size, latent_dim, rope_dim = geometry
    num_pages = 5 if page_size > 1 else 40
    shape = {"page_size": page_size, "latent_dim": latent_dim, "rope_dim": rope_dim, "dtype": dtype}
    pages, expected = (mla_page_views(form, num_pages=num_pages, **shape) for _ in range(2))
    slots = torch.randint(0, num_pages * page_size, (33,))  # with duplicates
    slots[torch.randperm(33)[:4]] = torch.tensor([-1, -7, -(2**62), -1])
    latent, rope = down_projected(33, latent_dim, rope_dim, dtype)
    pagedkv.store_mla(latent, rope, *pages, slots, backend=any_backend)
    naive_store(latent, rope, *expected, slots)
    assert torch.equal(storage_bytes(*pages), storage_bytes(*expected))


@pytest.mark.parametrize("no_rope, no_pages", [(True, True), (True, False), (False, True)])
def test_no_rope_is_said_by_none_or_by_width_0(no_rope, no_pages, any_backend):
    pages, expected = (mla_page_views("sliced", num_pages=3, page_size=4, latent_dim=8, rope_dim=0) for _ in range(2))
    latent, rope = torch.randn(3, 8), torch.empty(3, 0)
    slots = torch.tensor([11, -1, 4])
    given = None if no_rope else rope, pages[0], None if no_pages else pages[1]
    pagedkv.store_mla(latent, *given, slots, backend=any_backend)
    naive_store(latent, rope, *expected, slots)
    assert torch.equal(storage_bytes(*pages), storage_bytes(*expected))


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_store_mla_of_nothing_writes_nothing(num_tokens, any_backend):
    pages = mla_page_views("joined", num_pages=2, page_size=4, latent_dim=8, rope_dim=4)
    before = storage_bytes(*pages)
    tokens = torch.randn(num_tokens, 8), torch.randn(num_tokens, 4)
    pagedkv.store_mla(*tokens, *pages, torch.full((num_tokens,), -1), backend=any_backend)
    assert torch.equal(storage_bytes(*pages), before)


def test_every_bit_of_nan_and_zero_is_kept(any_backend):
    latent = torch.tensor([0x7FC00001, 0x7F800001, -0x80000000, 1], dtype=torch.int64).to(torch.int32)
    latent = latent.view(torch.float32).view(1, 4)
    pages = mla_page_views("joined", num_pages=2, page_size=2, latent_dim=4, rope_dim=4)
    pagedkv.store_mla(latent, latent, *pages, torch.tensor([3]), backend=any_backend)
    assert same_bits(pages[0][1, 1], latent[0])
    assert same_bits(pages[1][1, 1], latent[0])


def test_tokens_that_lie_in_the_pages_move_as_they_were(any_backend):
    joined = torch.randn(2, 4, 12)
    latent_pages, rope_pages = joined[..., :8], joined[..., 8:]
    old = joined.clone()
    # Slot s takes what slot s - 1 held: in the wrong order one token would fill the page.
    slots = torch.tensor([1, 2, 3])
    pagedkv.store_mla(latent_pages[0, :3], rope_pages[0, :3], latent_pages, rope_pages, slots, backend=any_backend)
    assert same_bits(joined[0, 1:], old[0, :3])
    assert same_bits(joined[0, 0], old[0, 0])


def call(**changed):
    """Arguments of a good call, with some replaced."""
    latent_pages, rope_pages = mla_page_views("joined", num_pages=4, page_size=8, latent_dim=16, rope_dim=8)
    good = {
        "latent": torch.randn(5, 16),
        "rope": torch.randn(5, 8),
        "latent_pages": latent_pages,
        "rope_pages": rope_pages,
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
        r"slot_mapping must have shape \[T\] with T = 5 \(set by latent\), got \[4\]\.",
    ),
    "latent of another dtype": (
        {"latent": torch.zeros(5, 16).half()},
        TypeError,
        "latent must have dtype float32, got float16",
    ),
    "rope of another dtype": (
        {"rope": torch.zeros(5, 8).bfloat16()},
        TypeError,
        "rope must have dtype float32, got bfloat16",
    ),
    "latent with a head axis": (
        {"latent": torch.zeros(5, 1, 16)},
        ValueError,
        r"latent must have shape \[T, C\] with C = 16 \(set by latent_pages\), got \[5, 1, 16\]",
    ),
    "rope as wide as latent": (
        {"rope": torch.zeros(5, 16)},
        ValueError,
        r"rope must have shape \[T, R\] with T = 5 \(set by latent\), R = 8 \(set by rope_pages\), got \[5, 16\]",
    ),
    "fewer rope keys": ({"rope": torch.zeros(4, 8)}, ValueError, r"rope must have shape \[T, R\] with T = 5"),
    "no rope": ({"rope": None}, ValueError, "rope must be given for rope_pages with R = 8, got None"),
    "no rope pages": (
        {"rope_pages": None},
        ValueError,
        r"rope must have shape \[T, R\] with .*R = 0 \(set by rope_pages = None\), got \[5, 8\]",
    ),
    "strided latent": (
        {"latent": torch.zeros(5, 32)[:, ::2]},
        ValueError,
        r"latent must have a contiguous last dimension \(stride 1\), got stride 2",
    ),
    "strided rope": (
        {"rope": torch.zeros(5, 16)[:, ::2]},
        ValueError,
        r"rope must have a contiguous last dimension \(stride 1\), got stride 2",
    ),
    "strided pages": (
        {"rope_pages": torch.zeros(4, 8, 16)[..., ::2]},
        ValueError,
        r"rope_pages must have a contiguous last dimension \(stride 1\), got stride 2",
    ),
    "integer pages": (
        {"latent_pages": torch.zeros(4, 8, 16, dtype=torch.int8)},
        TypeError,
        "latent_pages must have dtype float32 or float16 or bfloat16, got int8",
    ),
    "pages of two dtypes": (
        {"rope_pages": torch.zeros(4, 8, 8).half()},
        TypeError,
        "rope_pages must have dtype float32, got float16",
    ),
    "pages of two sizes": (
        {"rope_pages": torch.zeros(4, 4, 8)},
        ValueError,
        r"rope_pages must have shape \[N, P, R\] with N = 4 \(set by latent_pages\), P = 8 \(set by latent_pages\)",
    ),
    "expanded pages": (
        {"rope_pages": torch.zeros(1, 8, 8).expand(4, 8, 8)},
        ValueError,
        r"rope_pages must not be expanded, got stride 0 in dim 0 of \[4, 8, 8\]",
    ),
    "pages with heads": (
        {"latent_pages": torch.zeros(4, 8, 1, 16)},
        ValueError,
        r"latent_pages must have shape \[N, P, C\], got \[4, 8, 1, 16\]",
    ),
    "no tensor": ({"latent": [1.0]}, TypeError, "latent must be a torch.Tensor, got list"),
    "negated pages": (
        {"latent_pages": torch._neg_view(torch.zeros(4, 8, 16))},
        ValueError,
        "latent_pages must hold its values as they are, got a negated view",
    ),
    "another device": (
        {"latent": torch.zeros(5, 16, device="meta")},
        ValueError,
        "latent must be on cpu like latent_pages, got meta",
    ),
    "slots on another device": (
        {"slot_mapping": torch.zeros(5, dtype=torch.int64, device="meta")},
        ValueError,
        "slot_mapping must be on cpu like latent_pages, got meta",
    ),
    "a latent with gradient": (
        {"latent": torch.zeros(5, 16, requires_grad=True)},
        ValueError,
        r"latent must not require a gradient, got requires_grad=True\. Call under torch\.no_grad\(\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_store_mla_refuses_before_it_writes(case, any_backend):
    changed, error, message = REFUSED[case]
    arguments = call(**changed)
    pages = [arguments[name] for name in ("latent_pages", "rope_pages") if isinstance(arguments[name], torch.Tensor)]
    before = storage_bytes(*pages)
    with pytest.raises(error, match=message):
        pagedkv.store_mla(**arguments, backend=any_backend)
    assert torch.equal(storage_bytes(*pages), before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_store_mla_takes_tensors_with_gradient_where_none_is_recorded(mode, any_backend):
    arguments = call(latent=torch.randn(5, 16, requires_grad=True))
    with mode():
        pagedkv.store_mla(**arguments, backend=any_backend)
    assert same_bits(arguments["latent_pages"][1, 1], arguments["latent"][1].detach())


def separate_call(rope_dim):
    pages = mla_page_views("separate", num_pages=4, page_size=8, latent_dim=16, rope_dim=rope_dim)
    arguments = call(rope=torch.randn(5, rope_dim), latent_pages=pages[0], rope_pages=pages[1])
    return arguments if rope_dim else {**arguments, "rope": None, "rope_pages": None}


@pytest.mark.parametrize("rope_dim", [8, 0])
def test_store_mla_op_is_registered(rope_dim):
    arguments = (*separate_call(rope_dim).values(), "auto")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.pagedkv.store_mla.default, arguments, test_utils=checks)


@pytest.mark.parametrize("rope_dim", [8, 0])
def test_compiled_store_into_separate_pages_is_one_op_of_the_graph(rope_dim):
    @torch.compile(backend="aot_eager", fullgraph=True)
    def scaled_store(latent, rope, latent_pages, rope_pages, slot_mapping):
        pagedkv.store_mla(latent * 2, rope, latent_pages, rope_pages, slot_mapping)

    arguments, expected = separate_call(rope_dim), separate_call(rope_dim)
    scaled_store(**arguments)
    changed = {"latent": arguments["latent"] * 2, "rope": arguments["rope"]}
    pagedkv.store_mla(**{**expected, **changed})
    for name in ("latent_pages", "rope_pages"):
        assert expected[name] is None or same_bits(arguments[name], expected[name])


@pytest.mark.parametrize("order", ["layer_first", "page_first"])
def test_compiled_store_writes_each_layer_to_its_own_place(order):
    # Views of one buffer interleave, so the store runs between graphs.
    @torch.compile(backend="aot_eager")
    def scaled_store(latent, rope, latent_pages, rope_pages, slots):
        pagedkv.store_mla(latent * 2, rope, latent_pages, rope_pages, slots)

    spec = pagedkv.MLACacheSpec(3, latent_dim=16, rope_dim=8, page_size=8, dtype=torch.float32, order=order)
    pool, expected = pagedkv.MLAPool(spec, 4), pagedkv.MLAPool(spec, 4)
    for layer in range(3):
        latent, rope, slots = torch.randn(3, 16), torch.randn(3, 8), torch.tensor([1, -1, 30])
        scaled_store(latent, rope, pool.latent_pages(layer), pool.rope_pages(layer), slots)
        naive_store(latent * 2, rope, expected.latent_pages(layer), expected.rope_pages(layer), slots)
        assert same_bits(pool.buffer, expected.buffer)
