"""The registered name: calls without a context run as they always did, and everything is restored."""

import pytest
import torch

from pagedkv.integrations.transformers import ATTENTION_NAME, paged_attention_implementation
from pagedkv.testing.tiny_models import tiny_model

IDS, MASK = torch.tensor([[257, 5, 6], [7, 8, 9]]), torch.tensor([[0, 1, 1], [1, 1, 1]])


@pytest.mark.parametrize(
    ("name", "before"), [("llama", "sdpa"), ("llama", "eager"), ("gemma2", "eager"), ("gpt2", "sdpa")]
)
def test_call_without_context_is_unchanged(name, before):
    model = tiny_model(name, attn_implementation=before)
    with torch.inference_mode():
        expected = model(IDS, attention_mask=MASK).logits
        with paged_attention_implementation(model), paged_attention_implementation(model):
            assert model.config._attn_implementation == ATTENTION_NAME
            got = model(IDS, attention_mask=MASK).logits
    assert torch.equal(got[MASK.bool()], expected[MASK.bool()])
    assert model.config._attn_implementation == before


def test_implementation_is_restored_after_an_error():
    model = tiny_model("llama")
    with pytest.raises(RuntimeError, match="planted"), paged_attention_implementation(model):
        raise RuntimeError("planted")
    assert model.config._attn_implementation == "sdpa"


def test_implementation_lasts_until_the_last_caller_leaves():
    model = tiny_model("llama")
    first, second = paged_attention_implementation(model), paged_attention_implementation(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert model.config._attn_implementation == ATTENTION_NAME
    second.__exit__(None, None, None)
    assert model.config._attn_implementation == "sdpa"


def test_name_set_for_good_falls_back_to_sdpa():
    model = tiny_model("llama")
    with torch.inference_mode():
        expected = model(IDS, attention_mask=MASK).logits
        model.set_attn_implementation(ATTENTION_NAME)
        got = model(IDS, attention_mask=MASK).logits
    assert torch.equal(got[MASK.bool()], expected[MASK.bool()])
