"""The judge of greedy answers finds a wrong token, and forgives only what rounding may decide."""

from types import SimpleNamespace

import pytest
import torch

from pagedkv.testing.greedy import first_greedy_difference
from pagedkv.testing.tiny_models import tiny_model


class NextToken(torch.nn.Module):
    """Logits are a matrix product of a hidden state that depends on the last token; rows 4 and 5 are nearly equal."""

    def __init__(self, gap):
        super().__init__()
        self.hidden = torch.nn.Embedding(8, 64)
        self.head = torch.nn.Linear(64, 8, bias=False)
        with torch.no_grad():
            self.head.weight[5] = self.head.weight[4]
            self.head.weight[5, 0] += gap

    def forward(self, input_ids, use_cache, logits_to_keep):
        return SimpleNamespace(logits=self.head(self.hidden(input_ids[:, -logits_to_keep:])))


def test_equal_answers_have_no_difference():
    assert first_greedy_difference(NextToken(0.0), [1, 2], [3, 4], [3, 4]) is None


def test_equally_likely_tokens_are_a_tie():
    found = first_greedy_difference(NextToken(0.0), [1, 2], [3, 4, 1], [3, 5, 2])
    assert (found.position, found.ours, found.theirs, found.margin) == (1, 4, 5, 0.0)
    assert found.is_tie
    assert "token 1: 4 against 5" in str(found)
    assert "a tie to rounding" in str(found)


def test_wrong_token_is_no_tie():
    found = first_greedy_difference(NextToken(0.5), [1, 2], [4], [5])
    assert not found.is_tie
    assert found.margin > found.rounding > 0
    assert str(found).endswith("no tie")


def test_answer_that_stops_early_is_refused():
    with pytest.raises(ValueError, match="answers must end at the same token, got 1 and 2 equal tokens"):
        first_greedy_difference(NextToken(0.0), [1, 2], [3], [3, 4])


def test_judge_over_a_rounded_cache_has_a_margin_of_its_own():
    """It attends over what that cache keeps; the error of rounding keys and values alike is not counted as a tie."""
    model, prompt = tiny_model("llama"), [3, 1, 4, 1, 5, 9, 2, 6]
    whole = first_greedy_difference(model, prompt, [7], [8])
    coarse, again = (first_greedy_difference(model, prompt, [7], [8], kv_dtype=torch.float8_e5m2) for _ in range(2))
    assert coarse == again
    assert coarse.margin != whole.margin
    assert not coarse.is_tie
