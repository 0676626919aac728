"""Scheduler without a model: whatever arrives, budgets hold, pages suffice and every request ends."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from pagedkv.engine.request import Request
from pagedkv.engine.sampling import SamplingParams
from pagedkv.engine.scheduler import Scheduler
from pagedkv.management import KVCacheManager, check_integrity


def make_request(number, prompt, num_new):
    return Request(number, tuple(prompt), SamplingParams(max_new_tokens=num_new), None, None, 0.0)


def compute(scheduler, schedule):
    """What the engine does with a schedule; the new token of a request follows from its length."""
    for work in schedule.works:
        request = work.request
        work.seq.commit(request.ids[work.start : work.stop])
        if work.gives_token:
            request.ids.append(1000 + len(request.ids))
            if request.num_new_tokens == request.params.max_new_tokens:
                request.status = "finished"
                scheduler.remove(request)


@st.composite
def workloads(draw):
    page_size = draw(st.sampled_from([1, 2, 4]))
    prompts = draw(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), min_size=1, max_size=8))
    num_new = draw(st.lists(st.integers(1, 10), min_size=len(prompts), max_size=len(prompts)))
    arrivals = draw(st.lists(st.integers(0, 6), min_size=len(prompts), max_size=len(prompts)))
    most = max(-(-(len(p) + n) // page_size) for p, n in zip(prompts, num_new, strict=True))
    num_pages = most + draw(st.integers(0, 10))
    budget, max_num_seqs = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    return page_size, num_pages, budget, max_num_seqs, prompts, num_new, sorted(arrivals), draw(st.booleans())


@given(workloads())
@example((1, 5, 1, 1, [[0], [0]], [2, 4], [0, 0], True))  # a lock behind duplicates once pinned the cache's own pages
@settings(max_examples=150, deadline=None, derandomize=True)
def test_every_request_ends_within_budget_and_pages(workload):
    page_size, num_pages, budget, max_num_seqs, prompts, num_new, arrivals, prefix_cache = workload
    manager = KVCacheManager(num_pages, page_size, prefix_cache)
    scheduler = Scheduler(manager, budget, max_num_seqs, shares_prefixes=prefix_cache)
    requests = [make_request(i, p, n) for i, (p, n) in enumerate(zip(prompts, num_new, strict=True))]
    for step in range(2000):
        for request, arrival in zip(requests, arrivals, strict=True):
            if arrival == step:
                scheduler.add(request)
        schedule = scheduler.schedule()
        assert not schedule.failed
        assert sum(work.num_tokens for work in schedule.works) <= budget
        assert len(scheduler.running) <= min(max_num_seqs, budget)
        assert bool(schedule.works) == bool(scheduler.running)
        for work in schedule.works:
            assert work.start == work.request.num_computed
            assert work.slots.shape[0] == work.num_tokens
        slots = [slot for work in schedule.works for slot in work.slots.tolist()]
        assert len(set(slots)) == len(slots)
        compute(scheduler, schedule)
        check_integrity(manager)
        if all(request.finished for request in requests):
            break
    assert all(request.finished for request in requests)
    assert manager.stats().num_sequences == 0


def test_decoding_goes_first_and_prefill_takes_the_rest():
    manager = KVCacheManager(50, 4)
    scheduler = Scheduler(manager, 8, 4)
    for number, length in enumerate((3, 20, 9)):
        scheduler.add(make_request(number, range(number * 100, number * 100 + length), 50))
    taken = []
    for _ in range(5):
        schedule = scheduler.schedule()
        taken.append([(work.request.id, work.num_tokens, work.is_decode) for work in schedule.works])
        compute(scheduler, schedule)
    assert taken == [
        [(0, 3, False), (1, 5, False)],
        [(0, 1, True), (1, 7, False)],
        [(0, 1, True), (1, 7, False)],
        [(0, 1, True), (1, 1, False), (2, 6, False)],
        [(0, 1, True), (1, 1, True), (2, 3, False)],
    ]


def test_newest_request_gives_its_pages_back_and_comes_again():
    manager = KVCacheManager(6, 2, prefix_cache=False)
    scheduler = Scheduler(manager, 100, 4)
    old, new = make_request(0, range(4), 6), make_request(1, range(10, 12), 6)
    scheduler.add(old)
    scheduler.add(new)
    preempted = []
    while not (old.finished and new.finished):
        schedule = scheduler.schedule()
        preempted += [request.id for request in schedule.preempted]
        compute(scheduler, schedule)
        check_integrity(manager)
    assert preempted == [1]
    assert new.num_preemptions == 1
    assert new.num_new_tokens == 6
