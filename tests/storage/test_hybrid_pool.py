import copy
import dataclasses
import pickle
from itertools import accumulate

import pytest
import torch

import pagedkv
from pagedkv import KVCacheSpec, KVPool, PageTable, paged_attention, plan_attention
from pagedkv.storage import HybridKVPool, LayerGroup, make_layer_groups
from pagedkv.storage.layer_groups import calc_bytes_per_page
from pagedkv.testing.bits import same_bits

F32, F16, BF16, INT8, E4M3, E5M2 = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
WINDOW = 40

# Windows and fields of spec: five sliding layers to a full one, and geometries that differ within and across groups.
MODELS = {
    "5-to-1": ([WINDOW] * 5 + [None], {"num_layers": 6, "num_kv_heads": 2, "head_dim": 8}),
    "rest": ([WINDOW, WINDOW, WINDOW, None, None], {"num_layers": 5, "num_kv_heads": 1, "head_dim": 8}),
    "three-groups": (
        [None, 8, WINDOW, WINDOW, 8],
        {"num_layers": 5, "num_kv_heads": (1, 3, 2, 4, 1), "head_dim": (8, 4, 8, 8, 3), "value_dim": (8, 4, 4, 16, 1)},
    ),
    "wide": (
        [WINDOW, None, WINDOW],
        {"num_layers": 3, "num_kv_heads": (1, 1, 3), "head_dim": (8, 16, 24), "value_dim": (16, 8, 24)},
    ),
    "stateless": ([None, WINDOW, WINDOW, WINDOW], {"num_layers": 4, "num_kv_heads": (1, 0, 2, 3), "head_dim": 5}),
}
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16, INT8, E4M3, E5M2], ids=["f32", "bf16", "int8", "e4m3", "e5m2"])
LAYOUTS = pytest.mark.parametrize("layout", ["NHD", "HND"])
MODEL_NAMES = pytest.mark.parametrize("model", MODELS)


def make_pool(model="5-to-1", num_pages=7, *, page_size=16, dtype=F32, layout="NHD"):
    windows, fields = MODELS[model]
    spec = KVCacheSpec(**fields, page_size=page_size, dtype=dtype, layout=layout, order="page_first")
    return HybridKVPool(spec, make_layer_groups(spec, windows), num_pages)


def views_of(pool, group):
    """All pages and scales of the layers of a group."""
    parts = (pool.key_pages, pool.value_pages, pool.key_scales, pool.value_scales)
    return [view for layer in group.layers for part in parts if (view := part(layer)) is not None]


def bytes_by_page(pool):
    return pool.buffer.view(torch.uint8).view(pool.num_pages, pool.bytes_per_page)


def slots_of(pages, group):
    """Every slot of some pages of a group, shuffled."""
    slots = torch.tensor(pages)[:, None] * group.page_size + torch.arange(group.page_size)
    return slots.flatten()[torch.randperm(slots.numel())]


def random_tokens(pool, layer, num_tokens):
    """Keys and values to store, and what the pool then gives back."""
    heads, head_dim, value_dim = pool.spec.layers[layer]
    tokens = [torch.randn(num_tokens, heads, dim) for dim in (head_dim, value_dim)]
    if pool.spec.has_scales:
        return tokens, [pagedkv.dequantize_kv(*pagedkv.quantize_kv(x, pool.spec.dtype)) for x in tokens]
    tokens = [x.to(pool.spec.dtype) for x in tokens]
    return tokens, tokens


@LAYOUTS
@DTYPES
@MODEL_NAMES
def test_views_of_a_group_fill_its_pages_up_to_what_is_wasted(model, dtype, layout):
    pool = make_pool(model, dtype=dtype, layout=layout)
    for group, num_wasted in zip(pool.groups, pool.num_wasted_bytes, strict=True):
        bytes_by_page(pool).zero_()
        for view in views_of(pool, group):
            view.view(torch.uint8).add_(1)
        used = pool.bytes_per_page - num_wasted
        assert bool((bytes_by_page(pool)[:, :used] == 1).all())
        assert not bool(bytes_by_page(pool)[:, used:].any())
    assert pool.num_bytes == pool.bytes_per_page * pool.num_pages


