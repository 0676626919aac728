"""A transformers `Cache` whose keys and values live in pages: drops into `model.generate(past_key_values=...)`.

Rows of the batch are sequences of one manager. Beams and repeated rows share pages, and are copied a page at a time
when they part; nothing is concatenated. Attention is the model's own: `update` returns dense keys and values.
"""

from __future__ import annotations

from typing import Any

import torch

from ...management.manager import KVCacheManager
from ...shapes import check_int
from ...spec import KVCacheSpec, Layout
from .adapter import Cache, CacheLayerMixin, DummyLayer, layer_types
from .cache_rows import CacheRows
from .errors import UnsupportedModelError
from .storable import as_storable

__all__ = ["PagedCache"]


class PagedCache(Cache):  # type: ignore[misc]  # transformers is not typed
    """Keys and values of a batch of equally long rows, padding included, on a pool of its own.

    config: of the model. num_pages: of the pool, taken when the first keys arrive, on their device.
    dtype:  of the pages, by default that of the first keys; any of KVCacheSpec. Keys and values are rounded to it when
            stored, for int8 and float8_e4m3fn with a scale for each token and head, and come back in the model's dtype:
            new ones too, so that a token looks the same in every step.
    Owns:   the pool, until the cache is dropped. `reset` keeps the pool and gives all pages back.
    Raises: UnsupportedModelError for a model with layers that keep something else than keys and values of each token;
            OutOfPagesError when the rows need more than num_pages; the step then stored nothing.

    >>> from pagedkv.testing.tiny_models import tiny_model
    >>> model = tiny_model("llama")
    >>> cache = PagedCache(model.config, num_pages=64)
    >>> output = model.generate(torch.tensor([[5, 6, 7]]), past_key_values=cache, max_new_tokens=4, do_sample=False)
    >>> output.shape, cache.get_seq_length()
    (torch.Size([1, 7]), 6)
    """

    def __init__(
        self, config: Any, num_pages: int, page_size: int = 16, dtype: torch.dtype | None = None, layout: Layout = "NHD"
    ) -> None:
        check_int("num_pages", num_pages, minimum=1)
        check_int("page_size", page_size, minimum=1)
        types, windows = layer_types(config)
        unknown = sorted(set(types) - {"full_attention", "sliding_attention", "dummy"})
        if unknown:
            raise UnsupportedModelError(f"layers of type {', '.join(unknown)} keep no pages of keys and values.")
        spec = KVCacheSpec.from_config(config, page_size=page_size, dtype=dtype, layout=layout)
        self._rows = CacheRows(spec, num_pages, takes_dtype_of_keys=dtype is None)
        super().__init__(
            layers=[
                DummyLayer() if kind == "dummy" else _PagedLayer(self._rows, index, window)
                for index, (kind, window) in enumerate(zip(types, windows, strict=True))
            ]
        )

    @property
    def manager(self) -> KVCacheManager | None:
        """Who owns which page, None before the first keys."""
        return self._rows.manager

    @property
    def batch_size(self) -> int:
        """Rows, -1 before the first keys."""
        return len(self._rows.seqs) or -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens of every row; tokens_to_remove is negative or 0, as transformers has it."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be 0 or negative, got {tokens_to_remove}.")
        length = self.get_seq_length()
        if -tokens_to_remove > length:
            raise ValueError(f"tokens_to_remove must be at least -{length} (the rows' length), got {tokens_to_remove}.")
        if tokens_to_remove:
            self._rows.truncate(length + tokens_to_remove)
            self._set_lengths(length + tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i continues what row beam_idx[i] was; pages are shared, not copied."""
        self._rows.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times in a row, sharing its pages."""
        self._rows.select([row for row in range(len(self._rows.seqs)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the named rows, given by index or by a bool mask."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        size = len(self._rows.seqs)
        self._rows.select([row % size if row < 0 else row for row in indices.tolist()])

    def reset(self) -> None:
        """Forgets all rows; the pool stays."""
        self._rows.clear()
        self._set_lengths(0)

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        """A cache of its own over the same pages: both may be continued, and copy a page where they part."""
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        copied._rows = self._rows.fork()
        copied.layers = [
            _PagedLayer(copied._rows, layer.index, layer.window, layer.length)
            if isinstance(layer, _PagedLayer)
            else layer
            for layer in self.layers
        ]
        memo[id(self)] = copied
        return copied

    def _set_lengths(self, length: int) -> None:
        for layer in self.layers:
            if isinstance(layer, _PagedLayer):
                layer.length = min(layer.length, length)


class _PagedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's view of the rows: how far it has come, and which keys it hands out."""

    is_croppable = True
    supports_early_init = False

    def __init__(self, rows: CacheRows, index: int, window: int | None, length: int = 0) -> None:
        super().__init__()
        self.index = index
        self.window = window
        self.length = length
        self.is_sliding = window is not None
        self._rows = rows

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the pool is made by the first `update`."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the new tokens [B, Hk, T, D]; returns all that a query of theirs may see, in the same form."""
        first_visible = self.get_mask_sizes(key_states.shape[2])[1]
        length = self.length + key_states.shape[2]
        pool = self._rows.reserve(key_states, length)
        slots = self._rows.slots(self.length, length).flatten()
        stored_key, stored_value = (as_storable(_flat(states), pool.spec) for states in (key_states, value_states))
        pool.store(self.index, stored_key, stored_value, slots)
        self.length = length
        self.is_initialized = True
        key, value = pool.gather(self.index, self._rows.slots(first_visible, length).flatten())
        num_rows, dtype = len(self._rows.seqs), key_states.dtype
        return _batched(key, num_rows).to(dtype), _batched(value, num_rows).to(dtype)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys `update` returns for that many new tokens, and the position of the first of them."""
        first = 0 if self.window is None else max(self.length - self.window + 1, 0)
        return self.length + query_length - first, first

    def get_seq_length(self) -> int:
        """Tokens of each row, padding included."""
        return self.length

    def get_max_length(self) -> int:
        """The window of a sliding layer, -1 (no limit) otherwise."""
        return -1 if self.window is None else self.window


def _flat(states: torch.Tensor) -> torch.Tensor:
    """[B, H, T, D] -> [B * T, H, D]."""
    return states.transpose(1, 2).flatten(0, 1)


def _batched(states: torch.Tensor, num_rows: int) -> torch.Tensor:
    """[B * T, H, D] -> [B, H, T, D], a view."""
    return states.view(num_rows, -1, *states.shape[1:]).transpose(1, 2)
