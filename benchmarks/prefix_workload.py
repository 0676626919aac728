"""What the management costs a request: a chat server's calls in the order in which they come, without a model.

python -m benchmarks.prefix_workload [--requests N] [--page-size P ...]

10,000 requests of conversations that come back with their history and answer, on one system prompt of 1,500 tokens; 64
in flight; 1,000,000 token slots, so that eviction goes on nearly all the time. Token ids are int32 arrays made before
the clock starts. Then a few calls alone: eviction among few and many leaves, a conversation of 100 turns; and a loop of
decoding over 256 sequences: a step's slots and tables, and its commit.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pagedkv import KVCacheManager, RadixCache
from pagedkv.management import StepBatch

from . import machine, report

__all__ = ["READS", "Request", "main", "make_requests", "run_requests", "run_steps"]

Ids = npt.NDArray[np.int32]

_SYSTEM_TOKENS, _NUM_SLOTS, _IN_FLIGHT = 1500, 1_000_000, 64

# What a model reads of a step besides the slots of the new tokens and where each sequence's begin.
READS: dict[str, Callable[[StepBatch], object]] = {
    "no table": lambda step: step.seq_lens,
    "the dense table": lambda step: (step.seq_lens, step.dense_table()),
    "the CSR table": lambda step: step.page_table,
}


class Request(NamedTuple):
    """A prompt and the answer that a model would give."""

    prompt: Ids
    answer: Ids


def make_requests(count: int, seed: int = 0) -> list[Request]:
    """Conversations of 2,000 to 8,000 tokens, about 4,500 on average, whose turns come in turn with others'."""
    source = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> Ids:
        return source.integers(0, 128_000, source.integers(low, high), dtype=np.int32)

    system = tokens(_SYSTEM_TOKENS, _SYSTEM_TOKENS + 1)
    conversations: list[Ids] = [system] * 200
    requests = []
    for _ in range(count):
        which = int(source.integers(len(conversations)))
        if conversations[which].shape[0] > 6500:
            conversations[which] = system
        is_new = conversations[which].shape[0] == _SYSTEM_TOKENS
        prompt = np.concatenate([conversations[which], tokens(500, 3000) if is_new else tokens(200, 1200)])
        answer = tokens(50, 300)
        conversations[which] = np.concatenate([prompt, answer])
        requests.append(Request(prompt, answer))
    return requests


def run_requests(requests: list[Request], page_size: int) -> tuple[dict[str, list[float]], KVCacheManager]:
    """Microseconds of every call, by name."""
    manager = KVCacheManager(_NUM_SLOTS // page_size, page_size)
    took: dict[str, list[float]] = defaultdict(list)
    clock = time.perf_counter

    def timed(name: str, call: Callable[..., Any], *args: Any) -> Any:
        start = clock()
        result = call(*args)
        took[name].append((clock() - start) * 1e6)
        return result

    running: deque[tuple[Any, Request]] = deque()
    for request in requests:
        if len(running) == _IN_FLIGHT:
            _finish(timed, *running.popleft())
        sequence = timed("open", manager.open, request.prompt[:-1])
        timed("append prompt", sequence.append, request.prompt.shape[0] - sequence.num_cached_tokens)
        timed("commit prompt", sequence.commit, request.prompt[sequence.num_cached_tokens :])
        running.append((sequence, request))
    while running:
        _finish(timed, *running.popleft())
    return took, manager


def _finish(timed: Callable[..., Any], sequence: Any, request: Request) -> None:
    timed("append answer", sequence.append, request.answer.shape[0])
    timed("commit answer", sequence.commit, request.answer)
    timed("close", sequence.close)


def _evict_one_of(num_leaves: int) -> float:
    cache = RadixCache(page_size=16)
    ids = np.random.default_rng(0).integers(0, 128_000, (num_leaves, 32), dtype=np.int32)
    for leaf in range(num_leaves):
        cache.insert(ids[leaf], np.array([2 * leaf, 2 * leaf + 1], np.int32))
    return _median(lambda: cache.evict(1), 50)


def _match_turns(num_turns: int) -> float:
    cache = RadixCache(page_size=16)
    ids = np.random.default_rng(0).integers(0, 128_000, num_turns * 64, dtype=np.int32)
    for turn in range(1, num_turns + 1):
        cache.insert(ids[: turn * 64], np.arange(turn * 4, dtype=np.int32))
    return _median(lambda: cache.match(ids), 300)


def run_steps(
    num_sequences: int, page_size: int, *, num_tokens: int = 4500, num_steps: int = 128
) -> tuple[dict[str, list[float]], KVCacheManager]:
    """Microseconds of every step of a loop of decoding, with each of `READS` in turn, and of every commit.

    The sequences are `num_tokens` long and up to 15 more, so that in every step some begin a page and some fill one.
    """
    source = np.random.default_rng(0)
    pages_each = -(-(num_tokens + 16 + len(READS) * num_steps) // page_size)
    manager = KVCacheManager(num_sequences * pages_each, page_size)
    sequences = []
    for number in range(num_sequences):
        ids = source.integers(0, 128_000, num_tokens + number % 16, dtype=np.int32)
        sequence = manager.open(ids)
        sequence.append(ids.shape[0])
        sequence.commit(ids)
        sequences.append(sequence)
    took: dict[str, list[float]] = defaultdict(list)
    clock = time.perf_counter
    for name, read in READS.items():
        for _ in range(num_steps):
            ids = source.integers(0, 128_000, num_sequences, dtype=np.int32)
            start = clock()
            read(manager.batch(sequences))
            stop = clock()
            manager.commit(sequences, ids)
            took[name].append((stop - start) * 1e6)
            took["commit"].append((clock() - stop) * 1e6)
    return took, manager


def _median(call: Callable[[], object], count: int) -> float:
    took = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        took.append((time.perf_counter() - start) * 1e6)
    return statistics.median(took)


def _report(page_size: int, requests: list[Request]) -> None:
    took, manager = run_requests(requests, page_size)
    total = sum(map(sum, took.values())) / len(requests) / 1e3
    stats = manager.stats()
    print(f"\npage size {page_size}: {total:.4f} ms a request")
    print(f"  hit rate {stats.hit_rate:.4f}, {stats.evicted_pages} pages evicted")
    for name, times in took.items():
        times.sort()
        p50, p99 = times[len(times) // 2], times[len(times) * 99 // 100]
        print(f"  {name:16s} {p50:8.1f} us median {p99:8.1f} us p99 {times[-1]:8.1f} us longest")


def main() -> None:
    """Prints all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--page-size", type=int, nargs="*", default=[16, 1])
    options = parser.parse_args()
    report.print_machine(machine.describe())
    requests = make_requests(options.requests)
    lengths = [request.prompt.shape[0] for request in requests]
    print(
        f"{len(requests)} prompts of {min(lengths)} to {max(lengths)} tokens, {statistics.mean(lengths):.0f} on average"
    )
    for page_size in options.page_size:
        _report(page_size, requests)
    print(f"\nevict one page of 100 leaves {_evict_one_of(100):.1f} us, of 50,000 {_evict_one_of(50_000):.1f} us")
    print(f"match a conversation of 100 turns {_match_turns(100):.1f} us")
    print("\na step of 256 sequences of 4,500 tokens, one new token each:")
    for page_size in options.page_size:
        took, _ = run_steps(256, page_size)
        medians = [f"{name} {statistics.median(times):.1f} us" for name, times in took.items()]
        print(f"  page size {page_size}: {', '.join(medians)}")


if __name__ == "__main__":
    main()
