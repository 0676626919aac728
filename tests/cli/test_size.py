"""The arithmetic of `pagedkv size` agrees with the specs, rank by rank."""

import pytest
import torch
from transformers import DeepseekV3Config, LlamaConfig

from pagedkv.cli.options import KVDtype
from pagedkv.cli.size import describe_size, spec_of_config, spec_of_geometry
from pagedkv.shapes import QUANTISED_DTYPES
from pagedkv.spec import CACHE_DTYPES


def rows(spec, **asked):
    return dict(describe_size(spec, **asked))


def test_geometry_by_hand():
    spec = spec_of_geometry(32, 8, 128, dtype=None, page_size=None, tp_size=1)
    shown = rows(spec, memory_bytes=8 * 2**30, num_tokens=33)
    assert shown["dtype"] == "float16"
    assert shown["bytes per token"] == "131,072 (128.0 KiB)"
    assert shown["bytes per page of 16 tokens"] == "2,097,152 (2.0 MiB)"
    assert shown["pages in 8.0 GiB"] == "4,096"
    assert shown["tokens in 8.0 GiB"] == "65,536"
    assert shown["pages for 33 tokens"] == "3"
    assert shown["memory for 33 tokens"] == "6,291,456 (6.0 MiB)"


@pytest.mark.parametrize("missing", range(3))
def test_geometry_that_lacks_a_number_is_refused(missing):
    numbers = [32, 8, 128]
    numbers[missing] = None
    with pytest.raises(ValueError, match="geometry must be --model, or all of --layers, --kv-heads and --head-dim"):
        spec_of_geometry(*numbers, dtype=None, page_size=None, tp_size=1)


@pytest.mark.parametrize("tp_size, heads", [(1, 8), (4, 2), (8, 1), (16, 1)])
def test_geometry_of_a_rank(tp_size, heads):
    spec = spec_of_geometry(32, 8, 128, dtype=torch.float32, page_size=4, tp_size=tp_size)
    assert spec.bytes_per_token == 32 * heads * 128 * 2 * 4
    assert rows(spec, tp_size=tp_size)["cache"].startswith(f"{heads} KV heads x 128, 32 layers")


def test_geometry_that_ranks_cannot_split_is_refused():
    with pytest.raises(ValueError, match="tp_size must divide num_kv_heads = 8 or be a multiple of it, got 3"):
        spec_of_geometry(32, 8, 128, dtype=None, page_size=None, tp_size=3)


def test_config_with_latents():
    config = DeepseekV3Config(num_hidden_layers=61, kv_lora_rank=512, qk_rope_head_dim=64)
    spec = spec_of_config(config, dtype=torch.bfloat16, page_size=None, tp_size=2)
    shown = rows(spec, tp_size=2)
    assert shown["bytes per token"].startswith("70,272 ")
    assert "bytes per page of 64 tokens" in shown
    assert shown["cache"] == "latent 512 + rope key 64 a token (MLA), 61 layers, whole on each of 2 ranks"


@pytest.mark.parametrize(
    "dtype, name, num_bytes",
    [
        (KVDtype.INT8, "int8, and a float32 scale for each token and head of K and of V", 128 + 4),
        (KVDtype.FLOAT8_E4M3FN, "float8_e4m3fn, and a float32 scale for each token and head of K and of V", 128 + 4),
        (KVDtype.FLOAT8_E5M2, "float8_e5m2", 128),
    ],
)
def test_quantised_bytes_include_the_scales(dtype, name, num_bytes):
    spec = spec_of_geometry(32, 8, 128, dtype=dtype.torch_dtype, page_size=None, tp_size=2)
    shown = rows(spec, memory_bytes=2**20, num_tokens=17)
    of_token = 32 * 2 * 4 * num_bytes
    assert shown["dtype"] == name
    assert shown["bytes per token"].startswith(f"{of_token:,} ")
    assert shown["bytes per page of 16 tokens"].startswith(f"{16 * of_token:,} ")
    assert shown["pages in 1.0 MiB"] == f"{2**20 // (16 * of_token)}"
    assert shown["memory for 17 tokens"].startswith(f"{2 * 16 * of_token:,} ")


def test_config_with_latents_has_no_quantised_form():
    config = DeepseekV3Config(num_hidden_layers=2)
    with pytest.raises(ValueError, match="dtype must be float32 or float16 or bfloat16, got int8"):
        spec_of_config(config, dtype=KVDtype.INT8.torch_dtype, page_size=None, tp_size=1)


def test_every_dtype_of_the_command_line_makes_a_spec():
    assert KVDtype.AUTO.torch_dtype is None
    dtypes = [choice.torch_dtype for choice in KVDtype if choice is not KVDtype.AUTO]
    assert set(dtypes) == set(CACHE_DTYPES + QUANTISED_DTYPES)
    for choice, dtype in zip(list(KVDtype)[1:], dtypes, strict=True):
        assert rows(spec_of_geometry(1, 1, 8, dtype=dtype, page_size=4, tp_size=1))["dtype"].startswith(choice.value)


def test_config_keeps_its_dtype_and_heads():
    config = LlamaConfig(
        num_hidden_layers=3, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, dtype="bfloat16"
    )
    shown = rows(spec_of_config(config, dtype=None, page_size=8, tp_size=1))
    assert shown["dtype"] == "bfloat16"
    assert shown["cache"] == "2 KV heads x 16, 3 layers"
    assert shown["bytes per token"] == "384 (384 B)"
