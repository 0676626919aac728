"""What one forward pass over tile caches carries: new tokens of beams, where they go, and how they are read back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...attention.tile_attention import tile_attention
from ...kernels.upload import uploaded
from ...shapes import Shapes, check_dtype, check_int
from ...storage.tiles.tile_cache import TileCache
from .attention import AttentionCall
from .errors import UnsupportedModelError
from .geometry import LayerInfo, ModelGeometry
from .storable import as_storable

__all__ = ["TileStep", "check_tile_model"]


class TileStep:
    """One forward pass over n new tokens of each of R beams, packed as [1, R * n]; cache and attention context at once.

    caches: one a storing layer, by layer index. All have the same beams and hold every token before the new ones.
    Shapes: first_tokens [R] int64, the position of the first new token of each row; beam_ids [R] int64, whose tokens
            each row has, no beam twice, by default beam r. Both are kept on the CPU, where the caches' books are.
    When:   one step serves one forward pass.
    Owns:   stores the new tokens in `caches` while the model runs, layer by layer, and nothing else.
    Raises: UnsupportedModelError for a model that tiles cannot run, ValueError, TypeError for what does not fit each
            other, before anything is written.
    """

    # What transformers asks of a cache besides update().
    is_compileable = False
    is_sliding = is_linear = is_dummy = ()

    def __init__(
        self,
        caches: Mapping[int, TileCache],
        geometry: ModelGeometry,
        first_tokens: torch.Tensor,
        num_new_tokens: int,
        beam_ids: torch.Tensor | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        check_tile_model(geometry)
        check_int("num_new_tokens", num_new_tokens, minimum=1)
        one = _check_caches(caches, geometry)
        self.caches = caches
        self.geometry = geometry
        self.num_new_tokens = num_new_tokens
        self.beam_ids = _checked_beams(beam_ids, one)
        self.first_tokens = _checked_first_tokens(first_tokens, caches, self.num_rows, num_new_tokens)
        positions = (self.first_tokens[:, None] + torch.arange(num_new_tokens, device="cpu")).reshape(-1)
        self.position_ids = uploaded(positions.numpy(), one.device)
        self.num_positions = int(positions.max()) + 1
        self._seq_lens = (self.first_tokens + num_new_tokens).to(torch.int32)
        self._backend = backend

    @property
    def num_rows(self) -> int:
        """R, the beams with new tokens."""
        return int(self.beam_ids.shape[0])

    @property
    def num_tokens(self) -> int:
        """R * n, the new tokens of all rows."""
        return self.num_rows * self.num_new_tokens

    def last_rows(self) -> torch.Tensor:
        """The packed row of the last new token of each beam, [R] int64."""
        rows = torch.arange(1, self.num_rows + 1, dtype=torch.int64, device=self.position_ids.device)
        return rows * self.num_new_tokens - 1

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores one layer's new keys [1, Hk, R * n, D] and values, and gives them back as they came.

        Attention reads the tiles: it sees new tokens as it will see them in later steps, rounded or quantised.
        """
        cache = self.caches.get(layer_idx)
        if cache is None:
            raise ValueError(f"layer {layer_idx} must be one that stores keys and values, got another.")
        stored_key, stored_value = (
            as_storable(self._by_row(states).transpose(1, 2), cache.geometry) for states in (key, value)
        )
        cache.store(stored_key, stored_value, self.first_tokens, self.beam_ids)
        return key, value

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """One layer's attention over its tiles, [1, R * n, Hq, Dv]."""
        layer = self.geometry.layers.get(call.layer_idx)
        if layer is None:
            raise ValueError(f"layer {call.layer_idx} must be one of the model that was checked, got another.")
        arguments = call.arguments
        window = layer.window if arguments.window is None else arguments.window
        query = self._by_row(call.query)
        out = tile_attention(
            query if query.stride(-1) == 1 else query.contiguous(),
            self.caches[layer.stored_in],
            self._seq_lens,
            beam_ids=self.beam_ids,
            sm_scale=arguments.sm_scale,
            window_left=-1 if window is None else window - 1,
            soft_cap=arguments.soft_cap,
            backend=self._backend,
        )
        assert isinstance(out, torch.Tensor)  # no LSE was asked for
        return out.flatten(0, 1)[None]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: the step names all positions itself, so nothing is to be added to them."""
        return 0

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the keys a mask would cover; none is built in a paged call."""
        return query_length, 0

    def _by_row(self, states: torch.Tensor) -> torch.Tensor:
        """[1, H, R * n, D] as transformers has it -> [R, n, H, D], a view."""
        if states.shape[0] != 1:
            raise ValueError(f"a paged call must be packed into one row, got a batch of {states.shape[0]}.")
        Shapes(T=self.num_tokens).check("states", states, "1 H T D")
        _, num_heads, _, head_dim = states.shape
        return states[0].transpose(0, 1).view(self.num_rows, self.num_new_tokens, num_heads, head_dim)


