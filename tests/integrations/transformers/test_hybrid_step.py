"""Models with full and sliding layers on pages that go to either, through a manager of all groups."""

import pytest
import torch

from pagedkv import HybridKVCacheManager, HybridKVPool, check_integrity, make_layer_groups
from pagedkv.integrations.transformers import HybridPagedStep, PagedModel, check_model
from pagedkv.testing.tiny_models import tiny_model

PAGE_SIZE = 4
PROMPTS = [
    torch.randint(250, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (5, 13, 41)
]


THREE_LAYERS = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}


def make_world(name, num_pages=80, **changes):
    model = tiny_model(name, **changes)
    paged = PagedModel(model)
    spec = paged.spec(PAGE_SIZE, order="page_first")
    pool = HybridKVPool(spec, make_layer_groups(spec, paged.geometry.windows), num_pages)
    return model, paged, pool, HybridKVCacheManager(pool, debug=True)


def forward(paged, pool, manager, seqs, ids):
    """The most likely next token of each sequence, after computing what it lacks of `ids`."""
    counts = [len(row) - seq.num_tokens for seq, row in zip(seqs, ids, strict=True)]
    batch = manager.batch(seqs, counts)
    step = HybridPagedStep(
        pool,
        paged.geometry,
        [own.page_table for own in batch.groups],
        batch.query_indptr,
        [own.slot_mapping for own in batch.groups],
    )
    packed = [token for row, count in zip(ids, counts, strict=True) for token in row[len(row) - count :]]
    tokens = paged.forward(torch.tensor(packed), step).argmax(-1).tolist()
    for seq, row, count in zip(seqs, ids, counts, strict=True):
        seq.commit(row[len(row) - count :])
    return tokens


def generated(model, prompt, num_tokens):
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gemma3n", "gpt_oss"])
def test_tokens_are_those_of_generate(name):
    model, paged, pool, manager = make_world(name)
    assert len(pool.groups) == 2
    seqs, ids = [manager.open([]) for _ in PROMPTS], [list(prompt) for prompt in PROMPTS]
    for _ in range(12):
        for row, token in zip(ids, forward(paged, pool, manager, seqs, ids), strict=True):
            row.append(token)
    assert [row[len(prompt) :] for row, prompt in zip(ids, PROMPTS, strict=True)] == [
        generated(model, prompt, 12) for prompt in PROMPTS
    ]
    window = pool.groups[1].window
    for seq in seqs:
        kept = sum(page >= 0 for page in seq.page_ids[1])
        assert kept <= -(-(window + 2 * PAGE_SIZE) // PAGE_SIZE)


def test_a_prompt_that_is_found_again_gives_the_same_tokens():
    model, paged, pool, manager = make_world("gemma3", **THREE_LAYERS)
    prompt = PROMPTS[2]
    first = manager.open(prompt)
    forward(paged, pool, manager, [first], [prompt])
    first.close()
    seq = manager.open(prompt[:-1])
    assert 0 < seq.num_cached_tokens < len(prompt)
    ids = [*prompt]
    for _ in range(8):
        ids.append(forward(paged, pool, manager, [seq], [ids])[0])
    assert ids[len(prompt) :] == generated(model, prompt, 8)
    check_integrity(manager)


def test_windows_of_a_model_are_those_of_who_sees_most_of_a_layer():
    geometry = check_model(tiny_model("gemma3n"))
    for layer in geometry.layers.values():
        window = geometry.windows[layer.stored_in]
        assert window is None or (layer.window is not None and layer.window <= window)
    assert None in geometry.windows
    assert any(window is not None for window in geometry.windows)


def test_steps_that_do_not_fit_the_groups_are_refused():
    _, paged, pool, manager = make_world("gemma3", **THREE_LAYERS)
    assert [group.page_size for group in pool.groups] == [8, 4]
    batch = manager.batch([manager.open([])], 3)
    tables = [own.page_table for own in batch.groups]
    slots = [own.slot_mapping for own in batch.groups]
    with pytest.raises(ValueError, match="tables must be 2, one a group of the pool, got 1"):
        HybridPagedStep(pool, paged.geometry, tables[:1], batch.query_indptr, slots)
    with pytest.raises(ValueError, match=r"tables\[0\] must have page_size"):
        HybridPagedStep(pool, paged.geometry, tables[::-1], batch.query_indptr, slots)
    with pytest.raises(ValueError, match="slot_mappings must be 2, one a group of the pool, got 1"):
        HybridPagedStep(pool, paged.geometry, tables, batch.query_indptr, slots[:1])
    other = manager.batch([manager.open([])], 2)
    with pytest.raises(ValueError, match=r"tables\[1\] must have the lengths of tables\[0\]"):
        HybridPagedStep(pool, paged.geometry, [tables[0], other.groups[1].page_table], batch.query_indptr, slots)
