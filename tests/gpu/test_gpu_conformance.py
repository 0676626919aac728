"""Every op of the Triton back end on the device, held against its specification."""

import pytest

from pagedkv.kernels.backend import OPS
from pagedkv.testing.conformance import run_conformance


@pytest.mark.parametrize("op", OPS)
def test_every_case_passes_on_the_device(device, op, monkeypatch):
    # Refusals of slots and pages that are out of range ask the device, which is done only where it is asked for.
    monkeypatch.setenv("PAGEDKV_DEBUG", "1")
    report = run_conformance("triton", device=device, ops=[op])
    assert not report.failed, str(report)
    assert not report.not_offered, str(report)
    assert report.passed
