import math
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch

import pagedkv
from pagedkv.attention.tile_attention import tile_attention
from pagedkv.kernels.quantize import dequantize_kv, quantize_kv
from pagedkv.storage.tiles.host_tile_cache import HostTileCache
from pagedkv.storage.tiles.tile_cache import TileCache
from pagedkv.testing.bits import same_bits
from pagedkv.testing.numeric import assert_close_to_oracle

# The package's attribute of this name is the function.
MODULE = sys.modules["pagedkv.attention.tile_attention"]
F32, F16, BF16, INT8 = torch.float32, torch.float16, torch.bfloat16, torch.int8


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def int64(*values):
    return torch.tensor(values, dtype=torch.int64)


@dataclass
class World:
    """A cache, and key [beams, Hk, tokens, D] and value [beams, Hk, tokens, Dv]: what its tokens stand for."""

    cache: TileCache
    key: torch.Tensor
    value: torch.Tensor

    def expected(self, query, seq_lens, arithmetic, beam_ids=None, held=None, **options):
        query = query[:, None] if query.dim() == 3 else query
        beams = range(len(query)) if beam_ids is None else beam_ids.tolist()
        rows = [
            dense_attention(
                query[row].to(arithmetic),
                self.key[beam, :, :seq_len].to(arithmetic),
                self.value[beam, :, :seq_len].to(arithmetic),
                None if held is None else held[beam, :, :seq_len],
                **options,
            )
            for row, (beam, seq_len) in enumerate(zip(beams, seq_lens.tolist(), strict=True))
        ]
        return [torch.stack(part) for part in zip(*rows, strict=True)]

    def assert_right(self, query, seq_lens, *, backend="auto", held=None, beam_ids=None, **options):
        missing = "error" if held is None else "skip"
        state = tile_attention(
            query,
            self.cache,
            seq_lens,
            beam_ids=beam_ids,
            missing=missing,
            return_lse=True,
            backend=backend,
            **options,
        )
        exact, plain = (self.expected(query, seq_lens, a, beam_ids, held, **options) for a in (torch.float64, F32))
        assert state.out.dtype == query.dtype
        assert state.lse.dtype == F32
        assert state.out.shape == (*query.shape[:-1], self.value.shape[3])
        assert state.lse.shape == query.shape[:-1]
        for name, actual, right, rough in zip(("out", "lse"), state, exact, plain, strict=True):
            assert_close_to_oracle(name, actual, right.view(actual.shape), rough.view(actual.shape))
        assert self.cache.stats().num_pinned == 0


def dense_attention(
    query, key, value, held, *, sm_scale=None, temperature=1.0, causal=True, window_left=-1, soft_cap=0.0, rope=None
):
    """One row from the definition: query [q_len, Hq, D], key [Hk, n, D], value [Hk, n, Dv], held [Hk, n]."""
    q_len, num_q_heads, head_dim = query.shape
    seq_len = key.shape[1]
    positions, keys = torch.arange(seq_len - q_len, seq_len), torch.arange(seq_len)
    seen = torch.ones(q_len, seq_len, dtype=torch.bool)
    if causal:
        seen &= keys <= positions[:, None]
    if window_left >= 0:
        seen &= keys >= positions[:, None] - window_left
    outs, lses = [], []
    for head in range(num_q_heads):
        kv_head = head // (num_q_heads // key.shape[0])
        row, column = query[:, head], key[kv_head]
        if rope is not None:
            row, column = rotated(row, positions, rope), rotated(column, keys, rope)
        logits = row @ column.T * (head_dim**-0.5 if sm_scale is None else sm_scale)
        if soft_cap:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        shown = seen if held is None else seen & held[kv_head]
        logits = (logits / temperature).masked_fill(~shown, -math.inf)
        lse = logits.logsumexp(1)
        weights = (logits - lse.masked_fill(lse == -math.inf, 0.0)[:, None]).exp()
        outs.append(weights @ value[kv_head])
        lses.append(lse)
    return torch.stack(outs, 1), torch.stack(lses, 1)


