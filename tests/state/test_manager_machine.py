"""Random programs over a small manager: every page is accounted for, and every sequence reads back its own tokens.

The model is one list of token ids a sequence. A fake pool holds one number a slot: what a sequence writes it must read
at its slots for as long as it is open, whatever the others do. So a page handed out twice, a missing copy on write and
a wrong hit all show as wrong content, independently of the books that `check_integrity` reads.
"""

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

from pagedkv import IntegrityError, KVCacheManager, OutOfPagesError, check_integrity
from pagedkv.management import radix_cache
from pagedkv.management.allocator import PageAllocator
from pagedkv.management.ledger import PageLedger
from pagedkv.management.radix_cache import RadixCache
from pagedkv.management.radix_node import RadixNode
from pagedkv.management.sequence import Sequence

NAMESPACES = [None, "", "a"]
STORY = [0, 1, 1, 2, 0, 0, 1, 2, 2, 1, 0, 2]


@st.composite
def prompts(draw, max_size=14):
    """A beginning of one story and then something else, so that prompts share pages and part ways inside pages."""
    known = draw(st.integers(0, len(STORY)))
    return (STORY[:known] + draw(st.lists(st.integers(0, 2), max_size=4)))[:max_size]


class ContentPool:
    """One number a slot in place of keys and values; -1 is never written."""

    device = torch.device("cpu")

    def __init__(self, num_pages, page_size):
        self.num_pages, self.page_size = num_pages, page_size
        self.content = torch.full((num_pages, page_size), -1, dtype=torch.int64)

    def copy_pages(self, src, dst):
        self.content[dst] = self.content[src]

    def write(self, slots, content):
        self.content.view(-1)[slots] = torch.tensor(content, dtype=torch.int64)

    def read(self, pages, num_tokens):
        return self.content[list(pages)].reshape(-1)[:num_tokens].tolist()


class Shadow:
    """What the model knows of one open sequence; `tokens` counts reserved ones, written at once."""

    def __init__(self, seq, tokens, namespace):
        self.seq, self.tokens, self.namespace = seq, tokens, namespace
        self.pages = seq.page_ids

    def content(self):
        """What its slots must hold: keys and values of equal tokens differ between namespaces."""
        return [100 * NAMESPACES.index(self.namespace) + token for token in self.tokens]


