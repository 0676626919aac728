"""Tests on a GPU: without one each is skipped, saying so."""

from __future__ import annotations

import os

import pytest
import torch

# The suite runs in torch's deterministic mode, where cuBLAS wants this before it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(scope="session")
def device() -> str:
    """The device that these tests are about."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU that torch can use")
    return "cuda"