@LAYOUTS
@DTYPES
@MODEL_NAMES
def test_pages_of_different_groups_share_no_byte(model, dtype, layout):
    """Each page to one group or, the last, to none; bytes that nobody wrote stay as they were."""
    pool = make_pool(model, num_pages=10, dtype=dtype, layout=layout)
    owned = {group: list(range(9))[index :: len(pool.groups)] for index, group in enumerate(pool.groups)}
    bytes_by_page(pool).fill_(0xFF)
    written = []
    for group, pages in owned.items():
        for layer in group.layers:
            slots = slots_of(pages, group)
            tokens, expected = random_tokens(pool, layer, len(slots))
            pool.store(layer, *tokens, slots)
            written.append((layer, slots, expected))
    for layer, slots, expected in written:
        for got, wanted in zip(pool.gather(layer, slots), expected, strict=True):
            assert same_bits(got, wanted)
    for (group, pages), num_wasted in zip(owned.items(), pool.num_wasted_bytes, strict=True):
        assert group.page_size * group.sub_spec(pool.spec).bytes_per_token == pool.bytes_per_page - num_wasted
        assert bool((bytes_by_page(pool)[pages, pool.bytes_per_page - num_wasted :] == 0xFF).all())
    assert bool((bytes_by_page(pool)[9] == 0xFF).all())


def test_a_page_of_a_group_is_what_a_page_first_pool_of_its_layers_has():
    pool = make_pool(num_pages=3)
    full, sliding = pool.groups
    by_page = pool.buffer.view(3, -1)
    by_page.copy_(torch.arange(by_page.numel()).view_as(by_page))
    for group, whole in ((full, by_page.view(3, 1, 2, 80, 2, 8)), (sliding, by_page.view(3, 5, 2, 16, 2, 8))):
        for index, layer in enumerate(group.layers):
            assert torch.equal(pool.key_pages(layer), whole[:, index, 0])
            assert torch.equal(pool.value_pages(layer), whole[:, index, 1])


def test_bytes_that_are_left_over_are_counted_for_each_group():
    assert make_pool("5-to-1").num_wasted_bytes == (0, 0)
    # Two layers of 16 tokens in pages of three, for 2 * 8 elements of 4 bytes.
    assert make_pool("rest").num_wasted_bytes == (16 * 2 * 8 * 4, 0)
    # 15 codes and 3 scales of K and of V each a token, in the group with most; 5 codes and one scale in the other.
    assert make_pool("stateless", page_size=1, dtype=INT8).num_wasted_bytes == (90 - 5 * 18 + 2, 90 - 90 + 2)


def test_groups_of_any_page_size_are_taken():
    spec = KVCacheSpec(num_layers=2, num_kv_heads=1, head_dim=8, dtype=F32, order="page_first")
    pool = HybridKVPool(spec, [LayerGroup((1,), None, 3), LayerGroup((0,), None, 7)], 2)
    assert (pool.bytes_per_page, pool.num_wasted_bytes) == (7 * 64, (4 * 64, 0))
    assert [pool.key_pages(layer).shape[1] for layer in (0, 1)] == [7, 3]


def attend(pool, layer, table, q_lens, window, backend):
    heads, head_dim, value_dim = pool.spec.layers[layer]
    plan = plan_attention(
        torch.tensor([0, *accumulate(q_lens)], dtype=torch.int32),
        table,
        num_q_heads=2 * heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        value_dim=value_dim,
        window_left=-1 if window is None else window - 1,
    )
    query = torch.randn(sum(q_lens), 2 * heads, head_dim, generator=torch.Generator().manual_seed(layer))
    return paged_attention(
        query.to(BF16 if pool.spec.dtype == BF16 else F32),
        pool.key_pages(layer),
        pool.value_pages(layer),
        plan,
        layout=pool.spec.layout,
        key_scales=pool.key_scales(layer),
        value_scales=pool.value_scales(layer),
        return_lse=True,
        backend=backend,
    )


