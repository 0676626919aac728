"""What every back end must do, as named cases that its author runs: the public ops, held against their specification.

>>> report = run_conformance("reference", ops=["gather_kv"])
>>> report.failed, report.not_offered
({}, {})
"""

from __future__ import annotations

from ...kernels.backend import OPS, backends
from .attention_cases import attention_cases
from .case import ConformanceCase
from .mla_cases import mla_cases
from .number_cases import number_cases
from .page_cases import page_cases
from .report import ConformanceReport, run_cases
from .rope_store_kv_cases import rope_store_kv_cases
from .store_cases import store_cases

__all__ = ["ConformanceCase", "ConformanceReport", "conformance_cases", "run_conformance"]


def conformance_cases(*ops: str) -> list[ConformanceCase]:
    """The cases of the named ops, without a name those of all, in the order of `pagedkv.kernels.backend.OPS`.

    A case is called with the name of a back end and, where its tensors are not on the CPU, a device. Its string is its
    id: `@pytest.mark.parametrize("case", conformance_cases(), ids=str)`.
    Raises: ValueError for an op that does not exist.
    """
    unknown = sorted(set(ops) - set(OPS))
    if unknown:
        raise ValueError(f"ops must be among {', '.join(OPS)}, got {', '.join(unknown)}.")
    moves, numbers = [*store_cases(), *page_cases()], [*number_cases(), *rope_store_kv_cases()]
    cases = [*moves, *numbers, *attention_cases(), *mla_cases()]
    chosen = set(ops or OPS)
    return sorted((case for case in cases if case.op in chosen), key=lambda case: OPS.index(case.op))


def run_conformance(backend: str, *, device: str = "cpu", ops: list[str] | None = None) -> ConformanceReport:
    """Runs all cases, or those of `ops`, on the back end of this name and tells how each ended; nothing is raised.

    Raises: ValueError for a name that is not registered ("auto" is none) or an op that does not exist.
    """
    if backend not in backends():
        raise ValueError(f"backend must be one of {', '.join(backends())}, got {backend!r}.")
    return run_cases(conformance_cases(*ops or ()), backend, device)
