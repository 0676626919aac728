"""Steps of a manager whose pool is on a device ask that device nothing.

Tensors on the device "meta" have shapes and no contents: what reads one back fails.
"""

import pytest

from pagedkv import (
    HybridKVCacheManager,
    HybridKVPool,
    KVCacheManager,
    KVCacheSpec,
    KVPool,
    make_layer_groups,
    plan_attention,
)

HEADS = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16}


@pytest.mark.parametrize("is_hybrid", [False, True])
def test_steps_and_their_plans_read_nothing_back(is_hybrid):
    spec = KVCacheSpec(num_layers=4, num_kv_heads=2, head_dim=16, page_size=4, order="page_first")
    if is_hybrid:
        pool = HybridKVPool(spec, make_layer_groups(spec, [8, 8, 8, None]), 60, "meta")
        manager = HybridKVCacheManager(pool)
    else:
        manager = KVCacheManager(KVPool(spec, 60, "meta"))
    seqs = [manager.open(()) for _ in range(3)]
    for counts in ([5, 17, 1], 1, 1, [1, 8, 2]):
        step = manager.batch(seqs, counts)
        for group in step.groups if is_hybrid else [step]:
            plan = plan_attention(step.query_indptr, group.page_table, **HEADS)
            assert plan.query_indptr.device.type == group.slot_mapping.device.type == "meta"
            assert plan.num_tokens == step.num_tokens
            assert plan.num_positions == max(seq.num_tokens for seq in seqs)
            assert step.seq_lens.shape == (3,)