def rotated(x, positions, rope):
    angles = positions.double()[:, None] * rope.theta ** (-torch.arange(0, rope.dim, 2).double() / rope.dim)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    half = rope.dim // 2
    first = torch.arange(half) * 2 if rope.interleaved else torch.arange(half)
    second = first + (1 if rope.interleaved else half)
    result = x.clone()
    result[:, first] = x[:, first] * cos - x[:, second] * sin
    result[:, second] = x[:, second] * cos + x[:, first] * sin
    return result


def make_world(
    num_tokens=21, *, num_beams=3, num_heads=2, tile_size=4, head_dim=8, value_dim=None, dtype=F32, spare_pages=3
):
    """Beams of `num_tokens` tokens that came one tile of one beam at a time: pages lie in no order; others hold NaN."""
    value_dim = head_dim if value_dim is None else value_dim
    num_tiles = -(-num_tokens // tile_size) + 1
    num_pages = num_beams * num_heads * (num_tiles - 1) + spare_pages
    heads = {"num_beams": num_beams, "num_heads": num_heads, "num_tiles": num_tiles}
    cache = TileCache(num_pages, tile_size, head_dim, value_dim=value_dim, dtype=dtype, **heads)
    given = F32 if dtype == INT8 else dtype
    key, value = (torch.randn(num_beams, num_heads, num_tokens, dim).to(given) for dim in (head_dim, value_dim))
    for first in range(0, num_tokens, tile_size):
        for beam in torch.randperm(num_beams).tolist():
            new = (kv[beam : beam + 1, :, first : first + tile_size] for kv in (key, value))
            cache.store(*new, int64(first), int64(beam))
    if dtype == INT8:
        key, value = (dequantised(kv) for kv in (key, value))
    return World(cache, key, value)


def dequantised(kv):
    quantised = quantize_kv(kv.flatten(0, 1), INT8)
    return dequantize_kv(*quantised).view_as(kv)


def without(world, *tiles):
    """Removes tiles (beam, head, tile); [beams, Hk, tokens] of the tokens that are still there."""
    held = torch.ones(world.key.shape[:3], dtype=torch.bool)
    size = world.cache.geometry.tile_size
    for beam, head, tile in tiles:
        assert world.cache.remove(beam, head, tile)
        held[beam, head, tile * size : (tile + 1) * size] = False
    return held


def host_copy(world):
    """The tiles of a world's cache in a HostTileCache."""
    cache = world.cache
    geometry = cache.geometry
    host = HostTileCache(2 * cache.num_pages, geometry.tile_size, geometry.head_dim, dtype=geometry.dtype)
    for beam, head, tile in (cache.table.host >= 0).nonzero().tolist():
        for part in ("k", "v"):
            content = cache.get(beam, head, tile, part)
            content = (content,) if isinstance(content, torch.Tensor) else content
            host.put((beam, head, tile, part), *content)
    return host


@pytest.mark.parametrize("dtype", [F32, F16, BF16, INT8], ids=str)
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("tile_size", [1, 3, 16])
def test_equals_dense_attention(dtype, group, tile_size, any_backend):
    world = make_world(33, dtype=dtype, tile_size=tile_size, head_dim=64 if group == 3 else 8)
    given = F32 if dtype == INT8 else dtype
    head_dim = world.key.shape[3]
    seq_lens = int32(33, 16, 1)
    world.assert_right(torch.randn(3, 2 * group, head_dim).to(given), seq_lens, backend=any_backend)
    world.assert_right(torch.randn(3, 5, 2 * group, head_dim).to(given), seq_lens, backend=any_backend)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"window_left": 0},
        {"window_left": 6},
        {"soft_cap": 1.5},
        {"sm_scale": 0.7},
        {"temperature": 0.25},
        {"temperature": 3.0, "soft_cap": 1.5},
        {"rope": pagedkv.RotaryEmbedding(8, theta=100.0)},
        {"rope": pagedkv.RotaryEmbedding(6, theta=100.0, interleaved=True), "window_left": 9},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [F32, INT8], ids=str)
