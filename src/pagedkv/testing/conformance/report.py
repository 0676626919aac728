"""How the cases ended: what passed, what failed and why, and what the back end does not offer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ...errors import BackendUnavailableError
from .case import ConformanceCase

__all__ = ["ConformanceReport", "run_cases"]

# The reason among the words of a BackendUnavailableError; the back ends that could have run the call follow it.
_REASON = re.compile(r"cannot run (\w+: .*)\. Tried: ", re.S)


@dataclass(frozen=True)
class ConformanceReport:
    """Names of cases; with those that failed or are not offered, why. As a string: the counts and what did not pass.

    not_offered: the back end has no such op or rejects the call. No failure: "auto" passes such a call on. But read the
                 list, for a `rejects` that says too much leaves nothing that could fail.
    """

    backend: str
    passed: tuple[str, ...]
    failed: dict[str, str]
    not_offered: dict[str, str]

    def __str__(self) -> str:
        counts = f"{len(self.passed)} passed, {len(self.failed)} failed, {len(self.not_offered)} not offered"
        lines = [f"{self.backend}: {counts}"]
        lines += [f"  failed {name}: {words}" for name, words in self.failed.items()]
        cases_of: dict[str, list[str]] = {}
        for name, reason in self.not_offered.items():
            cases_of.setdefault(reason, []).append(name.partition("-")[2])
        lines += [f"  not offered {reason}: {', '.join(cases)}" for reason, cases in cases_of.items()]
        return "\n".join(lines)


def run_cases(cases: Iterable[ConformanceCase], backend: str, device: str) -> ConformanceReport:
    """Runs each case, whatever the others do."""
    passed: list[str] = []
    failed: dict[str, str] = {}
    not_offered: dict[str, str] = {}
    for case in cases:
        try:
            case(backend, device)
        except BackendUnavailableError as error:
            reason = _REASON.search(str(error))
            not_offered[str(case)] = reason[1] if reason else str(error)
        except Exception as error:  # noqa: BLE001 - a kernel under test may raise anything: it is the case's verdict
            failed[str(case)] = f"{type(error).__name__}: {error}"
        else:
            passed.append(str(case))
    return ConformanceReport(backend, tuple(passed), failed, not_offered)
