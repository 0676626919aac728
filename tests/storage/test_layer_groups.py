import random

import pytest
import torch

from pagedkv import KVCacheSpec
from pagedkv.storage import LayerGroup, make_layer_groups
from pagedkv.storage.layer_groups import calc_bytes_per_page


def make_spec(**fields):
    return KVCacheSpec(**{"num_layers": 6, "num_kv_heads": 1, "head_dim": 8, "page_size": 16, **fields})


def test_gemma_3_270m_has_pages_of_16_and_of_80_tokens():
    spec = make_spec(num_layers=18, head_dim=256, dtype=torch.bfloat16)
    windows = [None if layer % 6 == 5 else 512 for layer in range(18)]
    full, sliding = make_layer_groups(spec, windows)
    assert full == LayerGroup(layers=(5, 11, 17), window=None, page_size=80)
    assert sliding == LayerGroup(tuple(layer for layer in range(18) if layer % 6 < 5), window=512, page_size=16)
    assert calc_bytes_per_page(spec, (full, sliding)) == 15 * 16 * 2 * 256 * 2 == 3 * 80 * 2 * 256 * 2


def test_as_many_full_as_sliding_layers_get_one_page_size():
    groups = make_layer_groups(make_spec(), [128, None] * 3)
    assert groups == (LayerGroup((1, 3, 5), None, 16), LayerGroup((0, 2, 4), 128, 16))


def test_the_full_group_comes_first_and_then_the_first_layer_counts():
    groups = make_layer_groups(make_spec(num_layers=7), [64, 32, 64, 128, None, 32, 64])
    assert [(group.layers, group.window) for group in groups] == [
        ((4,), None),
        ((0, 2, 6), 64),
        ((1, 5), 32),
        ((3,), 128),
    ]
    assert [group.page_size for group in groups] == [48, 16, 16, 48]


@pytest.mark.parametrize("window", [None, 5])
def test_equal_windows_are_one_group_of_the_page_size_of_the_spec(window):
    assert make_layer_groups(make_spec(), [window] * 6) == (LayerGroup(tuple(range(6)), window, 16),)


@pytest.mark.parametrize("full, sliding, factor", [(4, 22, 5), (5, 29, 5), (10, 52, 5), (3, 2, 1)])
def test_what_does_not_divide_is_rounded_down_to_whole_pages_of_the_spec(full, sliding, factor):
    spec = make_spec(num_layers=full + sliding)
    sizes = [group.page_size for group in make_layer_groups(spec, [None] * full + [64] * sliding)]
    assert sizes == ([16 * factor, 16] if full < sliding else [16, 16 * factor])


def test_bytes_count_and_not_layers():
    # 3 * (8 + 8) + 4 * (4 + 2) = 72 elements a token against 1 * (8 + 4) = 12.
    spec = make_spec(num_layers=4, num_kv_heads=(3, 0, 4, 1), head_dim=(8, 8, 4, 8), value_dim=(8, 8, 2, 4))
    assert make_layer_groups(spec, [7, 7, 7, None]) == (LayerGroup((3,), None, 96), LayerGroup((0, 2), 7, 16))


@pytest.mark.parametrize("dtype, page_size", [(torch.float8_e5m2, 128), (torch.int8, 64)])
def test_scales_count_too(dtype, page_size):
    # 2 * 16 codes a token against 4; with the scales of 2 * 2 and of 2 heads they are 48 against 12 bytes.
    spec = make_spec(num_layers=3, head_dim=(8, 8, 2), dtype=dtype)
    assert make_layer_groups(spec, [64, 64, None])[0] == LayerGroup((2,), None, page_size)


def test_layers_that_store_nothing_are_in_no_group_whatever_their_window():
    spec = make_spec(num_kv_heads=(0, 1, 1, 0, 1, 0))
    assert make_layer_groups(spec, [None, 64, 32, 64, 64, 8]) == (LayerGroup((1, 4), 64, 16), LayerGroup((2,), 32, 32))