def test_options(options, dtype, any_backend):
    world = make_world(dtype=dtype, value_dim=16 if any_backend == "cpu" else 5)
    world.assert_right(torch.randn(3, 6, 8), int32(21, 8, 2), backend=any_backend, **options)
    world.assert_right(torch.randn(3, 4, 6, 8), int32(20, 9, 5), backend=any_backend, **options)


def test_rope_turns_by_the_position_in_the_beam():
    """A row alone at position 20 sees its keys as far away as they are, not from position 0 on."""
    world = make_world(num_beams=1)
    rope = pagedkv.RotaryEmbedding(8, theta=10.0)
    query = torch.randn(1, 2, 8)
    far, near = (tile_attention(query, world.cache, int32(n), rope=rope) for n in (21, 20))
    assert not torch.equal(far, near)
    world.assert_right(query, int32(21), rope=rope)


def test_temperature_divides_the_scale_once():
    world, query = make_world(), torch.randn(3, 4, 8)
    seq_lens = int32(21, 3, 12)
    for sm_scale in (None, 0.3):
        warm = tile_attention(query, world.cache, seq_lens, sm_scale=sm_scale, temperature=1.7)
        scale = 8**-0.5 if sm_scale is None else sm_scale
        assert same_bits(warm, tile_attention(query, world.cache, seq_lens, sm_scale=scale / 1.7))


@pytest.mark.parametrize("lengths", [(0, 0, 0), (0, 5, 0), (24, 1, 4), (3, 4, 5)], ids=str)
def test_rows_without_keys_give_zero(lengths, any_backend):
    world = make_world(24)
    world.assert_right(torch.randn(3, 2, 8), int32(*lengths), backend=any_backend)
    # More new tokens than keys: the first of them stand before the first key.
    world.assert_right(torch.randn(3, 6, 2, 8), int32(*lengths), backend=any_backend)


@pytest.mark.parametrize("shape", [(0, 4, 8), (0, 3, 4, 8), (3, 0, 4, 8)], ids=str)
def test_no_rows(shape):
    seq_lens = torch.full(shape[:1], 7, dtype=torch.int32)
    state = tile_attention(torch.randn(shape), make_world().cache, seq_lens, return_lse=True)
    assert state.out.shape == shape
    assert state.lse.shape == shape[:-1]


def test_beam_ids_say_which_beam_a_row_reads(any_backend):
    world = make_world(num_beams=4)
    query, seq_lens = torch.randn(6, 2, 4, 8), int32(21, 20, 3, 21, 8, 0)
    world.assert_right(query, seq_lens, beam_ids=int64(3, 1, 1, 0, 3, 2), backend=any_backend)


def test_strided_queries():
    world = make_world()
    packed = torch.randn(3, 5, 12, 8)
    for query in (packed[:, :, 4:8], packed[:, 0, 4:8], packed.transpose(0, 1)[0, :, :4], packed[:, :, ::3]):
        actual = tile_attention(query, world.cache, int32(21, 6, 9))
        assert same_bits(actual, tile_attention(query.contiguous(), world.cache, int32(21, 6, 9)))


@pytest.mark.parametrize("num_heads", [1, 2])
def test_a_decoded_token_is_not_copied(num_heads, monkeypatch):
    world, query = make_world(num_heads=num_heads), torch.randn(3, 4, 8)
    seen = []

    def spy(rows, *args, **options):
        seen.append(rows.data_ptr())
        return pagedkv.paged_attention(rows, *args, **options)

    monkeypatch.setattr(MODULE, "paged_attention", spy)
    tile_attention(query, world.cache, int32(21, 6, 9))
    assert seen == [query.data_ptr()]


