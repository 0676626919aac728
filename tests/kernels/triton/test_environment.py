"""TRITON_INTERPRET that changes between the imports of Triton and pagedkv: plans on the CPU are made all the same."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os
{before}
import pagedkv
{after}
import torch
table = pagedkv.PageTable.from_rows([[0]], [3], 16)
heads = dict(num_q_heads=2, num_kv_heads=1, head_dim=8)
buffers = pagedkv.AttentionPlanBuffers(2, 2, 2, **heads)
plan = pagedkv.plan_attention(torch.tensor([0, 1], dtype=torch.int32), table, **heads, buffers=buffers)
tensors = torch.ones(1, 2, 8), torch.ones(1, 16, 1, 8), torch.ones(1, 16, 1, 8), plan
assert pagedkv.paged_attention(*tensors).sum() == 16
try:
    pagedkv.paged_attention(*tensors, backend="triton")
except (pagedkv.BackendUnavailableError, RuntimeError) as error:
    print(error)
"""
CHANGES = {
    "set after Triton's import": ("import triton; os.environ['TRITON_INTERPRET'] = '1'", ""),
    "removed before Triton's import": ("os.environ['TRITON_INTERPRET'] = '1'", "del os.environ['TRITON_INTERPRET']"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_triton_found_counts(change):
    before, after = CHANGES[change]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = PROGRAM.format(before=before, after=after)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "TRITON_INTERPRET was changed between the imports of Triton and of pagedkv" in done.stdout
