"""Beam search of one prompt over tile caches: beams share the tiles of what they have in common."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..errors import OutOfPagesError
from ..integrations.transformers.geometry import LayerInfo
from ..integrations.transformers.model import PagedModel
from ..integrations.transformers.tile_step import TileStep, check_tile_model
from ..kernels.backend import backends
from ..shapes import check_choice, check_int
from ..storage.tiles.tile_cache import TileCache
from .beam_search import BeamSearch, EarlyStopping, Hypothesis
from .prompts import eos_token_ids as eos_of_model
from .prompts import prompt_token_ids

__all__ = ["TileDecoder"]


class TileDecoder:
    """Runs one model's beam search over one TileCache a layer.

    max_tokens: the longest prompt and answer together. num_pages: of each layer's cache; None is room for num_beams
            beams of max_tokens that have nothing in common. dtype: of the tiles, int8 too; None is the model's.
    Owns:   the caches, which are empty between calls. The model is not changed.
    Threads: one call at a time.
    Raises: UnsupportedModelError for a model that cannot run over tiles; ValueError, TypeError for bad options.

    >>> from pagedkv.testing.tiny_models import tiny_model
    >>> decoder = TileDecoder(tiny_model("llama"), num_beams=3, max_tokens=32)
    >>> [len(found.token_ids) for found in decoder.generate([1, 2, 3], max_new_tokens=5, num_return_sequences=2)]
    [5, 5]
    """

    def __init__(
        self,
        model: Any,
        num_beams: int,
        *,
        max_tokens: int,
        tile_size: int = 16,
        num_pages: int | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        check_int("num_beams", num_beams, minimum=1)
        check_int("tile_size", tile_size, minimum=1)
        if num_pages is not None:
            check_int("num_pages", num_pages, minimum=1)
        check_int("max_tokens", max_tokens, minimum=2)
        check_choice("backend", backend, ("auto", *backends()))
        self._model = PagedModel(model)
        check_tile_model(self._model.geometry)
        context = self._model.geometry.max_positions
        if context is not None and max_tokens > context:
            raise ValueError(f"max_tokens must be at most {context} (the model's context), got {max_tokens}.")
        self._eos = eos_of_model(model)
        self.num_beams = num_beams
        self.max_tokens = max_tokens
        self._backend = backend
        self.caches: dict[int, TileCache] = {
            index: self._cache(layer, tile_size, num_pages, dtype or self._model.geometry.dtype)
            for index, layer in self._model.geometry.layers.items()
            if layer.stored_in == index
        }

    def generate(
        self,
        prompt_ids: Sequence[int] | torch.Tensor,
        *,
        max_new_tokens: int,
        eos_token_ids: Iterable[int] | None = None,
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = False,
        num_return_sequences: int = 1,
    ) -> list[Hypothesis]:
        """The best continuations of a prompt, best first, as BeamSearch.best gives them; see there for the options.

        eos_token_ids: None is the EOS of the model's generation config.
        Owns:   the tiles it fills, which are free again when it returns or raises.
        Raises: ValueError, TypeError for a prompt or options that do not fit, before anything is computed;
                OutOfPagesError when the caches are too small for it.
        """
        ids = prompt_token_ids(prompt_ids, None, self._model.vocab_size)
        search = BeamSearch(
            self.num_beams,
            max_new_tokens=max_new_tokens,
            eos_token_ids=self._eos if eos_token_ids is None else eos_token_ids,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            num_return_sequences=num_return_sequences,
        )
        if len(ids) + search.max_new_tokens > self.max_tokens:
            raise ValueError(
                f"prompt and max_new_tokens must be at most {self.max_tokens} tokens together (max_tokens), "
                f"got {len(ids)} and {search.max_new_tokens}."
            )
        try:
            self._search(search, ids)
        finally:
            for cache in self.caches.values():
                cache.clear()
        return search.best()

    def _cache(self, layer: LayerInfo, tile_size: int, num_pages: int | None, dtype: torch.dtype) -> TileCache:
        num_tiles = -(-self.max_tokens // tile_size)
        if num_pages is None:
            num_pages = self.num_beams * layer.num_kv_heads * num_tiles
        return TileCache(
            num_pages,
            tile_size,
            layer.head_dim,
            num_beams=self.num_beams,
            num_heads=layer.num_kv_heads,
            num_tiles=num_tiles,
            value_dim=layer.value_dim,
            dtype=dtype,
            device=self._model.device,
            on_evict=functools.partial(_refuse_eviction, num_pages, self.num_beams),
        )

    def _search(self, search: BeamSearch, prompt_ids: Sequence[int]) -> None:
        """Prefills beam 0, lets the others share it, and goes on a token of every beam at a time."""
        beams = torch.arange(self.num_beams, dtype=torch.int64, device="cpu")
        prompt = torch.tensor(prompt_ids, dtype=torch.int64, device=self._model.device)
        logits = self._forward(prompt, first_token=0, beam_ids=beams[:1]).expand(self.num_beams, -1)
        for cache in self.caches.values():
            for beam in range(1, self.num_beams):
                cache.fork(0, beam)
        while True:
            parents, tokens = search.step(logits)
            if search.is_done:
                return
            for cache in self.caches.values():
                cache.reorder(parents)
            num_stored = len(prompt_ids) + search.num_new_tokens - 1
            logits = self._forward(tokens, first_token=num_stored, beam_ids=beams)

    def _forward(self, token_ids: torch.Tensor, *, first_token: int, beam_ids: torch.Tensor) -> torch.Tensor:
        """Logits of the last token of each beam, [R, V]; all beams stand at the same position."""
        num_rows = beam_ids.shape[0]
        step = TileStep(
            self.caches,
            self._model.geometry,
            torch.full((num_rows,), first_token, dtype=torch.int64, device="cpu"),
            token_ids.shape[0] // num_rows,
            beam_ids,
            backend=self._backend,
        )
        return self._model.forward(token_ids, step)


def _refuse_eviction(num_pages: int, num_beams: int, *tile: object) -> None:
    """Every tile of a beam is read in every step: where one would have to go, there is no room for the search."""
    raise OutOfPagesError(needed=1, free=0, evictable=0, pinned=num_pages, num_sequences=num_beams)