def test_tiles_stay_while_they_are_read(monkeypatch):
    """All pages are read, so that none can go while the op runs; after it the oldest can."""
    world, query = make_world(24, spare_pages=0), torch.randn(3, 4, 8)

    def crowded(*args, **options):
        with pytest.raises(pagedkv.OutOfPagesError, match="0 free, 0 evictable, 36 pinned"):
            world.cache.register_tile(0, 0, 6)
        return pagedkv.paged_attention(*args, **options)

    monkeypatch.setattr(MODULE, "paged_attention", crowded)
    world.assert_right(query, int32(24, 24, 24))
    world.cache.register_tile(0, 0, 6)


# Missing tiles.


@pytest.mark.parametrize(
    "tiles",
    [
        [(0, 0, 0)],
        [(0, 1, 2), (0, 1, 3), (2, 0, 1)],
        [(1, 0, 5), (1, 1, 5)],
        [(0, head, tile) for head in range(2) for tile in range(6)],
        [(beam, head, tile) for beam in range(3) for head in range(2) for tile in range(6)],
    ],
    ids=["start", "middle", "end", "all-of-a-beam", "all"],
)
@pytest.mark.parametrize("dtype", [F32, BF16, INT8], ids=str)
def test_tokens_of_missing_tiles_weigh_nothing(tiles, dtype, any_backend):
    world = make_world(dtype=dtype)
    held = without(world, *tiles)
    given = F32 if dtype == INT8 else dtype
    world.assert_right(torch.randn(3, 4, 8).to(given), int32(21, 21, 9), held=held, backend=any_backend)
    options = {"window_left": 5, "rope": pagedkv.RotaryEmbedding(8)}
    world.assert_right(torch.randn(3, 3, 4, 8).to(given), int32(21, 21, 9), held=held, backend=any_backend, **options)


def test_nothing_of_another_page_gets_in(any_backend):
    """Whatever page stands in for a missing tile, none of its numbers is used: NaN and infinity everywhere else."""
    world = make_world()
    held = without(world, (0, 0, 2), (0, 1, 0))
    pages = world.cache.table.host[0]
    others = torch.ones(world.cache.num_pages, dtype=torch.bool)
    others[pages[pages >= 0].long()] = False
    query = torch.randn(1, 5, 4, 8)
    for poison in (math.nan, math.inf):
        world.cache.key_pages[others] = poison
        world.cache.value_pages[others] = poison
        world.assert_right(query, int32(21), held=held, backend=any_backend)


def test_rows_with_all_tiles_do_not_notice_that_others_miss_some():
    world, query, seq_lens = make_world(), torch.randn(3, 4, 4, 8), int32(21, 20, 9)
    before = tile_attention(query, world.cache, seq_lens, return_lse=True)
    without(world, (1, 0, 3))
    after = tile_attention(query, world.cache, seq_lens, missing="skip", return_lse=True)
    for part, same in zip(after, before, strict=True):
        assert same_bits(part[[0, 2]], same[[0, 2]])
        assert same_bits(part[1, :, 2:], same[1, :, 2:])
        assert not torch.equal(part[1, :, :2], same[1, :, :2])


def test_a_missing_tile_is_an_error():
    world = make_world()
    without(world, (2, 1, 3))
    words = r"got no tile for beam 2, head 1, tile 3. Store it, or pass missing='skip'"
    for cache, heads in ((world.cache, None), (host_copy(world), 2)):
        with pytest.raises(ValueError, match=f"the 13 tokens that row 1 reads, {words}"):
            tile_attention(torch.randn(2, 4, 8), cache, int32(21, 13), beam_ids=int64(0, 2), num_kv_heads=heads)
        # Of a shorter row nothing is missing.
        tile_attention(torch.randn(2, 4, 8), cache, int32(21, 12), beam_ids=int64(0, 2), num_kv_heads=heads)
    assert world.cache.stats().num_pinned == 0


# The same bits, however the tiles lie.


@pytest.mark.parametrize("dtype", [F32, BF16, INT8], ids=str)
@pytest.mark.parametrize("q_len", [1, 7])
def test_alone_as_in_a_batch(dtype, q_len):
    world = make_world(300, num_beams=4, tile_size=16, dtype=dtype)
    query, seq_lens = torch.randn(4, q_len, 6, 8), int32(300, 257, 31, 8)
    whole = tile_attention(query, world.cache, seq_lens, return_lse=True)
    for row in range(4):
        one = slice(row, row + 1)
        alone = tile_attention(query[one], world.cache, seq_lens[one], beam_ids=int64(row), return_lse=True)
        assert all(same_bits(part, all_rows[one]) for part, all_rows in zip(alone, whole, strict=True))


