"""Random programs over a small manager: every page is accounted for, and every sequence reads back its own tokens.

The model is one list of token ids a sequence. A fake pool holds one number a slot: what a sequence writes it must read
at its slots for as long as it is open, whatever the others do. So a page handed out twice, a missing copy on write and
a wrong hit all show as wrong content, independently of the books that `check_integrity` reads.
"""

import math
from contextlib import suppress
from itertools import pairwise
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from manager_model import NAMESPACES, ContentPool, ContentTier, Shadow

from pagedkv import IntegrityError, KVCacheManager, OutOfPagesError, PageTable, TierError, check_integrity
from pagedkv.kernels.gather_rows import gather_rows
from pagedkv.management import row_heap, step_commit
from pagedkv.management.allocator import PageAllocator
from pagedkv.management.page_budget import PageBudget
from pagedkv.management.pinned import PinnedPrefix
from pagedkv.management.sequence import Sequence
from pagedkv.management.sequence_rows import SequenceRows
from pagedkv.management.step_planner import StepPlanner

SHARING = {"page_size": 4, "num_pages": 20}
CACHING = {"page_size": 1, "num_pages": 20, "prefix_cache": True}
STORY = [0, 1, 1, 2, 0, 0, 1, 2, 2, 1, 0, 2]
LIMIT = 1


@st.composite
def prompts(draw, max_size=14):
    """A beginning of one story and then something else, so that prompts share pages and part ways inside pages."""
    known = draw(st.integers(0, len(STORY)))
    return (STORY[:known] + draw(st.lists(st.integers(0, 2), max_size=4)))[:max_size]