@LAYOUTS
@pytest.mark.parametrize("dtype", [F32, BF16, INT8, E4M3], ids=["f32", "bf16", "int8", "e4m3"])
@pytest.mark.parametrize("model", ["5-to-1", "wide"])
def test_attention_on_the_views_gives_the_bits_of_a_plain_pool(model, dtype, layout, any_backend):
    """Pages that groups take in turn, poison in all other slots, against pages of 16 tokens of all layers."""
    kv_lens, q_lens = [1, 80, 333, 17], [1, 3, 1, 17]
    every_token = torch.tensor([0, *accumulate(kv_lens)], dtype=torch.int32)
    pool = make_pool(model, num_pages=70, dtype=dtype, layout=layout)
    bytes_by_page(pool).fill_(0x7F if dtype == E4M3 else 0xFF)
    plain = KVPool(dataclasses.replace(pool.spec, order="layer_first"), 40)
    plain_table = random_table(iter(torch.randperm(40).tolist()), kv_lens, 16)
    ids = iter(torch.randperm(70).tolist())
    tables = {group: random_table(ids, kv_lens, group.page_size) for group in pool.groups}
    given = {}
    for group, table in tables.items():
        for layer in group.layers:
            given[layer], _ = random_tokens(pool, layer, sum(kv_lens))
            pool.store(layer, *given[layer], table.slot_mapping(every_token))
            plain.store(layer, *given[layer], plain_table.slot_mapping(every_token))
    for layer in given:
        group = pool.group_of(layer)
        ours = attend(pool, layer, tables[group], q_lens, group.window, any_backend)
        theirs = attend(plain, layer, plain_table, q_lens, group.window, any_backend)
        assert bool(ours.out.isfinite().all())
        assert same_bits(ours.out, theirs.out)
        assert same_bits(ours.lse, theirs.lse)


