import dataclasses

import pytest
import torch
import transformers

from pagedkv import KVCacheSpec, MLACacheSpec, calc_kv_cache_memory


def test_sizes_of_a_known_model():
    spec = KVCacheSpec(num_layers=30, num_kv_heads=3, head_dim=64, page_size=16, dtype=torch.bfloat16)
    assert spec.bytes_per_token == 23_040
    assert spec.bytes_per_page == 16 * 23_040
    assert spec.num_pages(spec.bytes_per_page * 7 - 1) == 6
    assert spec.num_pages(0) == 0


def test_memory_of_the_textbook_example():
    assert calc_kv_cache_memory(32, 8, 128, 8192) == 2**30
    assert calc_kv_cache_memory(32, 8, 128, 512, page_size=16) == 2**30
    assert calc_kv_cache_memory(32, 8, 128, 8192, torch.float32) == 2**31
    assert calc_kv_cache_memory(32, 8, 128, 0) == 0


def test_value_dim_and_per_layer_geometry_are_summed():
    spec = KVCacheSpec(num_layers=3, num_kv_heads=(2, 0, 4), head_dim=(8, 8, 16), value_dim=4, dtype=torch.float32)
    assert [layer.num_elements for layer in spec.layers] == [2 * 12, 0, 4 * 20]
    assert spec.bytes_per_token == 4 * 104
    assert not spec.is_uniform
    assert KVCacheSpec(num_layers=2, num_kv_heads=[1, 2], head_dim=8) == KVCacheSpec(2, (1, 2), 8)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_scales_are_counted(dtype):
    spec = KVCacheSpec(num_layers=30, num_kv_heads=3, head_dim=64, page_size=16, dtype=dtype)
    assert spec.is_quantized
    assert spec.has_scales
    assert spec.bytes_per_token == 30 * 2 * 3 * (64 + 4)
    assert spec.bytes_per_page == 16 * spec.bytes_per_token
    assert spec.num_pages(spec.bytes_per_page * 7 - 1) == 6
    assert calc_kv_cache_memory(30, 3, 64, 5, dtype, page_size=16) == 5 * spec.bytes_per_page
    uneven = KVCacheSpec(num_layers=2, num_kv_heads=(2, 0), head_dim=8, value_dim=4, page_size=4, dtype=dtype)
    assert uneven.bytes_per_token == 2 * (8 + 4) + 2 * 2 * 4


def test_a_page_with_scales_ends_where_the_scales_of_the_next_are_aligned():
    spec = KVCacheSpec(num_layers=1, num_kv_heads=1, head_dim=3, value_dim=2, page_size=1, dtype=torch.int8)
    assert (spec.bytes_per_token, spec.bytes_per_page) == (13, 16)


def test_float8_e5m2_is_quantized_without_scales():
    spec = KVCacheSpec(num_layers=1, num_kv_heads=2, head_dim=8, dtype=torch.float8_e5m2)
    assert spec.is_quantized
    assert not spec.has_scales
    assert spec.bytes_per_token == 32
    assert not KVCacheSpec(num_layers=1, num_kv_heads=2, head_dim=8).is_quantized


def test_from_config_takes_a_quantized_dtype():
    config = transformers.LlamaConfig(num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, hidden_size=64)
    spec = KVCacheSpec.from_config(config, dtype=torch.int8)
    assert spec == KVCacheSpec(2, 4, 8, dtype=torch.int8)
    assert spec.bytes_per_token == 2 * 2 * 4 * (8 + 4)


def test_mla_pages_are_not_quantized():
    with pytest.raises(ValueError, match=r"dtype must be float32 or float16 or bfloat16, got int8\."):
        MLACacheSpec(num_layers=1, dtype=torch.int8)


def test_spec_is_frozen_and_hashable():
    spec = KVCacheSpec(num_layers=1, num_kv_heads=1, head_dim=8)
    assert spec in {spec}
    with pytest.raises(dataclasses.FrozenInstanceError, match="page_size"):
        spec.page_size = 3


