"""Random programs on a manager for as long as one likes: `make soak`, or this file with --operations.

Every operation is a public call. The books are checked every so many operations and when a program ends; memory must
not grow from one program to the next.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import random
import time
from pathlib import Path

import torch

from pagedkv import (
    HostPageStore,
    HybridKVCacheManager,
    HybridKVPool,
    KVCacheManager,
    KVCacheSpec,
    KVPool,
    OutOfPagesError,
    TierError,
    check_integrity,
    make_layer_groups,
)
from pagedkv.management import eviction_policies

__all__ = ["HybridProgram", "Program", "resident_bytes", "soak"]

_OPERATIONS, _BETWEEN_CHECKS = 2000, 100


class Program:
    """One manager and a few operations of every kind, drawn from a seed."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.manager = self.make_manager()
        self.seqs, self.pins = [], []

    def make_manager(self):
        page_size = self.random.choice([1, 2, 3, 8])
        spec = KVCacheSpec(num_layers=1, num_kv_heads=1, head_dim=8, page_size=page_size, dtype=torch.float32)
        pool = KVPool(spec, self.random.choice([8, 40, 150]))
        self.window = self.random.choice([None, None, 1, 5, 12])
        return KVCacheManager(
            pool,
            prefix_cache=self.random.choice([True, "radix", "hashed", False]),
            eviction=self.random.choice(eviction_policies()),
            window=self.window,
            watermark=self.random.choice([0, 0.1]),
            num_reserved_pages=self.random.choice([0, 1]),
            namespace_limits=self.random.choice([None, {"tenant": 3}]),
            tier=HostPageStore(pool, 30),
            events=True,
        )

    def run(self, num_operations):
        """Does so many operations, and closes what is open."""
        for number in range(num_operations):
            getattr(self, self.random.choice(self.OPERATIONS))()
            if number % _BETWEEN_CHECKS == 0:
                check_integrity(self.manager)
        for seq in self.seqs:
            seq.close()
        for pin in self.pins:
            pin.unpin()
        check_integrity(self.manager)
        self.manager.evict()
        stats = self.manager.stats()
        assert stats.free + stats.reserved == stats.num_pages, "pages are lost"

    def ids(self, count):
        """Few tokens and many equal prompts, so that prefixes meet."""
        return [self.random.randrange(2) for _ in range(count)]

    def any_seq(self):
        on_pages = [seq for seq in self.seqs if seq.state == "on pages"]
        return self.random.choice(on_pages) if on_pages else None

    def open(self):
        if len(self.seqs) >= 12:
            return self.close()
        window = self.window or self.random.choice([None, None, None, 5])
        namespace = self.random.choice([None, None, "tenant", ("a", 0)])
        self.seqs.append(self.manager.open(self.ids(self.random.randrange(30)), namespace, window=window))
        return None

    def append_and_commit(self):
        seq = self.any_seq()
        if seq is None or seq.try_append(self.random.randrange(1, 12)) is None:
            return
        pending = seq.num_tokens - seq.num_committed
        seq.commit(self.ids(self.random.randrange(1, pending + 1)))

    def step(self):
        seqs = [seq for seq in self.seqs if seq.state == "on pages"]
        if not seqs or not self.manager.can_batch(seqs):
            return
        self.manager.batch(seqs)
        for seq in seqs:
            seq.commit([0])

    def fork(self):
        seq = self.any_seq()
        # Forks must name equal tokens for what was reserved before: here nothing is.
        if seq is not None and len(self.seqs) < 12 and seq.num_tokens == seq.num_committed:
            self.seqs.append(seq.fork())

    def truncate(self):
        seq = self.any_seq()
        if seq is not None and seq.num_tokens and -1 not in seq.page_ids:
            seq.truncate(self.random.randrange(seq.num_tokens + 1))

    def roll_back(self):
        seq = self.any_seq()
        if seq is not None and seq.num_tokens:
            with contextlib.suppress(ValueError):  # where a window gave pages back that would be seen
                seq.truncate(seq.num_tokens - 1)

    def close(self):
        if self.seqs:
            self.seqs.pop(self.random.randrange(len(self.seqs))).close()

    def pin(self):
        if len(self.pins) < 3:
            self.pins.append(self.manager.pin(self.ids(20)))
        else:
            self.pins.pop(0).unpin()

    def go_away(self):
        seq = self.any_seq()
        if seq is None:
            return
        with contextlib.suppress(TierError):
            self.random.choice([self.manager.swap_out, self.manager.drop])(seq)

    def come_back(self):
        away = [seq for seq in self.seqs if seq.state != "on pages"]
        if away:
            try:
                self.manager.swap_in(self.random.choice(away))
            except OutOfPagesError:
                self.close()

    def evict(self):
        self.manager.evict(self.random.randrange(6))
        self.manager.take_events()

    OPERATIONS = (
        *["open"] * 2,
        *["append_and_commit"] * 4,
        *["step"] * 3,
        "fork",
        "truncate",
        "roll_back",
        "close",
        "pin",
        "go_away",
        "come_back",
        "evict",
    )


