"""The workload that management is measured by does what it says."""

import numpy as np
import pytest
from benchmarks.prefix_workload import READS, make_requests, run_requests, run_steps

from pagedkv import check_integrity


def test_requests_are_conversations_on_one_system_prompt():
    requests = make_requests(600, seed=3)
    lengths = [request.prompt.shape[0] for request in requests]
    assert min(lengths) >= 2000
    assert max(lengths) <= 8000
    assert 4000 < np.mean(lengths) < 5200
    assert all((request.prompt[:1500] == requests[0].prompt[:1500]).all() for request in requests)
    assert all(request.prompt.dtype == np.int32 for request in requests)


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_run_evicts_finds_histories_and_leaves_the_books_right(page_size):
    requests = make_requests(1200, seed=1)
    took, manager = run_requests(requests, page_size)
    assert {name: len(times) for name, times in took.items()} == dict.fromkeys(took, len(requests))
    check_integrity(manager)
    stats = manager.stats()
    assert stats.num_sequences == 0
    assert stats.evicted_pages > 0
    assert 0.4 < stats.hit_rate < 1


@pytest.mark.parametrize("page_size", [1, 16])
def test_steps_of_decoding_fill_and_begin_pages_and_are_committed(page_size):
    took, manager = run_steps(20, page_size, num_tokens=40, num_steps=16)
    assert {name: len(times) for name, times in took.items()} == dict.fromkeys(READS, 16) | {"commit": 48}
    check_integrity(manager)
    lengths = [seq.num_tokens for seq in manager.ledger.live.values()]
    assert lengths == [88 + number % 16 for number in range(20)]
    assert [seq.num_committed for seq in manager.ledger.live.values()] == lengths
    assert manager.ledger.cache.num_cached_pages == sum(length // page_size for length in lengths)