@pytest.mark.parametrize("seed", range(20))
def test_every_page_is_as_large_as_whole_pages_of_the_spec_allow(seed):
    rng = random.Random(seed)
    num_layers = rng.randint(1, 12)
    spec = make_spec(
        num_layers=num_layers,
        num_kv_heads=[rng.randint(1, 4) for _ in range(num_layers)],
        head_dim=[rng.choice([1, 3, 8]) for _ in range(num_layers)],
        page_size=rng.choice([1, 5, 16]),
        dtype=rng.choice([torch.float32, torch.float16, torch.int8]),
    )
    groups = make_layer_groups(spec, [rng.choice([None, 4, 9]) for _ in range(num_layers)])
    most = calc_bytes_per_page(spec, groups)
    assert sorted(layer for group in groups for layer in group.layers) == list(range(num_layers))
    assert min(group.page_size for group in groups) == spec.page_size
    for group in groups:
        bytes_per_token = group.sub_spec(spec).bytes_per_token
        assert group.page_size % spec.page_size == 0
        assert group.sub_spec(spec).bytes_per_page <= most < (group.page_size + spec.page_size) * bytes_per_token + 4
        assert most < 2 * group.page_size * bytes_per_token + 4


def test_the_sub_spec_is_that_of_the_layers_in_pages_that_are_one_run():
    spec = make_spec(num_kv_heads=(1, 2, 3, 4, 5, 6), value_dim=4, layout="HND", dtype=torch.int8)
    sub_spec = LayerGroup((1, 4), None, 48).sub_spec(spec)
    assert sub_spec.layers == (spec.layers[1], spec.layers[4])
    assert (sub_spec.page_size, sub_spec.order, sub_spec.layout, sub_spec.dtype) == (
        48,
        "page_first",
        "HND",
        torch.int8,
    )


def test_a_list_of_layers_becomes_a_tuple_so_that_groups_can_be_keys():
    assert {LayerGroup([0, 2], 4, 16): 1}[LayerGroup((0, 2), 4, 16)] == 1


@pytest.mark.parametrize(
    "layers, window, page_size, error, message",
    [
        ((), None, 16, ValueError, r"layers must name at least one layer, got none\."),
        (3, None, 16, TypeError, r"layers must be a tuple of ints, got int\."),
        ((0, "1"), None, 16, TypeError, r"layers\[1\] must be an int, got str\."),
        ((-1, 0), None, 16, ValueError, r"layers\[0\] must be at least 0, got -1\."),
        ((0, 2, 1), None, 16, ValueError, r"layers must be ascending, got \(0, 2, 1\)\."),
        ((0, 0), None, 16, ValueError, r"layers must be ascending, got \(0, 0\)\."),
        ((0,), 0, 16, ValueError, r"window must be at least 1, got 0\."),
        ((0,), 1.5, 16, TypeError, r"window must be an int, got float\."),
        ((0,), None, 0, ValueError, r"page_size must be at least 1, got 0\."),
    ],
)
def test_fields_of_a_group_are_checked(layers, window, page_size, error, message):
    with pytest.raises(error, match=message):
        LayerGroup(layers, window, page_size)


@pytest.mark.parametrize(
    "windows, error, message",
    [
        ([None] * 5, ValueError, r"windows must be 6, one a layer of spec, got 5\."),
        (512, TypeError, r"windows must be a sequence of ints and None, got int\."),
        ([None, -1, 1, 1, 1, 1], ValueError, r"window of layer 1 must be at least 1, got -1\."),
        ("window", TypeError, r"window of layer 0 must be an int, got str\."),
    ],
)
def test_windows_are_checked(windows, error, message):
    with pytest.raises(error, match=message):
        make_layer_groups(make_spec(), windows)


def test_what_is_no_spec_is_refused():
    with pytest.raises(TypeError, match=r"spec must be a KVCacheSpec, got dict\."):
        make_layer_groups({}, [None])
    with pytest.raises(TypeError, match=r"spec must be a KVCacheSpec, got dict\."):
        calc_bytes_per_page({}, [])
