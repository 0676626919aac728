"""Two sequences on shuffled pages: store their keys and values, then attend through the page table."""

import torch

import pagedkv

pool = pagedkv.KVPool(pagedkv.KVCacheSpec(num_layers=1, num_kv_heads=2, head_dim=64, dtype=torch.float32), num_pages=8)
table = pagedkv.PageTable.from_rows([[3, 7], [5]], seq_lens=[20, 4], page_size=16)
new_tokens = torch.tensor([0, 20, 24], dtype=torch.int32)  # all 20 of the first sequence, all 4 of the second

key, value, query = torch.randn(24, 2, 64), torch.randn(24, 2, 64), torch.randn(24, 8, 64)
pool.store(0, key, value, table.slot_mapping(new_tokens))
plan = pagedkv.plan_attention(new_tokens, table, num_q_heads=8, num_kv_heads=2, head_dim=64)
out = pagedkv.paged_attention(query, pool.key_pages(0), pool.value_pages(0), plan)
print(tuple(out.shape))
