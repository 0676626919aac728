"""Names of FlashInfer that front the libraries of one vendor: they import, and say what to use instead when called."""

from __future__ import annotations

from functools import cache
from typing import NoReturn

from ...errors import BackendUnavailableError

__all__ = ["VENDOR_ONLY", "Refused", "lookup", "refused"]

_DECODE = "Use BatchDecodeWithPagedKVCacheWrapper, with the page table as indptr, indices and last_page_len."
_PREFILL = "Use BatchPrefillWithPagedKVCacheWrapper, with the page table as indptr, indices and last_page_len."
_RAGGED = "Use BatchPrefillWithRaggedKVCacheWrapper."
_MLA = "Use BatchMLAPagedAttentionWrapper."
_SPARSE_MLA = "Use BatchMLAPagedAttentionWrapper on pages that hold the chosen tokens."
_FP4 = "Use append_paged_kv_cache on a cache of 16 bits, or pagedkv.store_kv with scales on pages of one byte a number."

# Each name and what to use instead.
VENDOR_ONLY: dict[str, str] = {
    "CuteDslMlaDecodeRunner": _MLA,
    "DSV4HCAMetadata": _SPARSE_MLA,
    "convert_compressed_page_aligned_sparse_indices_to_hca_metadata": _SPARSE_MLA,
    "cudnn_batch_decode_with_kv_cache": _DECODE,
    "cudnn_batch_prefill_with_kv_cache": _PREFILL,
    "fmha_varlen": _RAGGED,
    "fmha_varlen_plan": "Use plan of BatchPrefillWithRaggedKVCacheWrapper.",
    "nvfp4_quantize_append_paged_kv_cache": _FP4,
    "nvfp4_quantize_append_paged_kv_cache_with_slot_mapping": _FP4,
    "nvfp4_quantize_append_paged_mla_kv_cache": "Use append_paged_mla_kv_cache on a cache of 16 bits.",
    "rope_quantize_fp8_append_paged_kv_cache": "Use rope.rope_quantize_fp8, then append its results.",
    "trtllm_batch_context_with_kv_cache": _PREFILL,
    "trtllm_batch_decode_with_kv_cache": _DECODE,
    "trtllm_batch_decode_with_kv_cache_mla": _MLA,
    "trtllm_ragged_attention_deepseek": _RAGGED,
    "xqa_batch_decode_with_kv_cache": _DECODE,
    "xqa_batch_decode_with_kv_cache_mla": _MLA,
}


class Refused:
    """Stands for a function or class that cannot run here; calling it or deriving from it raises.

    Raises: BackendUnavailableError, naming what to use instead.
    """

    def __init__(self, name: str, remedy: str) -> None:
        self.__name__ = self.__qualname__ = name
        self.__doc__ = f"Not part of pagedkv.integrations.flashinfer. {remedy}"
        self._remedy = remedy

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        self._refuse()

    def __mro_entries__(self, bases: tuple[object, ...]) -> NoReturn:
        self._refuse()

    def __repr__(self) -> str:
        return f"<{self.__name__}, refused by pagedkv.integrations.flashinfer>"

    def _refuse(self) -> NoReturn:
        raise BackendUnavailableError(
            f"{self.__name__} cannot run here: it needs libraries of one vendor. {self._remedy}"
        )


@cache
def refused(name: str) -> Refused:
    """What stands for a name of VENDOR_ONLY; the same object each time.

    Raises: KeyError for a name that is not in the table.
    """
    return Refused(name, VENDOR_ONLY[name])


def lookup(name: str, module: str = "pagedkv.integrations.flashinfer") -> Refused:
    """For the `__getattr__` of a module: `refused(name)`.

    Raises: AttributeError for a name that is not in the table.
    """
    if name not in VENDOR_ONLY:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return refused(name)
