"""The surface: every name is there, documented, and takes its arguments under FlashInfer's names."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pagedkv
import pagedkv.integrations.flashinfer as flashinfer
from pagedkv.errors import BackendUnavailableError
from pagedkv.integrations.flashinfer.vendor_only import VENDOR_ONLY

DOCS = Path(pagedkv.__file__).resolve().parents[2] / "docs" / "flashinfer.md"
MODULES = ["attention", "cascade", "decode", "mla", "page", "pod", "prefill", "quantization", "rope", "sparse", "utils"]

# The arguments by position, as programs give them.
POSITIONAL = {
    "append_paged_kv_cache": ""
    "append_key append_value batch_indices positions paged_kv_cache kv_indices kv_indptr kv_last_page_len "
    "kv_layout",
    "append_paged_mla_kv_cache": ""
    "append_ckv append_kpe batch_indices positions ckv_cache kpe_cache kv_indices kv_indptr "
    "kv_last_page_len",
    "get_batch_indices_positions": "append_indptr seq_lens nnz batch_indices positions",
    "get_seq_lens": "kv_indptr kv_last_page_len page_size",
    "single_decode_with_kv_cache": ""
    "q k v kv_layout pos_encoding_mode use_tensor_cores q_scale k_scale v_scale window_left "
    "logits_soft_cap sm_scale rope_scale rope_theta return_lse",
    "single_prefill_with_kv_cache": ""
    "q k v scale_q scale_k scale_v o_dtype custom_mask packed_custom_mask causal kv_layout "
    "pos_encoding_mode use_fp16_qk_reduction sm_scale window_left logits_soft_cap rope_scale rope_theta "
    "backend return_lse kv_cache_sf k_scale v_scale",
    "BatchDecodeWithPagedKVCacheWrapper": ""
    "float_workspace_buffer kv_layout use_cuda_graph use_tensor_cores paged_kv_indptr_buffer "
    "paged_kv_indices_buffer paged_kv_last_page_len_buffer backend jit_args",
    "BatchDecodeWithPagedKVCacheWrapper.plan": ""
    "indptr indices last_page_len num_qo_heads num_kv_heads head_dim page_size",
    "BatchPrefillWithPagedKVCacheWrapper": ""
    "float_workspace_buffer kv_layout use_cuda_graph qo_indptr_buf paged_kv_indptr_buf "
    "paged_kv_indices_buf paged_kv_last_page_len_buf custom_mask_buf mask_indptr_buf backend jit_args "
    "jit_kwargs",
    "BatchPrefillWithPagedKVCacheWrapper.plan": ""
    "qo_indptr paged_kv_indptr paged_kv_indices paged_kv_last_page_len num_qo_heads num_kv_heads "
    "head_dim_qk page_size head_dim_vo custom_mask packed_custom_mask causal pos_encoding_mode "
    "use_fp16_qk_reduction sm_scale window_left logits_soft_cap rope_scale rope_theta q_data_type "
    "kv_data_type o_data_type non_blocking",
    "BatchPrefillWithRaggedKVCacheWrapper": ""
    "float_workspace_buffer kv_layout use_cuda_graph qo_indptr_buf kv_indptr_buf custom_mask_buf "
    "mask_indptr_buf backend jit_args jit_kwargs",
    "BatchPrefillWithRaggedKVCacheWrapper.plan": ""
    "qo_indptr kv_indptr num_qo_heads num_kv_heads head_dim_qk head_dim_vo custom_mask packed_custom_mask "
    "causal pos_encoding_mode use_fp16_qk_reduction window_left logits_soft_cap sm_scale rope_scale "
    "rope_theta q_data_type kv_data_type o_data_type non_blocking",
    "BatchMLAPagedAttentionWrapper": ""
    "float_workspace_buffer use_cuda_graph qo_indptr kv_indptr kv_indices kv_len_arr backend",
    "BatchMLAPagedAttentionWrapper.plan": ""
    "qo_indptr kv_indptr kv_indices kv_len_arr num_heads head_dim_ckv head_dim_kpe page_size causal "
    "sm_scale q_data_type kv_data_type use_profiler",
    "BatchMLAPagedAttentionWrapper.run": ""
    "q_nope q_pe ckv_cache kpe_cache out lse return_lse profiler_buffer kv_len page_table "
    "return_lse_base_on_e o_scale",
    "MultiLevelCascadeAttentionWrapper": ""
    "num_levels float_workspace_buffer kv_layout use_cuda_graph qo_indptr_buf_arr paged_kv_indptr_buf_arr "
    "paged_kv_indices_buf_arr paged_kv_last_page_len_buf_arr",
    "MultiLevelCascadeAttentionWrapper.plan": ""
    "qo_indptr_arr paged_kv_indptr_arr paged_kv_indices_arr paged_kv_last_page_len num_qo_heads "
    "num_kv_heads head_dim page_size causal pos_encoding_mode use_fp16_qk_reduction sm_scale window_left "
    "logits_soft_cap rope_scale rope_theta q_data_type kv_data_type",
    "PODWithPagedKVCacheWrapper.plan": ""
    "indptr indices last_page_len num_qo_heads num_kv_heads head_dim page_size pos_encoding_mode "
    "window_left q_data_type kv_data_type data_type sm_scale rope_scale rope_theta non_blocking",
    "PODWithPagedKVCacheWrapper.run": ""
    "q_p k_p v_p q_d paged_kv_cache_d custom_mask_p packed_custom_mask_p causal_p kv_layout_p "
    "pos_encoding_mode_p sm_scale_p window_left_p rope_scale_p rope_theta_p return_lse_p custom_mask_d "
    "packed_custom_mask_d causal_d kv_layout_d pos_encoding_mode_d sm_scale_d window_left_d rope_scale_d "
    "rope_theta_d q_scale k_scale v_scale return_lse_d use_fp16_qk_reduction enable_pdl",
    "BatchPODWithPagedKVCacheWrapper.plan": ""
    "qo_indptr_p kv_indptr_p kv_indices_p last_page_len_p qo_indptr_d kv_indptr_d kv_indices_d "
    "last_page_len_d num_qo_heads num_kv_heads head_dim page_size pos_encoding_mode window_left "
    "q_data_type kv_data_type data_type sm_scale rope_scale rope_theta non_blocking",
    "BatchPODWithPagedKVCacheWrapper.run": ""
    "q_p paged_kv_cache_p q_d paged_kv_cache_d custom_mask_p packed_custom_mask_p causal_p q_scale "
    "k_scale v_scale return_lse use_fp16_qk_reduction enable_pdl",
    "BatchAttention": "kv_layout device",
    "BatchAttention.plan": ""
    "qo_indptr kv_indptr kv_indices kv_len_arr num_qo_heads num_kv_heads head_dim_qk head_dim_vo "
    "page_size causal sm_scale logits_soft_cap q_data_type kv_data_type use_profiler",
    "BatchAttention.run": "q kv_cache out lse k_scale v_scale logits_soft_cap profiler_buffer kv_cache_sf",
    "BlockSparseAttentionWrapper.plan": ""
    "indptr indices M N R C num_qo_heads num_kv_heads head_dim mask packed_mask causal pos_encoding_mode "
    "use_fp16_qk_reduction logits_soft_cap sm_scale rope_scale rope_theta q_data_type kv_data_type "
    "o_data_type non_blocking",
    "BlockSparseAttentionWrapper.run": "q k v scale_q scale_k scale_v out lse return_lse enable_pdl",
    "VariableBlockSparseAttentionWrapper.plan": ""
    "block_mask_map block_row_sz block_col_sz num_qo_heads num_kv_heads head_dim causal pos_encoding_mode "
    "use_fp16_qk_reduction logits_soft_cap sm_scale rope_scale rope_theta non_blocking q_data_type "
    "kv_data_type",
    "merge_state": "v_a s_a v_b s_b",
    "merge_state_in_place": "v s v_other s_other mask",
    "merge_states": "v s",
    "packbits": "x bitorder",
    "segment_packbits": "x indptr bitorder",
    "apply_rope": "q k indptr offsets rotary_dim interleave rope_scale rope_theta",
    "apply_llama31_rope_pos_ids": ""
    "q k pos_ids rotary_dim interleave rope_scale rope_theta low_freq_factor high_freq_factor "
    "old_context_len",
    "apply_rope_with_cos_sin_cache": "positions query key head_size cos_sin_cache is_neox",
}


@pytest.mark.parametrize("name", POSITIONAL)
def test_arguments_have_their_names_and_places(name):
    target = flashinfer
    for part in name.split("."):
        target = getattr(target, part)
    taken = [parameter for parameter in inspect.signature(target).parameters if parameter != "self"]
    expected = POSITIONAL[name].split()
    assert taken[: len(expected)] == expected


@pytest.mark.parametrize("module", MODULES)
def test_submodules_are_where_they_are_looked_for(module):
    found = importlib.import_module(f"pagedkv.integrations.flashinfer.{module}")
    assert getattr(flashinfer, module) is found
    for name in found.__all__:
        assert hasattr(found, name)


def test_every_name_is_documented_and_every_documented_name_exists():
    covered = re.search(r"## What is covered(.*?)## What differs", DOCS.read_text(), re.S).group(1)
    named = set(re.findall(r"`([A-Za-z_0-9.]+)`", covered))
    flat = {name for name in flashinfer.__all__ if name not in MODULES}
    undocumented = {
        name for name in flat if name not in named and re.sub(r"_(inplace|pos_ids(_inplace)?)$", "", name) not in named
    }
    assert undocumented - {"get_alibi_slopes"} == set()
    methods = {"begin_forward", "forward", "forward_return_lse", "run_return_lse", "end_forward"}
    for name in named - methods:
        if name.startswith("_") or name in {"plan", "paged_attention", "mla_attention", "store_kv", "store_mla"}:
            continue
        parts = name.removeprefix("flashinfer.").split(".")
        target = flashinfer
        for part in parts:
            target = getattr(target, part)


@pytest.mark.parametrize("name", VENDOR_ONLY)
def test_names_of_one_vendor_import_and_refuse(name):
    for module in (flashinfer, flashinfer.decode, flashinfer.prefill, flashinfer.page, flashinfer.mla, flashinfer.rope):
        with pytest.raises(BackendUnavailableError, match=name):
            getattr(module, name)(1, key=2)


def test_unknown_names_are_unknown():
    with pytest.raises(AttributeError, match="has no attribute 'batch_decode'"):
        flashinfer.batch_decode  # noqa: B018
    with pytest.raises(ImportError):
        from pagedkv.integrations.flashinfer.decode import batch_decode  # noqa: F401


def test_the_import_touches_no_more_than_pagedkv_does():
    script = "import sys, pagedkv.integrations.flashinfer as f; print({'triton', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "set()"
