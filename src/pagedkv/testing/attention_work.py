"""The work of an attention plan by name: which item computes what, as `csrc/attention_work.h` lays it out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..kernels.attention_plan import AttentionPlan

__all__ = ["CHUNK_TOKENS", "AttentionWork", "WorkItem", "WorkTile", "assert_covers_once", "read_work"]

# Keys are cut at multiples of so many tokens of a sequence.
CHUNK_TOKENS = 256

_HEADER = 5


class WorkTile(NamedTuple):
    """Rows [row_first, row_last) of a sequence (new token * group + head of the group) and the chunks they see."""

    sequence: int
    row_first: int
    row_last: int
    chunk_first: int
    chunk_last: int
    state: int

    @property
    def rows(self) -> int:
        """Rows a KV head."""
        return self.row_last - self.row_first


class WorkItem(NamedTuple):
    """Members [member_first, member_last) x KV heads x chunks, taken by one thread.

    shared_tokens: of the last chunk, the first tokens whose pages all members have in common.
    """

    member_first: int
    member_last: int
    head_first: int
    head_last: int
    chunk_first: int
    chunk_last: int
    shared_tokens: int


@dataclass(frozen=True)
class AttentionWork:
    """All of `AttentionPlan.work`; members are numbers of tiles."""

    num_states: int
    most_rows: int
    tiles: list[WorkTile]
    items: list[WorkItem]
    members: list[int]

    def members_of(self, item: WorkItem) -> list[int]:
        """The tiles of an item."""
        return self.members[item.member_first : item.member_last]

    def rows_of(self, item: WorkItem) -> int:
        """Rows of all tiles of an item, for one KV head."""
        return sum(self.tiles[member].rows for member in self.members_of(item))

    @property
    def shared_items(self) -> list[WorkItem]:
        """The items that read keys for several sequences at once."""
        return [item for item in self.items if item.member_last - item.member_first > 1]


def read_work(plan: AttentionPlan) -> AttentionWork:
    """Reads `plan.work`, which the native core wrote.

    Raises: ValueError for a plan without work, or one whose length is not what its header says.
    """
    if plan.work is None:
        raise ValueError("plan must have work, got None. It is made where the native core runs.")
    numbers = plan.work.tolist()
    num_states, most_rows, num_tiles, num_items, num_members = numbers[:_HEADER]
    items_at = _HEADER + len(WorkTile._fields) * num_tiles
    members_at = items_at + len(WorkItem._fields) * num_items
    if len(numbers) != members_at + num_members:
        raise ValueError(f"work must have {members_at + num_members} entries by its header, got {len(numbers)}.")
    tiles = [WorkTile(*row) for row in _rows(numbers[_HEADER:items_at], len(WorkTile._fields))]
    items = [WorkItem(*row) for row in _rows(numbers[items_at:members_at], len(WorkItem._fields))]
    return AttentionWork(num_states, most_rows, tiles, items, numbers[members_at:])


def _rows(numbers: list[int], width: int) -> list[list[int]]:
    return [numbers[at : at + width] for at in range(0, len(numbers), width)]


def assert_covers_once(plan: AttentionPlan) -> None:
    """Asserts that every row is in one tile, and every chunk it sees in one item for each head: all of it, and once.

    And that members of an item share its pages, and that partial results have places of their own in the workspace.
    """
    work = read_work(plan)
    _assert_rows_in_one_tile(plan, work)
    taken = [
        (member, chunk, head)
        for item in work.items
        for member in work.members_of(item)
        for chunk in range(item.chunk_first, item.chunk_last)
        for head in range(item.head_first, item.head_last)
    ]
    due = [
        (number, chunk, head)
        for number, tile in enumerate(work.tiles)
        for chunk in range(tile.chunk_first, tile.chunk_last)
        for head in range(plan.num_kv_heads)
    ]
    assert sorted(taken) == due, "items must take each chunk of each tile and head once."
    _assert_states_have_room(plan, work)
    for item in work.shared_items:
        _assert_pages_agree(plan, work, item)


def _assert_rows_in_one_tile(plan: AttentionPlan, work: AttentionWork) -> None:
    q_lens, kv_lens = plan.query_indptr.diff().tolist(), plan.seq_lens.tolist()
    rows: list[list[int]] = [[] for _ in q_lens]
    for tile in work.tiles:
        rows[tile.sequence] += range(tile.row_first, tile.row_last)
        for token in range(tile.row_first // plan.group, (tile.row_last - 1) // plan.group + 1):
            position = kv_lens[tile.sequence] - q_lens[tile.sequence] + token
            last = max(0, position + 1) if plan.causal else kv_lens[tile.sequence]
            first = max(0, position - plan.window_left) if plan.window_left >= 0 else 0
            if first < last:
                assert tile.chunk_first <= first // CHUNK_TOKENS, f"{tile} must reach back to key {first}."
                assert tile.chunk_last > (last - 1) // CHUNK_TOKENS, f"{tile} must reach key {last - 1}."
    for of_sequence, q_len in zip(rows, q_lens, strict=True):
        assert of_sequence == list(range(q_len * plan.group)), "tiles must hold each row of a sequence once."


def _assert_states_have_room(plan: AttentionPlan, work: AttentionWork) -> None:
    num_states = most_rows = 0
    for tile in work.tiles:
        if tile.state >= 0:
            assert tile.state == num_states, f"{tile} must have states from {num_states} on."
            num_states += (tile.chunk_last - tile.chunk_first) * plan.num_kv_heads * tile.rows
    for item in work.items:
        most_rows = max(most_rows, work.rows_of(item) * (item.head_last - item.head_first))
        members = [work.tiles[member] for member in work.members_of(item)]
        if any(tile.state < 0 for tile in members):
            ends = (item.chunk_first, item.chunk_last)
            assert [(tile.chunk_first, tile.chunk_last) for tile in members] == [ends], f"{item} must be merged."
    assert (work.num_states, work.most_rows) == (num_states, most_rows), "the header must hold what items need."


def _assert_pages_agree(plan: AttentionPlan, work: AttentionWork, item: WorkItem) -> None:
    assert 0 < item.shared_tokens <= CHUNK_TOKENS
    last_token = (item.chunk_last - 1) * CHUNK_TOKENS + item.shared_tokens
    first, last = item.chunk_first * CHUNK_TOKENS // plan.page_size, -(-last_token // plan.page_size)
    starts, pages = plan.page_indptr.tolist(), set()
    for member in work.members_of(item):
        start, stop = starts[work.tiles[member].sequence :][:2]
        assert start + last <= stop, f"{item} must not reach beyond the pages of its members."
        pages.add(tuple(plan.page_indices[start + first : start + last].tolist()))
    assert len(pages) == 1, f"{item} must have members of the same pages."
