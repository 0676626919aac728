"""What one packed forward pass carries: whose tokens they are, where they go, and the plans that read them back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ...attention.plan import plan_attention
from ...kernels.attention_plan import AttentionPlan
from ...kernels.paged_attention import paged_attention
from ...kernels.upload import uploaded
from ...shapes import check_dtype
from ...storage.hybrid_pool import HybridKVPool
from ...storage.page_table import PageTable
from ...storage.pool import KVPool
from .attention import AttentionCall
from .geometry import ModelGeometry
from .storable import as_storable

__all__ = ["HybridPagedStep", "PagedStep"]

_PlanKey = tuple[int, int, int, int, int, int]


class _Pages(NamedTuple):
    """Where one group of layers has the tokens of the step."""

    number: int
    table: PageTable
    slot_mapping: torch.Tensor


class _Step:
    """What steps over one page table and over several have in common."""

    # What transformers asks of a cache besides update().
    is_compileable = False
    is_sliding = is_linear = is_dummy = ()

    def __init__(
        self,
        pool: KVPool | HybridKVPool,
        geometry: ModelGeometry,
        groups: list[_Pages],
        pages_of: Callable[[int], _Pages],
        query_indptr: torch.Tensor,
        backend: str,
    ) -> None:
        self.pool = pool
        self.geometry = geometry
        self.query_indptr = query_indptr
        positions = _positions(groups[0].table, query_indptr)
        self.position_ids = uploaded(positions, groups[0].table.device)
        self.num_positions = int(positions.max(initial=-1)) + 1
        for _, table, slot_mapping in groups:
            if table.max_page >= pool.num_pages:
                raise ValueError(
                    f"page ids of the table must be below {pool.num_pages} (the pool), got {table.max_page}."
                )
            check_dtype("slot_mapping", slot_mapping, torch.int64)
            if slot_mapping.shape != self.position_ids.shape:
                raise ValueError(
                    f"slot_mapping must have shape [T] with T = {self.position_ids.shape[0]} (set by query_indptr), "
                    f"got {list(slot_mapping.shape)}."
                )
        self._pages_of = pages_of
        self._backend = backend
        self._plans: dict[_PlanKey, AttentionPlan] = {}

    @property
    def num_tokens(self) -> int:
        """T, the new tokens of all sequences."""
        return int(self.position_ids.shape[0])

    @property
    def num_plans(self) -> int:
        """How many plans the layers have needed so far: one for each window and shape of heads."""
        return len(self._plans)

    def last_rows(self) -> torch.Tensor:
        """The packed row of each sequence's last new token, [S] int64; every sequence has one."""
        return self.query_indptr[1:].to(torch.int64) - 1

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores one layer's new keys [1, Hk, T, D] and values in the pool's dtype, and gives them back as they came.

        Attention reads the pool: it sees new tokens as it will see them in later steps, rounded or quantised.
        """
        stored_key, stored_value = (as_storable(_packed(states), self.pool.spec) for states in (key, value))
        self.pool.store(layer_idx, stored_key, stored_value, self._pages_of(layer_idx).slot_mapping)
        return key, value

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """One layer's attention over its pages, [1, T, Hq, Dv]."""
        layer = self.geometry.layers.get(call.layer_idx)
        if layer is None:
            raise ValueError(f"layer {call.layer_idx} must be one of the model that was checked, got another.")
        arguments = call.arguments
        window = layer.window if arguments.window is None else arguments.window
        pages = self._pages_of(layer.stored_in)
        plan = self._plan(pages, call.query.shape[1], layer.num_kv_heads, layer.head_dim, layer.value_dim, window)
        out = paged_attention(
            _packed(call.query),
            self.pool.key_pages(layer.stored_in),
            self.pool.value_pages(layer.stored_in),
            plan,
            layout=self.pool.spec.layout,
            sm_scale=arguments.sm_scale,
            soft_cap=arguments.soft_cap,
            sinks=arguments.sinks,
            key_scales=self.pool.key_scales(layer.stored_in),
            value_scales=self.pool.value_scales(layer.stored_in),
            backend=self._backend,
        )
        assert isinstance(out, torch.Tensor)  # no LSE was asked for
        return out[None]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: the step names all positions itself, so nothing is to be added to them."""
        return 0

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the keys a mask would cover; none is built in a paged call."""
        return query_length, 0

    def _plan(
        self, pages: _Pages, num_q_heads: int, num_kv_heads: int, head_dim: int, value_dim: int, window: int | None
    ) -> AttentionPlan:
        window_left = -1 if window is None else window - 1
        key = pages.number, num_q_heads, num_kv_heads, head_dim, value_dim, window_left
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = plan_attention(
                self.query_indptr,
                pages.table,
                num_q_heads=num_q_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                value_dim=value_dim,
                window_left=window_left,
            )
        return plan