def test_other_pages_give_the_same_bits():
    world = make_world(100, spare_pages=20)
    query, seq_lens = torch.randn(3, 2, 6, 8), int32(100, 77, 3)
    before = tile_attention(query, world.cache, seq_lens)
    other = make_world(1, num_beams=3, spare_pages=0, tile_size=4)
    cache = TileCache(300, 4, 8, num_beams=5, num_heads=2, num_tiles=40)
    for first in reversed(range(0, 100, 4)):
        for beam in (1, 2, 0):
            new = (kv[beam : beam + 1, :, first : first + 4] for kv in (world.key, world.value))
            cache.store(*new, int64(first), int64(4 - beam))
    assert len(other.cache) == 6
    assert same_bits(tile_attention(query, cache, seq_lens, beam_ids=int64(4, 3, 2)), before)


def test_shared_tiles_give_the_same_bits_as_copies():
    parent = make_world(150, num_beams=1, tile_size=16)
    heads = {"num_beams": 6, "num_heads": 2, "num_tiles": 20}
    shared, copied = (TileCache(150, 16, 8, **heads) for _ in range(2))
    shared.store(parent.key, parent.value, int64(0), int64(2))
    for beam in (0, 1, 3, 4, 5):
        shared.fork(2, beam)
    repeated = (kv.expand(6, -1, -1, -1) for kv in (parent.key, parent.value))
    copied.store(*repeated, torch.zeros(6, dtype=torch.int64))
    new = torch.randn(2, 6, 2, 3, 8)
    query, seq_lens = torch.randn(6, 4, 8), torch.full((6,), 153, dtype=torch.int32)
    for cache in (shared, copied):
        cache.store(*new, torch.full((6,), 150))
    assert len(shared) < len(copied)
    assert same_bits(tile_attention(query, shared, seq_lens), tile_attention(query, copied, seq_lens))


# Tiles on the host.


@pytest.mark.parametrize("dtype", [F32, F16, BF16, INT8], ids=str)
@pytest.mark.parametrize("tiles", [[], [(0, 0, 0), (1, 1, 5), (2, 1, 1)]], ids=["whole", "missing"])
def test_a_host_cache_gives_the_bits_of_the_pool(dtype, tiles):
    world = make_world(dtype=dtype)
    without(world, *tiles)
    host = host_copy(world)
    query, seq_lens, beam_ids = torch.randn(4, 3, 6, 8), int32(21, 9, 21, 0), int64(2, 1, 1, 0)
    options = {"beam_ids": beam_ids, "missing": "skip", "rope": pagedkv.RotaryEmbedding(8), "return_lse": True}
    pool_state = tile_attention(query, world.cache, seq_lens, **options)
    host_state = tile_attention(query, host, seq_lens, num_kv_heads=2, **options)
    assert all(map(same_bits, host_state, pool_state))


@pytest.mark.parametrize("dtype", [F32, INT8], ids=str)
def test_an_empty_host_cache(dtype):
    cache = HostTileCache(2, 4, 8, dtype=dtype)
    options = {"num_kv_heads": 1, "missing": "skip", "return_lse": True}
    for seq_len in (0, 9):
        out, lse = tile_attention(torch.randn(1, 2, 8), cache, int32(seq_len), **options)
        assert torch.equal(out, torch.zeros(1, 2, 8))
        assert torch.equal(lse, torch.full((1, 2), -math.inf))


