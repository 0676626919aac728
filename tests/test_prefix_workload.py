"""The workload that management is measured by does what it says."""

import numpy as np
import pytest
from benchmarks.prefix_workload import make_requests, run_requests

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
