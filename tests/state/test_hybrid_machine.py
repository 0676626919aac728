"""Random programs on a hybrid manager: the books agree after every step, and each layer sees its own keys."""

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pagedkv import HybridKVCacheManager, OutOfPagesError, check_integrity
from pagedkv.storage import LayerGroup

# Few different tokens, so that prompts meet; what a slot holds says also at which position and in which group.
TOKENS = st.integers(0, 1)
WORLDS = [
    [LayerGroup((0,), None, 4), LayerGroup((1,), 3, 2)],
    [LayerGroup((0,), None, 6), LayerGroup((1,), 5, 2), LayerGroup((2,), 2, 3)],
    [LayerGroup((0,), 4, 2), LayerGroup((1,), 1, 2)],
    [LayerGroup((0,), None, 1), LayerGroup((1,), None, 3)],
    [LayerGroup((0,), 6, 2)],
]


class Tier:
    """Keeps what pages hold."""

    def __init__(self, content):
        self.content, self.saved = content, {}

    def save(self, pages):
        self.saved[len(self.saved)] = self.content[pages.numpy()].copy()
        return len(self.saved) - 1

    def load(self, ticket, pages):
        wanted = pages.numpy() >= 0
        self.content[pages.numpy()[wanted]] = self.saved[ticket][wanted]

    def drop(self, ticket):
        self.saved[ticket] = None


