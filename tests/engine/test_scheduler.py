"""Scheduler without a model: whatever arrives, budgets hold, pages suffice and every request ends."""

import itertools

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pagedkv.engine.beam_group import advance_beams
from pagedkv.engine.page_needs import longest_answer
from pagedkv.engine.request import Request
from pagedkv.engine.sampling import SamplingParams
from pagedkv.engine.schedule import commit
from pagedkv.engine.scheduler import Scheduler
from pagedkv.management import KVCacheManager, check_integrity


def make_request(number, prompt, num_new, **params):
    request = Request(number, tuple(prompt), SamplingParams(max_new_tokens=num_new, **params), None, None, 0.0)
    if request.params.num_beams > 1:
        request.search = request.params.beam_search(num_new, ())
    return request


def logits_of(token_ids):
    """[6], different for different texts."""
    return torch.randn(6, generator=torch.Generator().manual_seed(hash(tuple(token_ids)) % 2**63))


class Texts:
    """A pool whose slots hold what stands for keys and values: the hash of the text up to their token."""

    device = torch.device("cpu")

    def __init__(self, num_pages, page_size):
        self.num_pages, self.page_size = num_pages, page_size
        self.slots = torch.zeros(num_pages, page_size, dtype=torch.int64)

    def copy_pages(self, src, dst):
        self.slots[dst] = self.slots[src]

    def write(self, schedule):
        written = [hashes(work.continuation.ids)[work.start : work.stop] for work in schedule.works]
        self.slots.view(-1)[schedule.batch.slot_mapping] = torch.tensor(list(itertools.chain(*written)))

    def read(self, seq):
        return self.slots[list(seq.page_ids)].flatten()[: seq.num_tokens].tolist()


def hashes(ids):
    return list(itertools.accumulate(ids, lambda before, token: hash((before, token))))


def compute(manager, scheduler, schedule):
    """What the engine does with a schedule; the next token of a continuation follows from its index and length."""
    if schedule.batch is not None:
        manager.pool.write(schedule)
        assert_batch_is_of_the_works(schedule)
    for work in schedule.works:
        assert manager.pool.read(work.seq) == hashes(work.continuation.ids)[: work.stop]
    commit(manager, schedule.works)
    for request in dict.fromkeys(work.request for work in schedule.works):
        works = [work for work in schedule.works if work.request is request]
        receivers = [continuation for work in works for continuation in work.receivers]
        request.fork_followers()
        if request.search is None:
            sample(request, receivers)
        elif receivers:
            assert receivers == request.continuations
            advance_beams(request, torch.stack([logits_of(beam.ids) for beam in receivers]), manager)
        if request.search.is_done if request.search is not None else not request.live:
            request.status = "finished"
            scheduler.remove(request)


def assert_batch_is_of_the_works(schedule):
    works, batch = schedule.works, schedule.batch
    assert batch.query_indptr.tolist() == [0, *itertools.accumulate(work.num_tokens for work in works)]
    assert batch.seq_lens.tolist() == [work.stop for work in works]
    table = batch.page_table.to_dense()
    for work, pages in zip(works, table.tolist(), strict=True):
        assert tuple(page for page in pages if page >= 0) == work.seq.page_ids


def sample(request, continuations):
    for continuation in continuations:
        continuation.ids.append((1000 + len(continuation.ids)) * (continuation.index + 1))
        # The second half of them ends early.
        early = 2 if 2 * continuation.index > len(request.continuations) else 0
        if continuation.num_new_tokens >= request.params.max_new_tokens - early:
            continuation.finish_reason = "length"
            continuation.close()


def expected_beams(request):
    """What the request's search finds where no pages are."""
    search = request.params.beam_search(request.params.max_new_tokens, ())
    texts = [()] * request.params.num_beams
    while not search.is_done:
        search.step(torch.stack([logits_of([*request.prompt_ids, *text]) for text in texts]))
        texts = search.running
    return search.best()


