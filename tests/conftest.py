"""What every test gets: poisoned memory, a seed of its own, and the thread count restored."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

# Without a GPU the Triton kernels run interpreted. Triton reads this when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pagedkv
from pagedkv.testing.poison import poisoned_memory

# PAGEDKV_NATIVE=0 runs the suite on the reference; otherwise a missing native core fails the tests that ask for it.
# Triton's interpreter runs where its compiler does; on a machine with a GPU tests/gpu run its kernels on that.
BACKENDS = ("reference",) if os.environ.get("PAGEDKV_NATIVE") == "0" else ("reference", "cpu")
if pagedkv.backends()["triton"].available and os.environ.get("TRITON_INTERPRET") == "1":
    BACKENDS += ("triton",)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without the native core, tests of what only it has are not this suite's."""
    if os.environ.get("PAGEDKV_NATIVE") == "0":
        left_out = [item for item in items if item.get_closest_marker("native")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    seed = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@pytest.fixture(autouse=True)
def _threads_restored() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(params=BACKENDS)
def any_backend(request: pytest.FixtureRequest) -> str:
    """Each back end that this machine must run."""
    return str(request.param)


@pytest.fixture
def smallest_calls() -> dict[str, Callable[..., Any]]:
    """Each op of the table by name, as a function that calls it on a few numbers; keywords are passed on."""
    pages = torch.zeros(2, 2, 4, 1, 8)
    tokens = torch.zeros(2, 1, 1, 8)
    table = pagedkv.PageTable.from_rows([[1]], seq_lens=[3], page_size=4)
    one_query = torch.tensor([0, 1], dtype=torch.int32)
    latents = pages[:, :, :, 0]

    def plan(head_dim: int) -> pagedkv.AttentionPlan:
        # Made by the call alone: a plan asks for the native core, too.
        heads = {"num_q_heads": 1, "num_kv_heads": 1}
        return pagedkv.plan_attention(one_query, table, **heads, head_dim=head_dim, value_dim=8)

    return {
        "store_kv": lambda **options: pagedkv.store_kv(*tokens, *pages, torch.tensor([3]), **options),
        "gather_kv": lambda **options: pagedkv.gather_kv(*pages, torch.tensor([3]), **options),
        "copy_pages": lambda **options: pagedkv.copy_pages(*pages, torch.tensor([0]), torch.tensor([1]), **options),
        "quantize_kv": lambda **options: pagedkv.quantize_kv(tokens[0], torch.int8, **options),
        "apply_rope": lambda **options: pagedkv.apply_rope(
            tokens[0], torch.tensor([3]), pagedkv.RotaryEmbedding(8), **options
        ),
        "rope_store_kv": lambda **options: pagedkv.rope_store_kv(
            tokens[0], *tokens, torch.tensor([3]), pagedkv.RotaryEmbedding(8), *pages, torch.tensor([3]), **options
        ),
        "paged_attention": lambda **options: pagedkv.paged_attention(tokens[0], *pages, plan(8), **options),
        "mla_attention": lambda **options: pagedkv.mla_attention(*tokens, *latents, plan(16), sm_scale=1.0, **options),
        "merge_states": lambda **options: pagedkv.merge_states(tokens, torch.zeros(2, 1, 1), **options),
    }
