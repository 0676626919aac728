"""model.generate() over pages: hand it a PagedCache. Takes a model directory, by default the demo's model."""

import sys

from pagedkv.integrations.transformers import PagedCache
from pagedkv.integrations.transformers.checkpoint import load_causal_lm

loaded = load_causal_lm(sys.argv[1] if len(sys.argv) > 1 else None)
loaded.tokenizer.padding_side = "left"
prompts = loaded.tokenizer(["The sea is", "A page table maps"], return_tensors="pt", padding=True)

plain = loaded.model.generate(**prompts, max_new_tokens=16, do_sample=False)
cache = PagedCache(loaded.model.config, num_pages=64)
paged = loaded.model.generate(**prompts, max_new_tokens=16, do_sample=False, past_key_values=cache)
print(f"equal: {bool((plain == paged).all())}, {cache.manager.stats().owned} pages owned")