def random_table(ids, kv_lens, page_size):
    return PageTable.from_rows([[next(ids) for _ in range(-(-n // page_size))] for n in kv_lens], kv_lens, page_size)


@DTYPES
@MODEL_NAMES
def test_copy_pages_copies_whole_pages_of_any_group(model, dtype):
    pool = make_pool(model, dtype=dtype)
    bytes_by_page(pool).random_(256)
    before = bytes_by_page(pool).clone()
    pool.copy_pages(torch.tensor([6, 0, 6]), torch.tensor([1, 3, 2]))
    assert torch.equal(bytes_by_page(pool), before[[0, 6, 6, 0, 4, 5, 6]])


def test_copy_pages_refuses_before_anything_is_written():
    pool = make_pool()
    bytes_by_page(pool).random_(256)
    before = bytes_by_page(pool).clone()
    with pytest.raises(ValueError, match=r"dst must be in \[0, 7\)"):
        pool.copy_pages(torch.tensor([0, 1]), torch.tensor([2, 7]))
    assert torch.equal(bytes_by_page(pool), before)


def test_slots_go_by_the_page_size_of_the_layers_group():
    pool = make_pool()
    bytes_by_page(pool).zero_()
    tokens = torch.ones(1, 2, 8)
    pool.store(5, tokens, tokens, torch.tensor([6 * 80 + 79]))
    pool.store(0, tokens, tokens, torch.tensor([2 * 16 + 3]))
    assert torch.equal(pool.key_pages(5)[6, 79], tokens[0])
    assert torch.equal(pool.value_pages(0)[2, 3], tokens[0])
    key, _ = pool.gather(0, torch.tensor([-1, 35]))
    assert key.sum(dim=(1, 2)).tolist() == [0, 16]
    for layer, num_slots in ((5, 7 * 80), (0, 7 * 16)):
        with pytest.raises(ValueError, match=rf"slot_mapping must be below {num_slots} \(N \* P slots\)"):
            pool.store(layer, tokens, tokens, torch.tensor([num_slots]))


@pytest.mark.parametrize("copied", [lambda pool: pickle.loads(pickle.dumps(pool)), copy.deepcopy])
@DTYPES
def test_a_copied_pool_has_the_bytes_and_views_of_its_own(dtype, copied):
    pool = make_pool("stateless", dtype=dtype)
    bytes_by_page(pool).random_(256)
    twin = copied(pool)
    assert (twin.groups, twin.bytes_per_page, twin.spec) == (pool.groups, pool.bytes_per_page, pool.spec)
    assert torch.equal(bytes_by_page(twin), bytes_by_page(pool))
    before = bytes_by_page(pool).clone()
    bytes_by_page(twin).zero_()
    for group in twin.groups:
        assert not any(bool(view.contiguous().view(torch.uint8).any()) for view in views_of(twin, group))
    assert torch.equal(bytes_by_page(pool), before)
    with pytest.raises(ValueError, match="layer must be one of a group, got 1"):
        twin.key_pages(1)


def test_there_is_no_page_size_of_all_layers():
    pool = make_pool()
    assert not hasattr(pool, "page_size")
    assert [group.page_size for group in pool.groups] == [80, 16]
    assert [pool.group_of(layer) for layer in (0, 5)] == [pool.groups[1], pool.groups[0]]


def test_repr_says_what_the_pages_hold():
    text = repr(make_pool("rest", num_pages=512))
    assert text.startswith("HybridKVPool(num_pages=512, device='cpu', 1.5 MiB, (LayerGroup(layers=(3, 4), window=None,")
    assert text.endswith(f"), {make_pool('rest').spec})")


@pytest.mark.parametrize("layer, message", [(-1, r"in 0..3, got -1"), (4, r"in 0..3, got 4")])
def test_layers_out_of_range_are_refused(layer, message):
    for call in (make_pool("stateless").key_pages, make_pool("stateless").group_of):
        with pytest.raises(ValueError, match=f"layer must be {message}"):
            call(layer)
    with pytest.raises(TypeError, match="layer must be an int, got str"):
        make_pool().group_of("0")


def test_a_layer_that_stores_nothing_is_refused_wherever_it_is_named():
    pool = make_pool("stateless")
    nothing = torch.empty(0, 0, 5)
    for call in (
        lambda: pool.group_of(1),
        lambda: pool.key_pages(1),
        lambda: pool.value_scales(1),
        lambda: pool.store(1, nothing, nothing, torch.empty(0, dtype=torch.int64)),
        lambda: pool.gather(1, torch.tensor([0])),
    ):
        with pytest.raises(ValueError, match=r"layer must be one of a group, got 1, which stores nothing"):
            call()


@pytest.mark.parametrize(
    "groups, error, message",
    [
        ([], ValueError, r"layer 0 must be in one group, got none\."),
        ([((0,), 4)], ValueError, r"layer 2 must be in one group, got none\."),
        ([((0, 2), 4), ((2,), 4)], ValueError, r"layer 2 must be in one group, got groups\[0\] and groups\[1\]\."),
        ([((0,), 4), ((2, 3), 4)], ValueError, r"layers of groups\[1\] must be in 0\.\.2, got 3\."),
        (
            [((0, 1, 2), 4)],
            ValueError,
            r"layer 1 must be in no group, since it stores nothing \(num_kv_heads 0\), got groups\[0\]\.",
        ),
        ([((0, 2), 4), 5], TypeError, r"groups\[1\] must be a LayerGroup, got int\."),
        (7, TypeError, r"groups must be a sequence of LayerGroups, got int\."),
    ],
)
def test_groups_have_every_layer_that_stores_something_once(groups, error, message):
    spec = KVCacheSpec(num_layers=3, num_kv_heads=(1, 0, 1), head_dim=8, order="page_first")
    if isinstance(groups, list):
        groups = [LayerGroup(item[0], None, item[1]) if isinstance(item, tuple) else item for item in groups]
    for call in (lambda: HybridKVPool(spec, groups, 4), lambda: calc_bytes_per_page(spec, groups)):
        with pytest.raises(error, match=message):
            call()


def test_a_spec_or_page_count_that_cannot_be_is_refused():
    spec = KVCacheSpec(num_layers=1, num_kv_heads=1, head_dim=8)
    groups = make_layer_groups(spec, [None])
    with pytest.raises(ValueError, match="order of spec must be 'page_first', .*, got 'layer_first'"):
        HybridKVPool(spec, groups, 4)
    with pytest.raises(TypeError, match="spec must be a KVCacheSpec, got dict"):
        HybridKVPool({}, groups, 4)
    with pytest.raises(ValueError, match="num_pages must be at least 1, got 0"):
        HybridKVPool(KVCacheSpec(num_layers=1, num_kv_heads=1, head_dim=8, order="page_first"), groups, 0)