class HybridProgram(Program):
    """The same on layers with a window and layers without."""

    def make_manager(self):
        windows = self.random.choice([[None, 5, 5], [None, 3, 9, 3], [4, 8], [None, None, 1]])
        page_size, heads = self.random.choice([1, 2, 4]), self.random.choice([1, tuple(range(1, len(windows) + 1))])
        spec = KVCacheSpec(
            num_layers=len(windows),
            num_kv_heads=heads,
            head_dim=8,
            page_size=page_size,
            dtype=torch.float32,
            order="page_first",
        )
        pool = HybridKVPool(spec, make_layer_groups(spec, windows), self.random.choice([20, 80, 200]))
        return HybridKVCacheManager(
            pool,
            prefix_cache=self.random.choice([True, True, False]),
            eviction=self.random.choice(eviction_policies()),
            watermark=self.random.choice([0, 0.1]),
            num_reserved_pages=self.random.choice([0, 1]),
            tier=HostPageStore(pool, 60),
        )

    def open(self):
        if len(self.seqs) >= 12:
            return self.close()
        ids, namespace = self.ids(self.random.randrange(30)), self.random.choice([None, None, ("a", 0)])
        self.seqs.append(self.manager.open(ids, namespace))
        return None

    def truncate(self):
        seq = self.any_seq()
        if seq is not None and seq.num_tokens:
            with contextlib.suppress(ValueError):
                seq.truncate(self.random.randrange(seq.num_tokens + 1))

    def pin(self):
        if len(self.pins) < 6:
            self.pins.extend(self.manager.pin(self.ids(20)))
        else:
            self.pins.pop(0).unpin()

    def evict(self):
        self.manager.evict(self.random.randrange(6))


def resident_bytes():
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def soak(num_operations, seconds=None, seed=0):
    """Programs until so many operations are done or the time is over; (operations, growth of memory in bytes)."""
    until = None if seconds is None else time.monotonic() + seconds
    done, settled = 0, 0
    while done < num_operations and (until is None or time.monotonic() < until):
        kind = HybridProgram if seed % 4 == 3 else Program
        kind(seed).run(min(_OPERATIONS, num_operations - done))
        done, seed = done + _OPERATIONS, seed + 1
        if seed % 20 == 10:
            gc.collect()
            settled = settled or resident_bytes()
    gc.collect()
    return done, resident_bytes() - settled if settled else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.monotonic()
    done, growth = soak(options.operations, seed=options.seed)
    print(f"{done} operations in {time.monotonic() - start:.0f} s, memory grew by {growth / 1e6:.1f} MB")
    assert growth < 64e6, "memory grows"


if __name__ == "__main__":
    main()