def test_a_tile_with_keys_alone_is_missing():
    world = make_world()
    host = host_copy(world)
    host.remove((0, 1, 2, "v"))
    held = torch.ones(3, 2, 21, dtype=torch.bool)
    held[0, 1, 8:12] = False
    query = torch.randn(1, 4, 8)
    actual = tile_attention(query, host, int32(21), num_kv_heads=2, missing="skip")
    exact, plain = (world.expected(query, int32(21), a, held=held)[0][:, 0] for a in (torch.float64, F32))
    assert_close_to_oracle("out", actual, exact, plain)


# Threads.


@pytest.mark.parametrize("on_host", [False, True])
def test_threads_read_while_another_beam_changes(on_host):
    world = make_world(200, num_beams=3, tile_size=8, spare_pages=100)
    cache = host_copy(world) if on_host else world.cache
    query, seq_lens, options = torch.randn(2, 4, 8), int32(200, 133), {"num_kv_heads": 2}
    right = tile_attention(query, cache, seq_lens, **options)
    done = threading.Event()

    def read():
        return [tile_attention(query, cache, seq_lens, **options) for _ in range(40)]

    def write():
        num_changes = 0
        while not done.is_set():
            if on_host:
                cache.remove_sequence(2)
                cache.fork(0, 2)
            else:
                cache.remove_beam(2)
                cache.store(torch.randn(1, 2, 90, 8), torch.randn(1, 2, 90, 8), int64(0), int64(2))
            num_changes += 1
        return num_changes

    with ThreadPoolExecutor(3) as threads:
        writer, readers = threads.submit(write), [threads.submit(read) for _ in range(2)]
        try:
            results = [result for reader in readers for result in reader.result()]
        finally:
            done.set()
        assert writer.result() > 0
    assert all(same_bits(result, right) for result in results)


# Lengths far beyond what a cache holds.


def streamed(head_dim=8):
    """A sequence of 2**31 - 1 tokens of which a cache in RAM has the first tile and two near the end, and all of it."""
    cache, last = HostTileCache(8, 4, head_dim), (2**31 - 1) // 4
    positions, key, value = [], torch.randn(3, 4, head_dim), torch.randn(3, 4, head_dim)
    for row, tile in enumerate((0, last - 2, last)):
        cache.put((5, 0, tile, "k"), key[row])
        cache.put((5, 0, tile, "v"), value[row])
        positions += range(4 * tile, 4 * tile + 4)
    # A tile without values, and one of another head.
    cache.put((5, 0, last - 1, "k"), key[0])
    cache.put((5, 1, last - 1, "v"), key[0])
    return cache, torch.tensor(positions)[:11], key.flatten(0, 1)[:11], value.flatten(0, 1)[:11]