@st.composite
def workloads(draw):
    page_size = draw(st.sampled_from([1, 2, 4]))
    prompts = draw(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), min_size=1, max_size=8))
    num_new = draw(st.lists(st.integers(1, 10), min_size=len(prompts), max_size=len(prompts)))
    widths = st.sampled_from([1, 1, 1, 2, 3, 5, -2, -3])  # beams below 0
    widths = draw(st.lists(widths, min_size=len(prompts), max_size=len(prompts)))
    arrivals = draw(st.lists(st.integers(0, 6), min_size=len(prompts), max_size=len(prompts)))
    most = max(-(-(len(p) + n) // page_size) * abs(w) for p, n, w in zip(prompts, num_new, widths, strict=True))
    num_pages = draw(st.integers(-(-max(map(len, prompts)) // page_size), most + 10))
    budget, max_num_seqs = (draw(st.integers(max(map(abs, widths)), 12)) for _ in range(2))
    return page_size, num_pages, budget, max_num_seqs, prompts, num_new, widths, sorted(arrivals), draw(st.booleans())


def requests_of(workload):
    page_size, num_pages, _, _, prompts, num_new, widths, _, _ = workload
    for number, (prompt, num_tokens, width) in enumerate(zip(prompts, num_new, widths, strict=True)):
        longest = longest_answer(len(prompt), abs(width), num_pages, page_size)
        params = {"num_beams": -width} if width < 0 else {"n": width, "temperature": 1.0}
        yield make_request(number, prompt, min(num_tokens, longest), **params)


@given(workloads())
# A lock behind duplicates once pinned the cache's own pages.
@example((1, 5, 1, 1, [[0], [0]], [2, 4], [1, 1], [0, 0], True))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_every_request_ends_within_budget_and_pages(workload):
    page_size, num_pages, budget, max_num_seqs, _, _, _, arrivals, prefix_cache = workload
    manager = KVCacheManager(Texts(num_pages, page_size), prefix_cache=prefix_cache)
    scheduler = Scheduler(manager, budget, max_num_seqs, shares_prefixes=prefix_cache)
    requests = list(requests_of(workload))
    for step in range(2000):
        for request, arrival in zip(requests, arrivals, strict=True):
            if arrival == step:
                scheduler.add(request)
        schedule = scheduler.schedule()
        assert not schedule.failed
        assert sum(work.num_tokens for work in schedule.works) <= budget
        assert sum(len(request.live) for request in scheduler.running) <= min(max_num_seqs, budget)
        assert bool(schedule.works) == bool(scheduler.running)
        assert (schedule.batch is None) == (not schedule.works)
        # Who is let in has room among all that were chosen before.
        assert not (schedule.admitted and schedule.preempted)
        for work in schedule.works:
            assert work.start == work.continuation.num_computed
        slots = schedule.batch.slot_mapping.tolist() if schedule.works else []
        assert len(set(slots)) == len(slots) == sum(work.num_tokens for work in schedule.works)
        compute(manager, scheduler, schedule)
        check_integrity(manager)
        if all(request.finished for request in requests):
            break
    assert all(request.finished for request in requests)
    assert manager.stats().num_sequences == 0
    for request in requests:
        if request.search is not None:
            assert request.search.best() == expected_beams(request)


def test_decoding_goes_first_and_prefill_takes_the_rest():
    manager = KVCacheManager(Texts(50, 4))
    scheduler = Scheduler(manager, 8, 4)
    for number, length in enumerate((3, 20, 9)):
        scheduler.add(make_request(number, range(number * 100, number * 100 + length), 50))
    taken = []
    for _ in range(5):
        schedule = scheduler.schedule()
        taken.append([(work.request.id, work.num_tokens, work.is_decode) for work in schedule.works])
        compute(manager, scheduler, schedule)
    assert taken == [
        [(0, 3, False), (1, 5, False)],
        [(0, 1, True), (1, 7, False)],
        [(0, 1, True), (1, 7, False)],
        [(0, 1, True), (1, 1, False), (2, 6, False)],
        [(0, 1, True), (1, 1, True), (2, 3, False)],
    ]


def test_newest_request_gives_its_pages_back_and_comes_again():
    manager = KVCacheManager(Texts(6, 2), prefix_cache=False)
    scheduler = Scheduler(manager, 100, 4)
    old, new = make_request(0, range(4), 6), make_request(1, range(10, 12), 6)
    scheduler.add(old)
    scheduler.add(new)
    preempted = []
    while not (old.finished and new.finished):
        schedule = scheduler.schedule()
        preempted += [request.id for request in schedule.preempted]
        compute(manager, scheduler, schedule)
        check_integrity(manager)
    assert preempted == [1]
    assert new.num_preemptions == 1
    assert new.num_new_tokens == 6
