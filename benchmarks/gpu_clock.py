"""Times on a GPU: events around each call, in turns, behind a read of more memory than the caches hold."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

__all__ = ["Clock", "CudaClock", "HostClock", "Times"]

Run = Callable[[int], object]

# More than the last cache of any GPU (H200: 50 MiB, MI300X: 256 MiB).
_FLUSH_BYTES = 512 << 20
_MIN_ROUNDS, _MAX_ROUNDS = 7, 100
_MOST_QUEUED_S = 0.25
# An idle GPU runs at a sixth of its clock: so many sleeps of 5 ms at full speed are enough for it to rise.
_SLEEPS, _SLEPT_CYCLES = 40, 10_000_000
_LONGEST_SLEEP_S = 0.05


@dataclass(frozen=True)
class Times:
    """Of one contender, in milliseconds: the median and the 10th and 90th percentile of its rounds.

    late_rounds: of these, those in which the device was ready before the host, and so may have waited for it.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    rounds: int
    late_rounds: int = 0

    @classmethod
    def of(cls, milliseconds: list[float], late_rounds: int = 0) -> Times:
        """Of at least one round."""
        ordered = sorted(milliseconds)
        last = len(ordered) - 1
        low, high = ordered[round(last * 0.1)], ordered[round(last * 0.9)]
        return cls(statistics.median(ordered), low, high, len(ordered), late_rounds)


class Clock:
    """What the benchmark asks of a device."""

    device: torch.device

    def time(self, runs: Mapping[str, Run], budget_s: float) -> dict[str, Times]:
        """Each run(i) in turns, round by round, i counting the rounds; what is timed is the device alone."""
        raise NotImplementedError

    def host_ms(self, run: Callable[[], object], rounds: int) -> Times:
        """The time until the host has its result and the device is idle."""
        run()
        times = []
        for _ in range(rounds):
            self.wait()
            started = time.perf_counter()
            run()
            self.wait()
            times.append((time.perf_counter() - started) * 1e3)
        return Times.of(times)

    def captured(self, run: Callable[[], object]) -> Callable[[], object]:
        """The launches of `run` as a graph that replays them."""
        raise NotImplementedError

    def kernels_ms(self, run: Callable[[], object]) -> float | None:
        """The sum of what the kernels of one call take, by the profiler; None where it sees no kernels."""
        raise NotImplementedError

    def wait(self) -> None:
        """Until the device is idle; raises the error of a kernel that failed."""
        raise NotImplementedError


class CudaClock(Clock):
    """CUDA or ROCm.

    Before each call the device sleeps as long as the host needs to launch it, so that launches never wait for Python:
    the figure is that of the kernels and of nothing else. Where the device has begun before the host is done, the round
    is late: it does not count, and the next sleep is twice as long. All rounds of a call that waits for the device are
    late; then they are all there is, and the figure says so.
    """

    def __init__(self, device: str = "cuda", flush_bytes: int = _FLUSH_BYTES) -> None:
        self.device = torch.device(device)
        self._flushed = torch.ones(flush_bytes // 4, device=self.device)
        sleeps = (self._event_ms(lambda: torch.cuda._sleep(_SLEPT_CYCLES)) for _ in range(_SLEEPS))
        # At the highest clock: a sleep may be too long, but not too short.
        self._cycles_a_s = _SLEPT_CYCLES / max(min(sleeps), 1e-3) * 1e3

    def _event_ms(self, run: Callable[[], object]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop))

    def time(self, runs: Mapping[str, Run], budget_s: float) -> dict[str, Times]:
        sleep_s, round_s = {}, 0.0
        for name, run in runs.items():
            for i in range(3):  # compiles, fills the allocator
                run(i)
            self.wait()
            started = time.perf_counter()
            run(3)
            launch_s = time.perf_counter() - started
            self.wait()
            sleep_s[name] = min(1.5 * launch_s + 2e-5, _LONGEST_SLEEP_S)
            round_s += self._event_ms(lambda run=run: run(4)) / 1e3 + launch_s + 4e-4  # type: ignore[misc]
        rounds = min(max(int(budget_s / round_s), _MIN_ROUNDS), _MAX_ROUNDS)
        queued: dict[str, list[_Round]] = {name: [] for name in runs}
        queued_s = 0.0
        for i in range(rounds):
            for name, run in runs.items():
                queued[name].append(self._round(run, i, sleep_s[name]))
                if queued[name][-1].is_late:
                    sleep_s[name] = min(2 * sleep_s[name], _LONGEST_SLEEP_S)
            queued_s += round_s
            if queued_s > _MOST_QUEUED_S:
                self.wait()
                queued_s = 0.0
        self.wait()
        return {name: _times(of_name) for name, of_name in queued.items()}

    def _round(self, run: Run, i: int, sleep_s: float) -> _Round:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushed.sum()
        torch.cuda._sleep(int(sleep_s * self._cycles_a_s))
        start.record()
        run(i)
        stop.record()
        return _Round(start, stop, is_late=bool(start.query()))

    def captured(self, run: Callable[[], object]) -> Callable[[], object]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def kernels_ms(self, run: Callable[[], object]) -> float | None:
        run()
        self.wait()
        activity = torch.profiler.ProfilerActivity.CUDA
        try:
            with torch.profiler.profile(activities=[activity]) as profile:
                run()
                self.wait()
        except Exception:  # noqa: BLE001 - a machine may keep its counters to itself; no figure depends on this
            return None
        microseconds = sum(event.self_device_time_total for event in profile.key_averages())
        return microseconds / 1e3 if microseconds else None

    def wait(self) -> None:
        torch.cuda.synchronize()


@dataclass(frozen=True)
class _Round:
    start: torch.cuda.Event
    stop: torch.cuda.Event
    is_late: bool


def _times(rounds: list[_Round]) -> Times:
    on_time = [each for each in rounds if not each.is_late]
    counted = on_time if len(on_time) >= _MIN_ROUNDS else rounds
    milliseconds = [each.start.elapsed_time(each.stop) for each in counted]
    return Times.of(milliseconds, sum(each.is_late for each in counted))


class HostClock(Clock):
    """Of a dry run on the CPU: two rounds, whose figures mean nothing."""

    device = torch.device("cpu")

    def time(self, runs: Mapping[str, Run], budget_s: float) -> dict[str, Times]:
        return {name: self.host_ms(lambda run=run: run(0), rounds=1) for name, run in runs.items()}  # type: ignore[misc]

    def captured(self, run: Callable[[], object]) -> Callable[[], object]:
        run()
        return run

    def kernels_ms(self, run: Callable[[], object]) -> float | None:
        run()
        return None

    def wait(self) -> None:
        pass