@pytest.mark.parametrize(
    "options", [{}, {"causal": False}, {"window_left": 10}, {"causal": False, "window_left": 4}], ids=str
)
@pytest.mark.parametrize("missing_end", [0, 1, 40])
def test_a_length_beyond_the_tiles_costs_nothing(options, missing_end):
    cache, positions, key, value = streamed()
    for cut in range(missing_end):
        cache.remove((5, 0, (2**31 - 1) // 4 - cut, "k"))
    there = positions < 4 * ((2**31 - 1) // 4 - missing_end + 1)
    query = torch.randn(1, 6, 2, 8)
    state = tile_attention(
        query, cache, int32(2**31 - 1), beam_ids=int64(5), num_kv_heads=1, missing="skip", return_lse=True, **options
    )
    rows = torch.arange(2**31 - 7, 2**31 - 1)[:, None]
    seen = there & ((positions <= rows) | (not options.get("causal", True)))
    seen &= positions >= rows - options.get("window_left", 2**31)
    for name, actual, right, rough in zip(
        ("out", "lse"),
        state,
        masked_rows(query[0].double(), key.double(), value.double(), seen),
        masked_rows(query[0], key, value, seen),
        strict=True,
    ):
        assert_close_to_oracle(name, actual[0], right, rough)


def masked_rows(query, key, value, seen):
    logits = (torch.einsum("qhd,kd->qhk", query, key) * 8**-0.5).masked_fill(~seen[:, None], -math.inf)
    lse = logits.logsumexp(2)
    return (logits - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp() @ value, lse


def test_a_length_beyond_the_tiles_is_an_error_at_once():
    cache, *_ = streamed()
    with pytest.raises(
        ValueError, match="the 2147483647 tokens that row 0 reads, got no tile for beam 5, head 0, tile 1"
    ):
        tile_attention(torch.zeros(1, 2, 8), cache, int32(2**31 - 1), beam_ids=int64(5), num_kv_heads=1)
    assert cache.stats().hits == 0
    with pytest.raises(ValueError, match=r"seq_lens must be in 0..32 \(8 tiles of 4 tokens\), got 33 for row 0"):
        tile_attention(
            torch.zeros(1, 2, 8), cache, int32(33), num_kv_heads=1, missing="skip", rope=pagedkv.RotaryEmbedding(8)
        )


def test_rows_count_and_use_the_tiles_that_they_read():
    world = make_world(24)
    before = world.cache.stats()
    tile_attention(torch.randn(3, 2, 8), world.cache, int32(24, 5, 0))
    after = world.cache.stats()
    assert (after.hits - before.hits, after.misses - before.misses) == (2 * (6 + 2), 0)
    without(world, (1, 0, 0))
    tile_attention(torch.randn(1, 2, 8), world.cache, int32(5), beam_ids=int64(1), missing="skip")
    assert world.cache.stats().misses - after.misses == 1


def test_reading_inside_of_on_evict_is_refused():
    refused = []

    def on_evict(*evicted):
        with pytest.raises(RuntimeError, match="must not be changed by its on_evict, nor may pages be pinned there"):
            tile_attention(torch.zeros(1, 1, 2), cache, int32(1))
        refused.append(evicted)

    cache = TileCache(1, 4, 2, num_beams=1, num_heads=1, num_tiles=2, on_evict=on_evict)
    for first in (0, 4):
        cache.store(torch.ones(1, 1, 4, 2), torch.ones(1, 1, 4, 2), int64(first))
    assert len(refused) == 1
    cache.check()


@pytest.mark.parametrize("on_host", [False, True])
def test_default_device_and_dtype_change_nothing(on_host):
    world, query, seq_lens = make_world(), torch.randn(3, 4, 8), int32(21, 9, 21)
    without(world, (0, 0, 1))
    cache = host_copy(world) if on_host else world.cache
    options = {"num_kv_heads": 2, "missing": "skip", "rope": pagedkv.RotaryEmbedding(8)}
    right = tile_attention(query, cache, seq_lens, **options)
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        actual = tile_attention(query, cache, seq_lens, **options)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert same_bits(actual, right)


# The table of exponentials.


def test_softmax_by_table(any_backend):
    """The bits of `paged_attention` with the same table, on the pages of the one KV head."""
    world = make_world(num_heads=1)
    cache, query, seq_lens = world.cache, torch.randn(3, 4, 8), int32(21, 6, 9)
    table = pagedkv.PageTable.from_dense(cache.table.host[:, 0].contiguous(), seq_lens, 4)
    plan = pagedkv.plan_attention(int32(0, 1, 2, 3), table, num_q_heads=4, num_kv_heads=1, head_dim=8)
    pages = cache.key_pages[:, :, None], cache.value_pages[:, :, None]
    by_table = tile_attention(query, cache, seq_lens, softmax="lut", backend=any_backend)
    assert same_bits(by_table, pagedkv.paged_attention(query, *pages, plan, softmax="lut", backend=any_backend))
    assert not torch.equal(by_table, tile_attention(query, cache, seq_lens, backend=any_backend))


# What is refused.


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"query": torch.zeros(3, 8)}, ValueError, r"query must have shape \[B, q_len, Hq, D\] with D = 8"),
        ({"query": torch.zeros(3, 4, 7)}, ValueError, r"query must have shape \[B, Hq, D\] with D = 8"),
        ({"query": [1.0]}, TypeError, "query must be a torch.Tensor, got list"),
        ({"query": torch.zeros(3, 4, 8, dtype=INT8)}, TypeError, "query must have dtype float32 or .*got int8"),
        ({"query": torch.zeros(3, 8, 4).mT}, ValueError, "query must have a contiguous last dimension"),
        ({"query": torch.zeros(3, 3, 8)}, ValueError, "heads of query must be a multiple of num_kv_heads = 2 .*got 3"),
        ({"query": torch.zeros(3, 0, 8)}, ValueError, "heads of query must be a multiple .*got 0"),
        ({"query": torch.zeros(4, 4, 8), "seq_lens": int32(1, 1, 1, 1)}, ValueError, "at most 3 rows .*with beam_ids"),
        ({"query": torch.zeros(3, 4, 8, requires_grad=True)}, ValueError, "query must not require a gradient"),
        ({"cache": torch.zeros(3)}, TypeError, "cache must be a TileCache or a HostTileCache, got Tensor"),
        ({"seq_lens": int64(1, 2, 3)}, TypeError, "seq_lens must have dtype int32, got int64"),
        (
            {"seq_lens": int32(1, 2)},
            ValueError,
            r"seq_lens must have shape \[B\] with B = 3 \(set by query\), got \[2\]",
        ),
        ({"seq_lens": int32(1, -1, 2)}, ValueError, r"seq_lens must be in 0..28 \(7 tiles of 4 .*got -1 for row 1"),
        ({"seq_lens": int32(1, 2, 29)}, ValueError, "seq_lens must be in 0..28 .*got 29 for row 2"),
        ({"beam_ids": int32(0, 1, 2)}, TypeError, "beam_ids must have dtype int64, got int32"),
        (
            {"beam_ids": int64(0, 1)},
            ValueError,
            r"beam_ids must have shape \[B\] with B = 3 \(set by query\), got \[2\]",
        ),
        ({"beam_ids": int64(0, 3, 1)}, ValueError, "beam_ids must be in 0..2 .*got 3 for row 1"),
        ({"beam_ids": int64(0, 1, -1)}, ValueError, "beam_ids must be in 0..2 .*got -1 for row 2"),
        ({"num_kv_heads": 4}, ValueError, "num_kv_heads must be 2 like that of the cache, got 4"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads must be at least 1, got 0"),
        ({"missing": "ignore"}, ValueError, "missing must be 'error' or 'skip', got 'ignore'"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive, got 0.0. For the best key alone"),
        ({"temperature": math.nan}, ValueError, "temperature must be a finite float32, got nan"),
        (
            {"temperature": 1e-39},
            ValueError,
            "sm_scale / temperature must be a finite float32, got 0.35.* / 1e-39. Take a higher temperature",
        ),
        (
            {"temperature": 1e-38, "soft_cap": 30.0},
            ValueError,
            "soft_cap / temperature must be a finite float32, got 30",
        ),
        ({"temperature": "hot"}, TypeError, "temperature must be a number, got str"),
        ({"soft_cap": -1.0}, ValueError, "soft_cap must be 0 .*got -1.0"),
        ({"sm_scale": "1"}, TypeError, "sm_scale must be a number, got str"),
        ({"causal": 1}, TypeError, "causal must be a bool, got int"),
        ({"window_left": -2}, ValueError, "window_left must be at least -1, got -2"),
        ({"softmax": "fast"}, ValueError, "softmax must be 'exact', 'lut' or an ExpTable, got 'fast'"),
    ],
    ids=str,
)
def test_refuses(change, error, words):
    cache = make_world().cache
    call = {"query": torch.zeros(3, 4, 8), "cache": cache, "seq_lens": int32(21, 3, 4), **change}
    with pytest.raises(error, match=words):
        tile_attention(call.pop("query"), call.pop("cache"), call.pop("seq_lens"), **call)
    assert cache.stats().num_pinned == 0


def test_a_host_cache_does_not_tell_the_number_of_heads():
    with pytest.raises(ValueError, match="num_kv_heads must be given for a HostTileCache, .*got None"):
        tile_attention(torch.zeros(1, 2, 8), HostTileCache(2, 4, 8), int32(1))
