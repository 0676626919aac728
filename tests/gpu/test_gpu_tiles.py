"""A TileCache on the device: its table is the one on the host, and attention over it is that of the CPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from pagedkv import TileCache, tile_attention
from pagedkv.testing.numeric import assert_close_to_oracle


def make_cache(device, dtype):
    return TileCache(60, 4, 16, num_beams=3, num_heads=2, num_tiles=8, dtype=dtype, device=device)


def attention_over(cache, query, length, arithmetic):
    """[beams, heads, head_dim], from the tiles one by one."""
    out = torch.empty(query.shape, dtype=arithmetic)
    for beam, head in itertools.product(range(3), range(4)):
        key, value = (tokens_of(cache, beam, head // 2, part, length, arithmetic) for part in "kv")
        weights = torch.softmax(key @ query[beam, head].to(arithmetic) / 4, dim=0)
        out[beam, head] = weights @ value
    return out


def tokens_of(cache, beam, head, part, length, arithmetic):
    tiles = [cache.get(beam, head, tile, part) for tile in range(-(-length // 4))]
    numbers = [tile if isinstance(tile, torch.Tensor) else tile.values * tile.scales[:, None] for tile in tiles]
    return torch.cat(numbers)[:length].cpu().to(arithmetic)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_tiles_on_the_device_are_those_of_the_cpu(device, dtype, tmp_path):
    generator = torch.Generator().manual_seed(0)
    caches = {place: make_cache(place, dtype) for place in ("cpu", device)}
    first = torch.zeros(3, dtype=torch.int64)
    length = 0
    for num_tokens in (9, 1, 1, 5):
        shape = 3, 2, num_tokens, 16
        tokens = [torch.randn(shape, generator=generator).to(dtype if dtype != torch.int8 else torch.float32)] * 2
        query = torch.randn(3, 4, 16, generator=generator)
        length += num_tokens
        lengths = torch.full((3,), length, dtype=torch.int32)
        for place, cache in caches.items():
            cache.store(*(part.to(place) for part in tokens), first)
            out = tile_attention(query.to(place), cache, lengths).cpu()
            exact, plain = (attention_over(cache, query, length, each) for each in (torch.float64, torch.float32))
            assert_close_to_oracle("out", out, exact, plain)
            cache.check()
            cache.reorder([1, 1, 0])
            cache.check()
        first = first + num_tokens
        assert torch.equal(caches["cpu"].table.host, caches[device].table.host)
        assert torch.equal(caches[device].table.device_table.cpu(), caches["cpu"].table.host)
    path = tmp_path / "tiles"
    caches[device].save(path)
    again = make_cache(device, dtype)
    again.load(path)
    for head in range(2):
        mine, theirs = (caches[place].get(0, head, 1, "k") for place in ("cpu", device))
        loaded = again.get(0, head, 1, "k")
        if dtype == torch.int8:
            mine, theirs, loaded = mine.values, theirs.values, loaded.values
        assert torch.equal(mine, theirs.cpu())
        assert torch.equal(theirs, loaded)


def test_changes_while_an_upload_is_queued_do_not_reach_it(device):
    """The device is busy when the host's table changes again: what was asked for is what the table was then."""
    cache = make_cache(device, torch.float32)
    busy = torch.randn(4096, 4096, device=device)
    for _ in range(20):
        busy = busy @ busy * 1e-3
    seen, expected = [], []
    for page in range(20):
        cache.table.assign(page % 3, page % 2, page % 8, page)
        expected.append(cache.table.host.clone())
        seen.append(cache.table.device_table.clone())
    for was, wanted in zip(seen, expected, strict=True):
        assert torch.equal(was.cpu(), wanted)