@pytest.mark.parametrize(
    "fields, error, words",
    [
        ({"num_layers": 0}, ValueError, "num_layers must be at least 1, got 0"),
        ({"num_layers": 2.0}, TypeError, "num_layers must be an int, got float"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads must be at least 1, got 0"),
        ({"num_kv_heads": (0, 0)}, ValueError, "num_kv_heads must be positive in at least one layer"),
        ({"head_dim": (8,)}, ValueError, r"head_dim must be one int or 2 \(num_layers\) ints, got 1"),
        ({"head_dim": (8, -1)}, ValueError, "head_dim of layer 1 must be at least 1, got -1"),
        ({"page_size": True}, TypeError, "page_size must be an int, got bool"),
        (
            {"dtype": torch.int64},
            ValueError,
            "dtype must be float32 or float16 or bfloat16 or int8 or float8_e4m3fn or float8_e5m2, got int64",
        ),
        ({"dtype": "float16"}, TypeError, "dtype must be a torch.dtype, got str"),
        ({"layout": "DHN"}, ValueError, "layout must be 'NHD' or 'HND', got 'DHN'"),
        ({"order": "last"}, ValueError, "order must be 'layer_first' or 'page_first', got 'last'"),
    ],
)
def test_spec_refuses(fields, error, words):
    with pytest.raises(error, match=words):
        KVCacheSpec(**{"num_layers": 2, "num_kv_heads": 1, "head_dim": 8, **fields})


def test_num_pages_refuses_negative_memory():
    with pytest.raises(ValueError, match="memory_bytes must be at least 0, got -1"):
        KVCacheSpec(1, 1, 8).num_pages(-1)


@pytest.mark.parametrize("tp_size, heads", [(1, 4), (2, 2), (4, 1), (8, 1)])
def test_from_config_gives_one_rank_its_heads(tp_size, heads):
    config = transformers.LlamaConfig(
        num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, hidden_size=64, dtype="bfloat16"
    )
    spec = KVCacheSpec.from_config(config, tp_size, page_size=32, layout="HND", order="page_first")
    assert spec == KVCacheSpec(2, heads, 8, 32, torch.bfloat16, "HND", "page_first")


def test_from_config_refuses_a_split_that_leaves_parts_of_heads():
    config = transformers.LlamaConfig(num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=6, hidden_size=48)
    with pytest.raises(ValueError, match="tp_size must divide num_kv_heads = 6 or be a multiple of it, got 4"):
        KVCacheSpec.from_config(config, 4)


def test_from_config_respects_layers_that_differ():
    config = transformers.Gemma4TextConfig(num_hidden_layers=6, num_kv_shared_layers=2)
    spec = KVCacheSpec.from_config(config)
    assert spec.num_kv_heads == (4, 4, 4, 4, 0, 0)
    assert spec.head_dim == (256, 256, 256, 256, 256, 512)


def test_from_config_counts_attention_layers_of_a_hybrid_alone():
    spec = KVCacheSpec.from_config(transformers.Qwen3NextConfig(num_hidden_layers=8))
    assert [layer.num_kv_heads for layer in spec.layers] == [0, 0, 0, 2, 0, 0, 0, 2]


def test_from_config_knows_multi_query_and_missing_head_dim():
    assert KVCacheSpec.from_config(transformers.FalconConfig(num_hidden_layers=1)).num_kv_heads == 1
    assert KVCacheSpec.from_config(transformers.OPTConfig()).head_dim == 64


def test_from_config_reads_the_text_part_of_a_larger_config():
    config = transformers.Gemma3Config(text_config={"num_hidden_layers": 3})
    assert KVCacheSpec.from_config(config).num_layers == 3


def test_from_config_sends_mla_models_to_their_spec():
    config = transformers.DeepseekV3Config(num_hidden_layers=2)
    with pytest.raises(ValueError, match="got an MLA model. Use MLACacheSpec.from_config"):
        KVCacheSpec.from_config(config)
    spec = MLACacheSpec.from_config(config, dtype=torch.bfloat16)
    assert (spec.latent_dim, spec.rope_dim, spec.bytes_per_token) == (512, 64, 2 * 576 * 2)
    assert spec.num_pages(spec.bytes_per_page * 3) == 3


def test_mla_from_config_refuses_other_models():
    with pytest.raises(ValueError, match="hf_config must have kv_lora_rank, got LlamaConfig without"):
        MLACacheSpec.from_config(transformers.LlamaConfig())


def test_from_config_refuses_a_cache_it_does_not_know():
    config = transformers.LlamaConfig(num_hidden_layers=1)
    config.layer_types = ["compressed_sparse_attention"]
    with pytest.raises(ValueError, match="layer 0 of hf_config must be one of full_attention.*got 'compressed_sparse"):
        KVCacheSpec.from_config(config)