class HybridMachine(RuleBasedStateMachine):
    """Sequences beside lists of their tokens."""

    sequences = Bundle("sequences")

    @initialize(world=st.sampled_from(WORLDS), num_pages=st.integers(8, 40), watermark=st.integers(0, 2))
    def start(self, world, num_pages, watermark):
        self.groups = world
        self.content = np.full((num_pages, max(group.page_size for group in world)), -1)
        self.tier = Tier(self.content)
        self.manager = HybridKVCacheManager(num_pages, world, watermark=watermark, tier=self.tier)
        self.shadows = {}

    def value(self, group, position, token):
        return (group * 1000 + position) * 10 + token

    def write(self, seq, slots, start, ids):
        self.copy()
        for number, own in enumerate(slots):
            size = self.groups[number].page_size
            for offset, (slot, token) in enumerate(zip(own.tolist(), ids, strict=True)):
                self.content[slot // size, slot % size] = self.value(number, start + offset, token)

    def copy(self):
        src, dst = self.manager.take_copies()
        self.content[dst.numpy()] = self.content[src.numpy()].copy()

    @rule(target=sequences, prompt=st.lists(TOKENS, max_size=24), namespace=st.sampled_from([None, "a"]))
    def open(self, prompt, namespace):
        seq = self.manager.open(prompt, namespace)
        assert seq.num_cached_tokens % self.manager.alignment == 0
        assert list(seq.token_ids) == prompt[: seq.num_cached_tokens]
        self.shadows[seq] = prompt[: seq.num_cached_tokens]
        self.extend(seq, prompt[seq.num_cached_tokens :])
        return seq

    @rule(seq=sequences, ids=st.lists(TOKENS, min_size=1, max_size=9))
    def extend(self, seq, ids):
        if not ids or seq.is_closed or seq.state != "on pages":
            return
        fits, start = seq.can_append(len(ids)), seq.num_tokens
        before = self.manager.stats()
        try:
            slots = seq.append(len(ids))
        except OutOfPagesError:
            assert not fits
            assert self.manager.stats() == before
            return
        assert fits
        self.write(seq, slots, start, ids)
        seq.commit(ids)
        self.shadows[seq] = self.shadows[seq] + ids

    @precondition(lambda self: self.on_pages())
    @rule(data=st.data())
    def step(self, data):
        seqs = data.draw(st.lists(st.sampled_from(self.on_pages()), min_size=1, max_size=4, unique=True))
        counts = data.draw(st.lists(st.integers(1, 3), min_size=len(seqs), max_size=len(seqs)) | st.just(1))
        each = [1] * len(seqs) if counts == 1 else counts
        fits, starts = self.manager.can_batch(seqs, counts), [seq.num_tokens for seq in seqs]
        before = self.manager.stats()
        try:
            step = self.manager.batch(seqs, counts)
        except OutOfPagesError:
            assert not fits
            assert self.manager.stats() == before
            return
        assert fits
        stops = step.query_indptr.tolist()
        assert np.diff(stops).tolist() == each
        assert step.seq_lens.tolist() == [start + count for start, count in zip(starts, each, strict=True)]
        ids = [data.draw(TOKENS) for _ in seqs]
        for number, (seq, start) in enumerate(zip(seqs, starts, strict=True)):
            slots = [own.slot_mapping[stops[number] : stops[number + 1]] for own in step.groups]
            self.write(seq, slots, start, [ids[number]] * each[number])
        for own, group in zip(step.groups, self.groups, strict=True):
            assert own.page_table.page_size == group.page_size
            assert own.page_table.seq_lens.tolist() == step.seq_lens.tolist()
        if counts == 1:
            self.manager.commit(seqs, ids)
        else:
            for seq, token, count in zip(seqs, ids, each, strict=True):
                seq.commit([token] * count)
        for seq, token, count in zip(seqs, ids, each, strict=True):
            self.shadows[seq] = self.shadows[seq] + [token] * count

    @rule(target=sequences, seq=sequences)
    def fork(self, seq):
        if seq.is_closed or seq.state != "on pages":
            return multiple()
        child = seq.fork()
        self.shadows[child] = self.shadows[seq]
        return child

    @rule(seq=sequences, length=st.integers(0, 24))
    def truncate(self, seq, length):
        if seq.is_closed or seq.state != "on pages" or length > seq.num_tokens:
            return
        try:
            seq.truncate(length)
        except ValueError as error:
            assert "window begins behind the pages" in str(error)  # noqa: PT017
            return
        self.shadows[seq] = self.shadows[seq][:length]

    @rule(seq=consumes(sequences))
    def close(self, seq):
        seq.close()
        self.shadows.pop(seq, None)

    @rule(target=sequences, beams=st.lists(consumes(sequences), min_size=1, max_size=3, unique=True), data=st.data())
    def reorder(self, beams, data):
        beams = [beam for beam in beams if not beam.is_closed and beam.state == "on pages"] or [self.manager.open([])]
        for beam in beams:
            self.shadows.setdefault(beam, [])
        parents = data.draw(st.lists(st.integers(0, len(beams) - 1), max_size=4))
        known = [self.shadows.pop(beam) for beam in beams]
        continued = self.manager.reorder(beams, parents)
        for seq, parent in zip(continued, parents, strict=True):
            self.shadows[seq] = known[parent]
        return multiple(*continued)

    @rule(seq=sequences, keeps_bytes=st.booleans())
    def put_away(self, seq, keeps_bytes):
        if seq.is_closed or seq.state != "on pages":
            return
        (self.manager.swap_out if keeps_bytes else self.manager.drop)(seq)
        assert seq.page_ids == ((),) * len(self.groups)

    @rule(seq=sequences)
    def bring_back(self, seq):
        if seq.is_closed or seq.state == "on pages":
            return
        before = seq.state
        try:
            again = self.manager.swap_in(seq).tolist()
        except OutOfPagesError:
            assert seq.state == before
            return
        assert again == self.shadows[seq][seq.num_tokens :]
        self.shadows[seq] = self.shadows[seq][: seq.num_tokens]
        self.extend(seq, again)

    @rule(num_pages=st.integers(0, 9))
    def evict(self, num_pages):
        self.manager.evict(num_pages)

    def on_pages(self):
        return [seq for seq in self.shadows if seq.state == "on pages"] if hasattr(self, "shadows") else []

    @invariant()
    def books_agree(self):
        if hasattr(self, "manager"):
            check_integrity(self.manager)

    @invariant()
    def layers_see_what_was_written(self):
        for seq in self.on_pages():
            ids = self.shadows[seq]
            assert list(seq.token_ids) == ids
            for number, group in enumerate(self.groups):
                first = 0 if group.window is None else max(0, len(ids) + 1 - group.window)
                for position in range(first, len(ids)):
                    page = seq.page_ids[number][position // group.page_size]
                    held = self.content[page, position % group.page_size]
                    assert held == self.value(number, position, ids[position]), (number, position)

    def teardown(self):
        if hasattr(self, "manager"):
            for seq in list(self.shadows):
                seq.close()
            self.manager.evict()
            self.copy()
            assert self.manager.num_free_pages == self.manager.num_pages


def test_random_programs_on_a_hybrid_manager():
    run_state_machine_as_test(
        HybridMachine,
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