def check_tile_model(geometry: ModelGeometry) -> None:
    """Refuses a model that runs over pages and not over tiles.

    Raises: UnsupportedModelError naming the layer and what it needs.
    """
    for index, layer in geometry.layers.items():
        if layer.has_sinks:
            raise UnsupportedModelError(f"layer {index} needs attention sinks, which tiles do not have.")


def _check_caches(caches: Mapping[int, TileCache], geometry: ModelGeometry) -> TileCache:
    """One of the caches, after making sure that each is what its layer needs and that all are alike in beams."""
    storing = {index: layer for index, layer in geometry.layers.items() if layer.stored_in == index}
    if set(caches) != set(storing):
        raise ValueError(f"caches must be of the layers {sorted(storing)} (those that store), got {sorted(caches)}.")
    one = next(iter(caches.values()))
    for index, cache in sorted(caches.items()):
        _check_cache(index, cache, storing[index])
        if (cache.num_beams, cache.device) != (one.num_beams, one.device):
            raise ValueError(
                f"caches must all have the same beams and device, got {cache.num_beams} on {cache.device} in layer "
                f"{index} and {one.num_beams} on {one.device} in another."
            )
    return one


def _check_cache(index: int, cache: TileCache, layer: LayerInfo) -> None:
    needed = layer.num_kv_heads, layer.head_dim, layer.value_dim
    given = cache.num_heads, cache.geometry.head_dim, cache.geometry.value_dim
    if given != needed:
        raise ValueError(
            f"the cache of layer {index} must have heads, head_dim and value_dim {needed} (the model), got {given}."
        )


def _checked_beams(beam_ids: torch.Tensor | None, cache: TileCache) -> torch.Tensor:
    if beam_ids is None:
        return torch.arange(cache.num_beams, dtype=torch.int64, device="cpu")
    Shapes().check("beam_ids", beam_ids, "R")
    check_dtype("beam_ids", beam_ids, torch.int64)
    beams = beam_ids.tolist()
    if not beams:
        raise ValueError("beam_ids must name at least one beam, got none.")
    if len(set(beams)) != len(beams):
        raise ValueError(f"beam_ids must name no beam twice, got {beams}.")
    if min(beams) < 0 or max(beams) >= cache.num_beams:
        raise ValueError(f"beam_ids must be from 0 to {cache.num_beams - 1} (beams of the caches), got {beams}.")
    return beam_ids.cpu()


def _checked_first_tokens(
    first_tokens: torch.Tensor, caches: Mapping[int, TileCache], num_rows: int, num_new_tokens: int
) -> torch.Tensor:
    Shapes(R=num_rows).check("first_tokens", first_tokens, "R")
    check_dtype("first_tokens", first_tokens, torch.int64)
    first = first_tokens.tolist()
    room = min(cache.num_tiles * cache.geometry.tile_size for cache in caches.values())
    if min(first) < 0 or max(first) + num_new_tokens > room:
        raise ValueError(
            f"first_tokens must leave room for {num_new_tokens} tokens among the {room} of a beam, got {first}."
        )
    return first_tokens.cpu()