class ManagerMachine(RuleBasedStateMachine):
    # What a planted defect needs, in place of what is drawn.
    world: ClassVar = {}

    @initialize(
        page_size=st.sampled_from([1, 2, 4]),
        num_pages=st.integers(3, 20),
        has_pool=st.booleans(),
        prefix_cache=st.sampled_from([True, True, "hashed", "hashed", False]),
        num_reserved=st.sampled_from([0, 0, 1]),
        watermark=st.sampled_from([0, 0, 0.1]),
        has_limit=st.booleans(),
    )
    def start(self, **drawn):
        self.set_up(**drawn | self.world)

    def set_up(self, page_size, num_pages, has_pool, prefix_cache, num_reserved, watermark, has_limit):
        self.pool = ContentPool(num_pages, page_size)
        self.tier = ContentTier(self.pool, 6)
        self.limits = {"a": LIMIT} if has_limit else {}
        options = {
            "prefix_cache": prefix_cache,
            "num_reserved_pages": num_reserved,
            "watermark": watermark,
            "namespace_limits": self.limits,
            "tier": self.tier,
        }
        if has_pool:
            self.manager = KVCacheManager(self.pool, **options)
        else:
            self.manager = KVCacheManager(num_pages, page_size=page_size, **options)
        self.num_kept_free = math.ceil(watermark * num_pages)
        self.open, self.pins, self.tables, self.last_step = [], [], [], []

    picks = st.integers(0, 10**6)

    def on_pages(self):
        return [shadow for shadow in self.open if not shadow.is_away]

    def away(self):
        return [shadow for shadow in self.open if shadow.is_away]

    def pick(self, number):
        shadows = self.on_pages()
        return shadows[number % len(shadows)]

    def perform_copies(self):
        src, dst = self.manager.take_copies()
        assert not set(src.tolist()) & set(dst.tolist())
        self.pool.copy_pages(src, dst)

    def state(self):
        return [(other.seq.page_ids, other.seq.num_tokens) for other in self.open], self.manager.stats()

    def check_refusal(self, raised, before):
        error = raised.value
        assert error.needed > error.free + error.evictable
        assert error.free + error.evictable + error.pinned == self.manager.num_pages
        assert before == self.state()

    def check_watermark(self, shadows):
        """After slots were reserved: first slots leave the pages of the watermark."""
        takes_first = [shadow for shadow in shadows if shadow.is_new and shadow.seq.page_ids != shadow.pages]
        left = self.manager.num_free_pages + self.manager.num_evictable_pages
        assert left >= self.num_kept_free or not takes_first, "the watermark is taken"

    def count_written(self, shadow, tokens):
        """After slots for `tokens` were reserved: only the copy of its last page may change what it names."""
        kept, gone = len(shadow.tokens) // self.pool.page_size, shadow.seq.num_pages_given_back
        assert shadow.seq.page_ids[gone:kept] == shadow.pages[gone:kept]
        shadow.tokens, shadow.is_new = shadow.tokens + tokens, False
        shadow.pages = shadow.pages[:gone] + shadow.seq.page_ids[gone:]

    def write_next(self, shadow, tokens):
        """Append and write, or leave everything as it was."""
        before = self.state()
        if not shadow.seq.can_append(len(tokens)):
            with pytest.raises(OutOfPagesError, match="cannot allocate") as raised:
                shadow.seq.append(len(tokens))
            self.check_refusal(raised, before)
            return False
        slots = shadow.seq.append(len(tokens))
        self.check_watermark([shadow])
        assert slots.dtype == torch.int64
        assert slots.shape == (len(tokens),)
        self.perform_copies()
        self.count_written(shadow, tokens)
        self.pool.write(slots, shadow.content()[-len(tokens) :])
        return True

    @precondition(lambda self: len(self.open) < 6)
    @rule(
        prompt=prompts(),
        namespace=st.sampled_from([None, None, *NAMESPACES]),
        commit=st.sampled_from([True, True, False]),
        window=st.sampled_from([None, None, None, 1, 3, 6]),
    )
    def open_sequence(self, prompt, namespace, commit, window):
        seq = self.manager.open(prompt, namespace, window=window)
        hit = seq.num_cached_tokens
        assert hit % self.pool.page_size == 0
        shadow = Shadow(seq, prompt[:hit], namespace)
        self.open.append(shadow)
        if len(prompt) > hit and not self.write_next(shadow, prompt[hit:]):
            self.open.remove(shadow)
            seq.close()
        elif len(prompt) > hit and commit:
            seq.commit(np.array(prompt, dtype=np.int32))

    @precondition(lambda self: len(self.open) < 5)
    @rule(prompt=prompts(max_size=8).filter(bool))
    def open_twins(self, prompt):
        """Two prompts of one batch: neither finds the other, so one of them keeps duplicates."""
        twins = [Shadow(self.manager.open([]), [], None) for _ in range(2)]
        self.open += twins
        for twin in [twin for twin in twins if self.write_next(twin, prompt)]:
            twin.seq.commit(prompt)

    @precondition(lambda self: self.on_pages())
    @rule(number=picks, tokens=st.lists(st.integers(0, 2), min_size=1, max_size=5))
    def append(self, number, tokens):
        self.write_next(self.pick(number), tokens)

    @precondition(lambda self: self.on_pages())
    @rule(data=st.data(), one_each=st.booleans(), again=st.booleans())
    def batch(self, data, one_each, again):
        shadows = [shadow for shadow in self.last_step if shadow in self.on_pages()] if again else []
        if not shadows:
            shadows = data.draw(st.lists(st.sampled_from(self.on_pages()), min_size=1, unique_by=id))
        counts = [1] * len(shadows)
        if not one_each:
            counts = data.draw(st.lists(st.integers(1, 4), min_size=len(shadows), max_size=len(shadows)))
        seqs, before = [shadow.seq for shadow in shadows], self.state()
        if not self.manager.can_batch(seqs, counts):
            with pytest.raises(OutOfPagesError, match="cannot allocate") as raised:
                self.manager.batch(seqs, counts)
            self.check_refusal(raised, before)
            return
        tokens = [data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count)) for count in counts]
        self.take_step(shadows, tokens)

    def take_step(self, shadows, tokens):
        counts = list(map(len, tokens))
        is_decode = set(counts) == {1}
        step = self.manager.batch([shadow.seq for shadow in shadows], 1 if is_decode else torch.tensor(counts))
        self.check_watermark(shadows)
        self.perform_copies()
        for shadow, new in zip(shadows, tokens, strict=True):
            self.count_written(shadow, new)
        content = [number for s, new in zip(shadows, tokens, strict=True) for number in s.content()[-len(new) :]]
        self.pool.write(step.slot_mapping, content)
        self.check_step(step, shadows, counts)
        self.last_step = shadows

    def check_step(self, step, shadows, counts):
        table = step.page_table
        expected = [[max(page, 0) for page in shadow.expected_pages()] for shadow in shadows]
        indptr = table.indptr.tolist()
        rows = [table.indices[start:stop].tolist() for start, stop in pairwise(indptr)]
        assert rows == expected
        assert table.indices.dtype == table.indptr.dtype == step.query_indptr.dtype == torch.int32
        assert step.query_indptr.tolist() == [0, *np.cumsum(counts).tolist()]
        assert step.seq_lens.tolist() == [len(shadow.tokens) for shadow in shadows]
        again = PageTable.from_rows(expected, step.seq_lens.tolist(), self.pool.page_size)
        assert table.last_page_len.tolist() == again.last_page_len.tolist()
        dense = [list(row) for row in step.dense_table().tolist()]
        longest = max(map(len, expected))
        assert dense == [[*s.expected_pages(), *[-1] * (longest - len(s.pages))] for s in shadows]
        # What was handed out stays as it was.
        self.tables.append((table, [table.indptr.clone(), table.indices.clone(), table.seq_lens.clone()]))

    @precondition(lambda self: self.on_pages())
    @rule(again=st.booleans())
    def commit_step(self, again):
        shadows = [shadow for shadow in (self.last_step if again else self.on_pages()) if shadow in self.on_pages()]
        shadows = [shadow for shadow in shadows if shadow.seq.num_committed < shadow.seq.num_tokens]
        ids = [shadow.tokens[shadow.seq.num_committed] for shadow in shadows]
        # Forks that were given different tokens for slots that they share are refused.
        with suppress(ValueError):
            self.manager.commit([shadow.seq for shadow in shadows], ids)

    @precondition(lambda self: self.on_pages())
    @rule(number=picks, part=st.integers(1, 8), whole=st.booleans())
    def commit(self, number, part, whole):
        shadow = self.pick(number)
        seq = shadow.seq
        pending = shadow.tokens[seq.num_committed :]
        if pending:
            seq.commit(shadow.tokens if whole else pending[:part])
            assert seq.token_ids == tuple(shadow.tokens[: seq.num_committed])

    @precondition(lambda self: self.on_pages() and len(self.open) < 6)
    @rule(number=picks, then=st.sampled_from(["", "append", "step"]))
    def fork(self, number, then):
        """And lets both go on with different tokens, which is where they would meet on one page."""
        shadow = self.pick(number)
        child = Shadow(shadow.seq.fork(), shadow.tokens, shadow.namespace)
        child.pages, child.is_new = shadow.pages, shadow.is_new
        self.open.append(child)
        assert child.seq.page_ids == shadow.expected_pages()
        if then == "append":
            self.write_next(child, [2])
            self.write_next(shadow, [1])
        elif then == "step" and self.manager.can_batch([child.seq, shadow.seq]):
            self.take_step([child, shadow], [[2], [1]])

    @precondition(lambda self: self.on_pages() and len(self.open) < 5)
    @rule(number=picks, other=st.lists(st.integers(0, 2), min_size=1, max_size=9))
    def free_the_source_of_a_copy(self, number, other):
        """The page that a copy waits for is given back by all, and somebody asks for pages before it is made."""
        shadow = self.pick(number)
        child = Shadow(shadow.seq.fork(), shadow.tokens, shadow.namespace)
        child.pages, child.is_new = shadow.pages, shadow.is_new
        self.open.append(child)
        slots = child.seq.try_append(1)
        if slots is None:
            return
        self.open.remove(shadow)
        shadow.seq.close()
        third = Shadow(self.manager.open([]), [], None)
        self.open.append(third)
        others = third.seq.try_append(len(other))
        if others is not None:
            self.count_written(third, other)
            self.pool.write(others, third.content())
        self.perform_copies()
        self.count_written(child, [0])
        self.pool.write(slots, child.content()[-1:])

    @precondition(lambda self: self.on_pages())
    @rule(number=picks, length=picks)
    def truncate(self, number, length):
        shadow = self.pick(number)
        length %= len(shadow.tokens) + 1
        gone = shadow.seq.num_pages_given_back * self.pool.page_size
        if gone and length < gone + shadow.seq.window - 1:
            with pytest.raises(ValueError, match="whose window begins behind the pages that were given back"):
                shadow.seq.truncate(length)
            return
        shadow.tokens = shadow.tokens[:length]
        shadow.seq.truncate(length)
        shadow.pages = shadow.pages[: -(-length // self.pool.page_size)]

    @precondition(lambda self: self.open)
    @rule(number=picks)
    def close(self, number):
        shadow = self.open.pop(number % len(self.open))
        shadow.seq.close()
        shadow.seq.close()

    @precondition(lambda self: self.on_pages())
    @rule(data=st.data())
    def reorder(self, data):
        old, away = self.on_pages(), self.away()
        parents = data.draw(st.lists(st.integers(0, len(old) - 1), min_size=1, max_size=4))
        beams = self.manager.reorder([shadow.seq for shadow in old], parents)
        self.open = away
        for beam, parent in zip(beams, parents, strict=True):
            self.open.append(Shadow(beam, old[parent].tokens, old[parent].namespace))
            self.open[-1].pages, self.open[-1].is_new = old[parent].pages, old[parent].is_new

    @precondition(lambda self: self.on_pages())
    @rule(number=picks)
    def swap_out(self, number):
        shadow = self.pick(number)
        before, num_pages = self.state(), len(shadow.pages) - shadow.seq.num_pages_given_back
        if num_pages > self.tier.num_free:
            with pytest.raises(TierError, match="no room"):
                self.manager.swap_out(shadow.seq)
            assert before == self.state()
            return
        self.manager.swap_out(shadow.seq)
        assert (shadow.seq.state, shadow.seq.page_ids) == ("swapped out", ())

    @precondition(lambda self: self.on_pages())
    @rule(number=picks)
    def drop(self, number):
        shadow = self.pick(number)
        shadow.tokens = shadow.tokens[: shadow.seq.num_committed]
        self.manager.drop(shadow.seq)
        assert (shadow.seq.state, shadow.seq.token_ids) == ("dropped", tuple(shadow.tokens))

    @precondition(lambda self: self.away())
    @rule(number=picks)
    def swap_in(self, number):
        shadow = self.away()[number % len(self.away())]
        was_dropped, before = shadow.seq.state == "dropped", self.state()
        try:
            missing = self.manager.swap_in(shadow.seq).tolist()
        except OutOfPagesError:
            assert before == self.state()
            return
        found = len(shadow.tokens) - len(missing)
        assert was_dropped or not missing
        assert missing == shadow.tokens[found:]
        gone = shadow.seq.num_pages_given_back
        shadow.tokens, shadow.pages = shadow.tokens[:found], shadow.pages[:gone] + shadow.seq.page_ids[gone:]
        if missing and self.write_next(shadow, missing):
            shadow.seq.commit(missing)

    @precondition(lambda self: len(self.pins) < 3)
    @rule(prompt=prompts(), namespace=st.sampled_from([None, None, *NAMESPACES]))
    def pin(self, prompt, namespace):
        pin = self.manager.pin(prompt, namespace)
        content = [100 * NAMESPACES.index(namespace) + token for token in prompt[: pin.num_tokens]]
        self.pins.append((pin, pin.page_ids, content))

    @precondition(lambda self: self.pins)
    @rule(number=picks)
    def unpin(self, number):
        pin, _, _ = self.pins.pop(number % len(self.pins))
        pin.unpin()
        pin.unpin()

    @rule(num_pages=st.integers(0, 4))
    def evict(self, num_pages):
        evictable = self.manager.num_evictable_pages
        assert self.manager.evict(num_pages) == min(num_pages, evictable)

    @invariant()
    def books_agree(self):
        if hasattr(self, "manager"):
            self.books_agreed = False
            check_integrity(self.manager)
            self.books_agreed = True

    @invariant()
    def every_sequence_reads_what_it_wrote(self):
        for shadow in getattr(self, "open", []):
            seq, gone = shadow.seq, shadow.seq.num_pages_given_back
            assert seq.num_tokens == len(shadow.tokens)
            assert seq.page_ids == shadow.expected_pages()
            assert seq.token_ids == tuple(shadow.tokens[: seq.num_committed])
            if not shadow.is_away:
                start = gone * self.pool.page_size
                content = self.pool.read(seq.page_ids[gone:], seq.num_tokens - start)
                assert content == shadow.content()[start:]

    @invariant()
    def pins_keep_their_pages(self):
        for pin, pages, content in getattr(self, "pins", []):
            assert pin.page_ids == pages
            assert self.pool.read(pages, len(content)) == content

    @invariant()
    def nobody_pins_what_nobody_names(self):
        if hasattr(self, "manager"):
            stats = self.manager.stats()
            named = {page for shadow in self.on_pages() for page in shadow.expected_pages()}
            pinned = {page for _, pages, _ in self.pins for page in pages}
            for shadow in self.on_pages():
                pinned |= shadow.locked_without_a_name()
            assert stats.cached - stats.evictable == len(pinned - named)
            assert stats.free + stats.owned + stats.cached + stats.reserved == stats.num_pages
            for cache, limit in self.manager.ledger.limited.values():
                assert cache.num_cached_pages <= limit, "the limit is passed"

    @invariant()
    def table_names_the_pages(self):
        open_ = self.on_pages() if hasattr(self, "manager") else []
        if open_:
            table = self.manager.page_table([shadow.seq for shadow in open_])
            assert table.seq_lens.tolist() == [len(shadow.tokens) for shadow in open_]
            assert table.indices.tolist() == [max(page, 0) for s in open_ for page in s.expected_pages()]

    @invariant()
    def tables_that_were_handed_out_stay(self):
        for table, copies in getattr(self, "tables", []):
            found = [table.indptr, table.indices, table.seq_lens]
            assert all(map(torch.equal, found, copies))

    def teardown(self):
        if not getattr(self, "books_agreed", False):
            return
        for shadow in self.open:
            shadow.seq.close()
        for pin, _, _ in self.pins:
            pin.unpin()
        check_integrity(self.manager)
        stats = self.manager.stats()
        assert (stats.owned, stats.shared, stats.slots_reserved) == (0, 0, 0)
        assert stats.cached == stats.evictable == stats.published
        assert not self.tier.saved
        self.manager.evict()
        assert self.manager.num_free_pages == self.manager.num_pages - stats.reserved


def run_programs(max_examples, world=None, **options):
    """The machine with fixed programs: what fails once fails always."""
    run_state_machine_as_test(
        type("Machine", (ManagerMachine,), {"world": world or {}}),
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=30,
            deadline=None,
            database=None,
            derandomize=True,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            print_blob=False,
            **options,
        ),
    )


@pytest.mark.parametrize("fewest_at_once", [step_commit._FEWEST_AT_ONCE, 1])
def test_random_programs_keep_the_books_and_the_content(monkeypatch, fewest_at_once):
    monkeypatch.setattr(step_commit, "_FEWEST_AT_ONCE", fewest_at_once)
    run_programs(80 if fewest_at_once > 1 else 30)


def free_twice(monkeypatch):
    push = PageAllocator._push

    def push_twice(self, pages):
        push(self, pages)
        if self.num_free > 1:
            self._free_stack[self.num_free - 1] = self._free_stack[self.num_free - 2]

    monkeypatch.setattr(PageAllocator, "_push", push_twice)


def free_duplicates(monkeypatch):
    publish = Sequence._publish

    def publish_and_free_what_the_cache_did_not_take(self, cache, stop):
        publish(self, cache, stop)
        allocator, pages = self._ledger.allocator, self._page_view(0, stop // self._ledger.page_size)
        not_taken = pages[~cache.holds(pages)]
        allocator.release(not_taken[allocator.owner_counts_of(not_taken) > 0])

    monkeypatch.setattr(Sequence, "_publish", publish_and_free_what_the_cache_did_not_take)


def retain_one_page_less(monkeypatch):
    retain = PageAllocator.retain
    monkeypatch.setattr(PageAllocator, "retain", lambda self, pages: retain(self, pages[: len(pages) - 1]))


def keep_the_owners_of_published_pages(monkeypatch):
    monkeypatch.setattr(PageBudget, "hand_over", lambda self, pages: None)


def lose_the_owners_of_evicted_pages(monkeypatch):
    evicted = PageBudget._evicted

    def evicted_without_owners(self, num_pages):
        for pages in evicted(self, num_pages):
            self.allocator._num_owners[pages] = 0
            yield pages

    monkeypatch.setattr(PageBudget, "_evicted", evicted_without_owners)


def unlock_nothing(monkeypatch):
    def lock_alone(self, handle):
        if self.cache is not None and handle is not None:
            self.cache.lock(handle)
        self._set_handle(handle)

    monkeypatch.setattr(Sequence, "_move_lock", lock_alone)


def unpin_nothing(monkeypatch):
    monkeypatch.setattr(PinnedPrefix, "unpin", lambda self: self._ledger.pins.pop(id(self), None))


def forget_forks(monkeypatch):
    monkeypatch.setattr(Sequence, "_lock_for_forks", lambda self, handle: None)


def keep_lock_after_truncate(monkeypatch):
    monkeypatch.setattr(Sequence, "_lock_up_to", lambda self, num_tokens: None)


def give_back_a_page_too_much(monkeypatch):
    give_back = Sequence._give_back_behind_window

    def give_back_early(self):
        if self._window is not None:
            self._window -= self._ledger.page_size
            give_back(self)
            self._window += self._ledger.page_size

    monkeypatch.setattr(Sequence, "_give_back_behind_window", give_back_early)


def keep_what_is_closed(monkeypatch):
    give_back_all = Sequence._give_back_all
    monkeypatch.setattr(Sequence, "_give_back_all", lambda self, pages: give_back_all(self, pages[:0]))


def forget_what_changed(monkeypatch):
    monkeypatch.setattr(SequenceRows, "changed", lambda self, row: None)


def count_a_step_twice(monkeypatch):
    batch = StepPlanner._batch

    def batch_twice(self, num_tokens):
        step = batch(self, num_tokens)
        self._ledger.rows.num_tokens[self._rows] += 1
        return step

    monkeypatch.setattr(StepPlanner, "_batch", batch_twice)


@pytest.mark.parametrize(
    "plant, world, sentence",
    [
        (free_twice, {}, "on the free list . times"),
        (free_duplicates, {}, "no live sequence names a free|as many as live sequences name it|must have an owner"),
        (retain_one_page_less, {}, "no live sequence names a free|as many as live sequences name it"),
        (keep_the_owners_of_published_pages, CACHING, "a page has one owner when the prefix cache holds it"),
        (
            lose_the_owners_of_evicted_pages,
            {"num_pages": 6, "prefix_cache": True},
            "no owner and is not on the free list|which is free",
        ),
        (unlock_nothing, {}, "every lock of the prefix cache is held"),
        (unpin_nothing, {}, "every lock of the prefix cache is held"),
        (forget_forks, CACHING, "locks the cached pages it names"),
        (keep_lock_after_truncate, {}, "locks the cached pages it names"),
        (give_back_a_page_too_much, {"page_size": 1}, "has given back . pages, and its next token sees all from"),
        (keep_what_is_closed, {}, "as many as live sequences name it"),
        (forget_what_changed, {}, "the table of the last step names what its sequences name"),
        (count_a_step_twice, {}, "has as many pages as its tokens need|num_tokens"),
    ],
    ids=lambda value: getattr(value, "__name__", "found"),
)
def test_planted_defect_of_the_books_is_found(monkeypatch, plant, world, sentence):
    plant(monkeypatch)
    with pytest.raises((IntegrityError, AssertionError, ValueError), match=sentence):
        run_programs(300, world, phases=[Phase.generate])


def write_to_shared_page(monkeypatch):
    pages_to_add = Sequence._pages_to_add
    monkeypatch.setattr(Sequence, "_pages_to_add", lambda self, num_tokens: (pages_to_add(self, num_tokens)[0], False))


def write_to_shared_page_in_a_step(monkeypatch):
    monkeypatch.setattr(StepPlanner, "_to_copy", lambda self: [])


def copy_nothing(monkeypatch):
    monkeypatch.setattr(PageBudget, "copy_pages", lambda self, pairs: None)


def give_away_what_waits_to_be_copied(monkeypatch):
    copy_pages = PageBudget.copy_pages

    def copy_without_a_hold(self, pairs):
        copy_pages(self, pairs)
        for src in list(self.copy_sources.elements()):
            self.allocator.release([src])
        self.copy_sources.clear()

    def take(self):
        copies, self.pending_copies = self.pending_copies, []
        return copies

    monkeypatch.setattr(PageBudget, "copy_pages", copy_without_a_hold)
    monkeypatch.setattr(PageBudget, "take_copies", take)


def load_nothing(monkeypatch):
    monkeypatch.setattr(ContentTier, "load", lambda self, ticket, pages: None)


def read_rows_one_place_late(monkeypatch):
    def gather_late(flat, starts, indptr):
        return gather_rows(flat, np.minimum(starts + 1, flat.shape[0] - np.diff(indptr)), indptr)

    monkeypatch.setattr(row_heap, "gather_rows", gather_late)


def ignore_the_watermark(monkeypatch):
    monkeypatch.setattr(Sequence, "_num_kept_free", lambda self: 0)


def ignore_the_watermark_in_a_step(monkeypatch):
    monkeypatch.setattr(StepPlanner, "_num_kept_free", lambda self, num_new: 0)


def ignore_the_limit(monkeypatch):
    room_in_cache = Sequence._room_in_cache
    monkeypatch.setattr(
        Sequence, "_room_in_cache", lambda self, cache, stop: (room_in_cache(self, cache, stop)[0], stop)
    )


@pytest.mark.parametrize(
    "plant, world, words",
    [
        (write_to_shared_page, SHARING, r"assert content == shadow|assert \["),
        (write_to_shared_page_in_a_step, SHARING, r"assert content == shadow|assert \["),
        (copy_nothing, SHARING, r"assert content == shadow|assert \["),
        (
            give_away_what_waits_to_be_copied,
            SHARING | {"has_pool": False},
            r"assert content == shadow|assert \[|assert not",
        ),
        (load_nothing, SHARING, r"assert content == shadow|assert \["),
        (read_rows_one_place_late, SHARING, r"assert rows == expected|assert \["),
        (ignore_the_watermark, {"watermark": 0.5}, "the watermark is taken"),
        (ignore_the_watermark_in_a_step, {"watermark": 0.5}, "the watermark is taken"),
        (
            ignore_the_limit,
            {"has_limit": True, "page_size": 1, "num_pages": 20, "prefix_cache": True},
            "the limit is passed",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", "found"),
)
def test_planted_defect_of_the_content_is_found(monkeypatch, plant, world, words):
    """The books agree here; only what a sequence reads back tells, or what it was promised."""
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=words):
        run_programs(300, world, phases=[Phase.generate])