class ManagerMachine(RuleBasedStateMachine):
    @initialize(
        page_size=st.sampled_from([1, 2, 4]), num_pages=st.integers(3, 20), has_pool=st.booleans(), prefix=st.booleans()
    )
    def start(self, page_size, num_pages, has_pool, prefix):
        self.pool = ContentPool(num_pages, page_size)
        # Most programs are about the prefix cache, so it is off only when both draws say so.
        prefix_cache = prefix or has_pool
        if has_pool:
            self.manager = KVCacheManager(self.pool, prefix_cache=prefix_cache)
        else:
            self.manager = KVCacheManager(num_pages, page_size=page_size, prefix_cache=prefix_cache)
        self.open = []

    picks = st.integers(0, 10**6)

    def pick(self, number):
        return self.open[number % len(self.open)]

    def perform_copies(self):
        for src, dst in zip(*self.manager.take_copies(), strict=True):
            self.pool.copy_pages(src, dst)

    def write_next(self, shadow, tokens):
        """Append and write, or leave everything as it was."""
        before = [other.seq.page_ids for other in self.open], self.manager.stats()
        fits = shadow.seq.can_append(len(tokens))
        if not fits:
            with pytest.raises(OutOfPagesError, match="cannot allocate") as raised:
                shadow.seq.append(len(tokens))
            assert raised.value.needed > raised.value.free + raised.value.evictable
            assert raised.value.free + raised.value.evictable + raised.value.pinned == self.manager.num_pages
            assert before == ([other.seq.page_ids for other in self.open], self.manager.stats())
            return False
        slots = shadow.seq.append(len(tokens))
        assert slots.dtype == torch.int64
        assert slots.shape == (len(tokens),)
        self.perform_copies()
        # Only the copy of its own partly filled last page may change what it names.
        kept = len(shadow.tokens) // self.pool.page_size
        assert shadow.seq.page_ids[:kept] == shadow.pages[:kept]
        shadow.tokens = shadow.tokens + tokens
        shadow.pages = shadow.seq.page_ids
        self.pool.write(slots, shadow.content()[-len(tokens) :])
        return True

    @precondition(lambda self: len(self.open) < 6)
    @rule(
        prompt=prompts(),
        namespace=st.sampled_from([None, None, *NAMESPACES]),
        commit=st.sampled_from([True, True, False]),
    )
    def open_sequence(self, prompt, namespace, commit):
        seq = self.manager.open(prompt, namespace)
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

    @precondition(lambda self: self.open)
    @rule(number=picks, tokens=st.lists(st.integers(0, 2), min_size=1, max_size=5))
    def append(self, number, tokens):
        self.write_next(self.pick(number), tokens)

    @precondition(lambda self: self.open)
    @rule(number=picks, part=st.integers(1, 8), whole=st.booleans())
    def commit(self, number, part, whole):
        shadow = self.pick(number)
        seq = shadow.seq
        pending = shadow.tokens[seq.num_committed :]
        if pending:
            seq.commit(shadow.tokens if whole else pending[:part])
            assert seq.token_ids == tuple(shadow.tokens[: seq.num_committed])

    @precondition(lambda self: 0 < len(self.open) < 6)
    @rule(number=picks)
    def fork(self, number):
        shadow = self.pick(number)
        self.open.append(Shadow(shadow.seq.fork(), shadow.tokens, shadow.namespace))
        assert self.open[-1].pages == shadow.pages

    @precondition(lambda self: self.open)
    @rule(number=picks, length=picks)
    def truncate(self, number, length):
        shadow = self.pick(number)
        shadow.tokens = shadow.tokens[: length % (len(shadow.tokens) + 1)]
        shadow.seq.truncate(len(shadow.tokens))
        shadow.pages = shadow.pages[: -(-len(shadow.tokens) // self.pool.page_size)]

    @precondition(lambda self: self.open)
    @rule(number=picks)
    def close(self, number):
        shadow = self.pick(number)
        self.open.remove(shadow)
        shadow.seq.close()
        shadow.seq.close()

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def reorder(self, data):
        parents = data.draw(st.lists(st.integers(0, len(self.open) - 1), min_size=1, max_size=4))
        beams = self.manager.reorder([shadow.seq for shadow in self.open], parents)
        old, self.open = self.open, []
        for beam, parent in zip(beams, parents, strict=True):
            self.open.append(Shadow(beam, old[parent].tokens, old[parent].namespace))
            assert beam.page_ids == old[parent].pages

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
            seq = shadow.seq
            assert seq.num_tokens == len(shadow.tokens)
            assert seq.page_ids == shadow.pages
            assert self.pool.read(seq.page_ids, seq.num_tokens) == shadow.content()
            assert seq.token_ids == tuple(shadow.tokens[: seq.num_committed])

    @invariant()
    def nobody_pins_what_nobody_names(self):
        if hasattr(self, "manager"):
            stats = self.manager.stats()
            assert stats.cached == stats.evictable

    @invariant()
    def table_names_the_pages(self):
        open_ = getattr(self, "open", [])
        if open_:
            table = self.manager.page_table([shadow.seq for shadow in open_])
            assert table.seq_lens.tolist() == [len(shadow.tokens) for shadow in open_]
            assert table.indices.tolist() == [page for shadow in open_ for page in shadow.pages]

    def teardown(self):
        if not getattr(self, "books_agreed", False):
            return
        for shadow in self.open:
            shadow.seq.close()
        check_integrity(self.manager)
        stats = self.manager.stats()
        assert (stats.owned, stats.shared, stats.slots_reserved) == (0, 0, 0)
        assert stats.cached == stats.evictable == stats.published
        self.manager.evict()
        assert self.manager.num_free_pages == self.manager.num_pages


def run_programs(max_examples, **options):
    """The machine with fixed programs: what fails once fails always."""
    run_state_machine_as_test(
        ManagerMachine,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=40,
            deadline=None,
            database=None,
            derandomize=True,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            print_blob=False,
            **options,
        ),
    )


def test_random_programs_keep_the_books_and_the_content():
    run_programs(250)


def free_twice(monkeypatch):
    push = PageAllocator._push

    def push_twice(self, pages):
        push(self, pages)
        if self.num_free > 1:
            self._free_stack[self.num_free - 1] = self._free_stack[self.num_free - 2]

    monkeypatch.setattr(PageAllocator, "_push", push_twice)


def free_duplicates(monkeypatch):
    publish = Sequence._publish

    def publish_and_free_what_the_cache_did_not_take(self, stop):
        publish(self, stop)
        if self._ledger.cache is None:
            return
        allocator, pages = self._ledger.allocator, self._pages.view(0, stop // self._ledger.page_size)
        not_taken = pages[~self._ledger.cache.holds(pages)]
        allocator.release(not_taken[allocator.owner_counts_of(not_taken) > 0])

    monkeypatch.setattr(Sequence, "_publish", publish_and_free_what_the_cache_did_not_take)


def retain_one_page_less(monkeypatch):
    retain = PageAllocator.retain
    monkeypatch.setattr(PageAllocator, "retain", lambda self, pages: retain(self, pages[: max(1, len(pages) - 1)]))


def release_cached_pages_twice(monkeypatch):
    evict = PageLedger.evict

    def evict_and_forget(self, num_pages):
        num_free = self.allocator.num_free
        evicted = evict(self, num_pages)
        if evicted:
            self.allocator._num_owners[self.allocator._free_stack[num_free]] += 1
        return evicted

    monkeypatch.setattr(PageLedger, "evict", evict_and_forget)


def lock_nothing(monkeypatch):
    monkeypatch.setattr(RadixCache, "lock", lambda self, handle: None)
    monkeypatch.setattr(RadixCache, "unlock", lambda self, handle: None)


def unlock_nothing(monkeypatch):
    monkeypatch.setattr(RadixCache, "unlock", lambda self, handle: None)


def evict_locked(monkeypatch):
    monkeypatch.setattr(RadixNode, "is_evictable", property(lambda self: not self.children and self.parent is not None))


def split_without_the_locks(monkeypatch):
    split = RadixNode.split

    def split_unlocked(self, num_pages):
        prefix = split(self, num_pages)
        prefix.locks = 0
        return prefix

    monkeypatch.setattr(RadixNode, "split", split_unlocked)


def forget_forks(monkeypatch):
    monkeypatch.setattr(Sequence, "_lock_for_forks", lambda self, handle: None)


def keep_lock_after_truncate(monkeypatch):
    monkeypatch.setattr(Sequence, "_lock_up_to", lambda self, num_tokens: None)


def write_to_shared_page(monkeypatch):
    pages_to_add = Sequence._pages_to_add
    monkeypatch.setattr(Sequence, "_pages_to_add", lambda self, num_tokens: (pages_to_add(self, num_tokens)[0], False))


def copy_nothing(monkeypatch):
    monkeypatch.setattr(PageLedger, "copy_page", lambda self, src, dst: None)


def believe_the_first_page(monkeypatch):
    def compare_the_first_only(a, b):
        return min(len(a), len(b))

    monkeypatch.setattr(radix_cache, "common_prefix_len", compare_the_first_only)


def ignore_namespaces(monkeypatch):
    monkeypatch.setattr(radix_cache, "namespace_key", lambda namespace: None)


@pytest.mark.parametrize(
    "plant, sentence",
    [
        (free_twice, "on the free list 2 times"),
        (free_duplicates, "no live sequence names a free page|as many owners as"),
        (retain_one_page_less, "no live sequence names a free page|as many owners as"),
        (release_cached_pages_twice, "on the free list and has 1 owners"),
        (lock_nothing, "every lock of the radix tree is held"),
        (unlock_nothing, "every lock of the radix tree is held"),
        (
            evict_locked,
            "every lock of the radix tree is held|lock nodes that are not in|the cache counts what its nodes hold",
        ),
        (split_without_the_locks, "every lock of the radix tree is held"),
        (forget_forks, "locks the cached pages it names"),
        (believe_the_first_page, "locks other tokens than it committed"),
        (keep_lock_after_truncate, "locks the cached pages it names"),
    ],
    ids=lambda value: getattr(value, "__name__", "found"),
)
def test_planted_defect_of_the_books_is_found(monkeypatch, plant, sentence):
    plant(monkeypatch)
    with pytest.raises(IntegrityError, match=sentence):
        run_programs(300, phases=[Phase.generate])


@pytest.mark.parametrize("plant", [write_to_shared_page, copy_nothing, ignore_namespaces], ids=lambda p: p.__name__)
def test_planted_defect_of_the_content_is_found(monkeypatch, plant):
    """The books agree here; only what a sequence reads back tells."""
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=r"self.pool.read|assert \["):
        run_programs(300, phases=[Phase.generate])
