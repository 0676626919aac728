"""Conformance cases in processes side by side; one that breaks its process is followed by a new one."""

from __future__ import annotations

import itertools
import json
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

__all__ = ["Shard", "run_shard", "shards_of", "sorted_verdicts"]

# Processes an op, by what its cases cost: most of it is compiling.
_SHARDS = {"paged_attention": 10, "mla_attention": 4}

# By the name of a case: "passed", "failed", "not offered" or "not run", and why.
Verdicts = dict[str, tuple[str, str]]


class Shard(NamedTuple):
    """Cases [start, stop) of an op, of which these are the names of all."""

    op: str
    cases: tuple[str, ...]
    start: int
    stop: int


def shards_of(ops: Sequence[str], most_cases: int) -> list[Shard]:
    """Of these ops, or of all; at most so many cases of each; long ops first."""
    from pagedkv.testing.conformance import conformance_cases

    names: dict[str, list[str]] = {}
    for case in conformance_cases(*ops):
        names.setdefault(case.op, []).append(str(case))
    shards = []
    for op, cases in names.items():
        count, total = _SHARDS.get(op, 1), min(len(cases), most_cases)
        cuts = [total * part // count for part in range(count + 1)]
        shards += [Shard(op, tuple(cases), *cut) for cut in itertools.pairwise(cuts) if cut[0] < cut[1]]
    return sorted(shards, key=lambda shard: -_SHARDS.get(shard.op, 1))


def run_shard(
    verdicts: Verdicts,
    shard: Shard,
    program: Sequence[str],
    environment: dict[str, str],
    *,
    until: float,
    hang_s: float,
) -> None:
    """Sets the verdicts of the cases of a shard, each as it comes, by a program that takes op, start and stop.

    until:  in monotonic time, when it must have ended. hang_s: a case that takes longer has failed.
    """
    next_case = shard.start
    while next_case < shard.stop:
        left = until - time.monotonic()
        if left <= 0:
            break
        begun, began = None, 0.0
        num_lines = 0
        command = [*program, shard.op, str(next_case), str(shard.stop)]
        process = _Process(command, environment, left, hang_s)
        for line in process.lines():
            num_lines += 1
            next_case = line["number"] + 1
            begun, began = line.get("started"), time.monotonic()
            if begun is None:
                said = process.errors() if line["verdict"] == "failed" else ""
                verdicts[line["case"]] = (line["verdict"], f"{line['words']} {said}".strip())
        if process.status == 0:
            break
        if process.has_hung and begun is not None:
            verdicts[begun] = ("failed", f"did not end in {time.monotonic() - began:.0f} s")
        elif begun is not None and time.monotonic() < until:
            verdicts[begun] = ("failed", f"its process ended with status {process.status}. {process.words()}")
        elif not num_lines and time.monotonic() < until:
            # It did not come to its first case, and so it would be again.
            words = f"its process ended with status {process.status}. {process.words()}"
            verdicts.update(dict.fromkeys(shard.cases[next_case : shard.stop], ("failed", words)))
            break
    for name in shard.cases[shard.start : shard.stop]:
        verdicts.setdefault(name, ("not run", ""))


def sorted_verdicts(verdicts: Verdicts) -> dict[str, Any]:
    """Those of each kind, with the words that belong to it."""

    def those(kind: str) -> dict[str, str]:
        return {name: words for name, (verdict, words) in list(verdicts.items()) if verdict == kind}

    return {
        "passed": len(those("passed")),
        "failed": those("failed"),
        "not offered": those("not offered"),
        "not run": list(those("not run")),
    }


class _Process:
    """One that prints lines of JSON; it is killed after a time, or when it has said nothing for too long."""

    def __init__(self, command: list[str], environment: dict[str, str], timeout_s: float, silence_s: float) -> None:
        self._process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._words: list[str] = []
        self._reader = threading.Thread(target=lambda stream: self._words.extend(stream), args=(self._process.stderr,))
        self._reader.start()
        self._until, self._silence_s = time.monotonic() + timeout_s, silence_s
        self._heard = time.monotonic()
        self.has_hung = False
        self.status = 0
        self._watch = threading.Thread(target=self._kill_in_time, daemon=True)
        self._watch.start()

    def _kill_in_time(self) -> None:
        while self._process.poll() is None:
            now = time.monotonic()
            self.has_hung = now - self._heard > self._silence_s
            if self.has_hung or now > self._until:
                self._process.kill()
                return
            time.sleep(0.05)

    def lines(self) -> Iterator[dict[str, Any]]:
        """Those lines; sets the status when the process has ended."""
        with self._process as process:
            assert process.stdout is not None
            for line in process.stdout:
                self._heard = time.monotonic()
                if line.startswith("{"):
                    yield json.loads(line)
            self._reader.join()
        self._watch.join()
        self.status = process.returncode

    def errors(self) -> str:
        """What a compiler has said since this was last asked: its exception does not."""
        said = next((line.strip()[:300] for line in list(self._words) if "error: " in line), "")
        self._words.clear()
        return said

    def words(self) -> str:
        """Its last ones."""
        return "".join(self._words)[-500:].strip()