class PagedStep(_Step):
    """One forward pass over the new tokens of S sequences, packed as [1, T]; serves as cache and as attention context.

    Shapes: query_indptr [S + 1] int32, new tokens of each sequence; table: pages of all their tokens, the new ones
            included; slot_mapping [T] int64, by default the slots of each sequence's last tokens.
    When:   after the slots are reserved. One step serves one forward pass; what it planned is shared by all its layers.
    Owns:   writes the named slots of `pool` while the model runs, layer by layer, and nothing else.
    Raises: ValueError, TypeError for tensors that do not fit each other, and for a table that names pages the pool has
            not, before anything is written.
    """

    def __init__(
        self,
        pool: KVPool,
        geometry: ModelGeometry,
        table: PageTable,
        query_indptr: torch.Tensor,
        slot_mapping: torch.Tensor | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        if table.page_size != pool.page_size:
            raise ValueError(f"table must have page_size {pool.page_size} (set by the pool), got {table.page_size}.")
        slots = table.slot_mapping(query_indptr) if slot_mapping is None else slot_mapping
        pages = _Pages(0, table, slots)
        super().__init__(pool, geometry, [pages], lambda layer: pages, query_indptr, backend)
        self.table = table
        self.slot_mapping = slots


class HybridPagedStep(_Step):
    """The same over a HybridKVPool: a page table, and slots, for each group of its layers.

    tables, slot_mappings: one a group of `pool.groups`, in order, all over the same tokens.
    """

    def __init__(
        self,
        pool: HybridKVPool,
        geometry: ModelGeometry,
        tables: Sequence[PageTable],
        query_indptr: torch.Tensor,
        slot_mappings: Sequence[torch.Tensor] | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        slots = [table.slot_mapping(query_indptr) for table in tables] if slot_mappings is None else slot_mappings
        for name, given in (("tables", tables), ("slot_mappings", slots)):
            if len(given) != len(pool.groups):
                raise ValueError(f"{name} must be {len(pool.groups)}, one a group of the pool, got {len(given)}.")
        for number, (group, table) in enumerate(zip(pool.groups, tables, strict=True)):
            if table.page_size != group.page_size:
                raise ValueError(
                    f"tables[{number}] must have page_size {group.page_size} (set by the pool), got {table.page_size}."
                )
            if not np.array_equal(table.host.seq_lens, tables[0].host.seq_lens):
                raise ValueError(f"tables[{number}] must have the lengths of tables[0], got others.")
        groups = [_Pages(number, *pair) for number, pair in enumerate(zip(tables, slots, strict=True))]
        pages_of = {layer: pages for pages, group in zip(groups, pool.groups, strict=True) for layer in group.layers}
        super().__init__(pool, geometry, groups, pages_of.__getitem__, query_indptr, backend)


def _packed(states: torch.Tensor) -> torch.Tensor:
    """[1, H, T, D] as transformers has it -> [T, H, D], a view."""
    if states.shape[0] != 1:
        raise ValueError(f"a paged call must be packed into one row, got a batch of {states.shape[0]}.")
    packed = states[0].transpose(0, 1)
    return packed if packed.stride(-1) == 1 else packed.contiguous()


def _positions(table: PageTable, query_indptr: torch.Tensor) -> npt.NDArray[np.int64]:
    """[T]: row i of a sequence stands at kv_len - q_len + i."""
    starts, seq_lens = table.host_query_indptr(query_indptr), table.host.seq_lens
    query_lens = np.diff(starts)
    if (query_lens > seq_lens).any():
        raise ValueError("query_indptr must give each sequence between 0 and its length of new tokens.")
    first = seq_lens.astype(np.int64) - query_lens - starts[:-1]
    return np.repeat(first, query_lens) + np.arange(int(starts[-1]))
