"""BeamSearch: the tokens and scores of transformers' beam search, to the bit, from the same logits."""

import functools
import math

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from pagedkv.engine.beam_search import BeamSearch, Hypothesis
from pagedkv.testing.beams import expected_beams, other_defaults, prompt_of
from pagedkv.testing.bits import same_bits
from pagedkv.testing.tiny_models import tiny_model

PENALTIES = (0.0, 1.0, 2.0, -1.0)
STOPPING = (False, True, "never")


@functools.cache
def model_of(name, vocab_size=None):
    """One layer: the logits are given to both searches, so that the model matters little and costs most."""
    if vocab_size is not None:
        return tiny_model(name, num_hidden_layers=1, vocab_size=vocab_size, bos_token_id=0, pad_token_id=0)
    return tiny_model(name, **{"gpt2": {"n_layer": 1}, "llama": {"num_hidden_layers": 1}}[name])


def dense_beams(model, prompt, num_beams, eos=(), **options):
    """The search of expected_beams by BeamSearch, over forward passes shaped as transformers shapes them."""
    search = BeamSearch(num_beams, eos_token_ids=eos, **options)
    cache = DynamicCache(config=model.config)
    ids = prompt.expand(num_beams, -1)
    with torch.inference_mode():
        while not search.is_done:
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            parents, tokens = search.step(logits)
            cache.reorder_cache(parents)
            ids = tokens[:, None]
    return search.best()


def assert_same_beams(model, prompt, num_beams, eos=(), **options):
    found = dense_beams(model, prompt, num_beams, eos, **options)
    expected = expected_beams(model, prompt, num_beams, eos_token_ids=eos, **options)
    assert [hypothesis.token_ids for hypothesis in found] == expected.token_ids
    assert [hypothesis.score for hypothesis in found] == expected.scores
    return found


@functools.cache
def _emitted(name, num_tokens, seed):
    return expected_beams(model_of(name), prompt_of(num_tokens, seed), 3, max_new_tokens=7).token_ids[0]


def emitted(name, num_tokens, seed, places):
    """Tokens that beam search without an EOS puts at these places of its best answer to a prompt."""
    return tuple(dict.fromkeys(_emitted(name, num_tokens, seed)[place] for place in places))


@pytest.mark.parametrize("num_beams", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_without_eos_is_transformers(name, num_beams):
    for num_tokens, max_new_tokens, penalty in ((1, 1, 1.0), (7, 2, 0.0), (16, 7, -1.0), (17, 9, 2.0)):
        found = assert_same_beams(
            model_of(name),
            prompt_of(num_tokens, num_beams),
            num_beams,
            max_new_tokens=max_new_tokens,
            length_penalty=penalty,
            num_return_sequences=num_beams,
        )
        assert [len(hypothesis.token_ids) for hypothesis in found] == [max_new_tokens] * num_beams


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("stopping", STOPPING)
@pytest.mark.parametrize("places", [(1,), (3, 6), (2, 4, 5)], ids=str)
def test_with_eos_is_transformers(places, stopping, penalty):
    lengths = set()
    for seed, (name, num_beams) in enumerate((("llama", 5), ("gpt2", 2 + len(places) % 2)), 1):
        found = assert_same_beams(
            model_of(name),
            prompt_of(5 + seed, seed),
            num_beams,
            emitted(name, 5 + seed, seed, places),
            max_new_tokens=10,
            length_penalty=penalty,
            early_stopping=stopping,
            num_return_sequences=num_beams - seed % 2,
        )
        lengths |= {len(hypothesis.token_ids) for hypothesis in found}
    # Ended by an EOS, but where the penalty lets all others win.
    assert penalty > 1 or min(lengths) < 10


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_beam_is_greedy_and_ends_where_it_ends(name):
    model, prompt = model_of(name), prompt_of(9, 4)
    answer = expected_beams(model, prompt, 1, max_new_tokens=10).token_ids[0]
    assert dense_beams(model, prompt, 1, max_new_tokens=10)[0].token_ids == answer
    ended = expected_beams(model, prompt, 1, eos_token_ids=answer[3:4], max_new_tokens=10).token_ids[0]
    assert dense_beams(model, prompt, 1, answer[3:4], max_new_tokens=10)[0].token_ids == ended
    assert len(ended) <= 4


@pytest.mark.parametrize("stopping", STOPPING)
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize(("vocab_size", "eos"), [(2, (1,)), (3, (0,)), (3, (1, 2)), (5, (4,))], ids=str)
def test_vocabulary_smaller_than_the_beams_is_transformers(vocab_size, eos, penalty, stopping):
    """Beams that are copies of none, and EOS that must do as continuations: what ties decide then is the same, too."""
    model, prompt = model_of("llama", vocab_size), torch.tensor([1, 0, 1])
    options = {"max_new_tokens": 4, "length_penalty": penalty, "early_stopping": stopping}
    for num_beams in (3, 5):
        found = dense_beams(model, prompt, num_beams, eos, num_return_sequences=num_beams, **options)
        expected = expected_beams(
            model, prompt, num_beams, eos_token_ids=eos, pad_token_id=None, num_return_sequences=num_beams, **options
        )
        for hypothesis, row, score in zip(found, expected.rows, expected.scores, strict=False):
            assert list(hypothesis.token_ids) == row[: len(hypothesis.token_ids)]
            assert hypothesis.score == score
        # Where transformers has nothing it gives the prompt alone, with the score of a place not taken.
        assert all(score <= -1e9 for score in expected.scores[len(found) :])


@pytest.mark.parametrize("num_counting", [0, 1, 2, 3])
def test_texts_of_scores_under_minus_1e9_do_not_count(num_counting):
    """By a penalty that puts the sum of log-probabilities between two neighbours to -1e9."""
    model, prompt = model_of("llama"), prompt_of(5, 0)
    options = {"max_new_tokens": 4, "num_return_sequences": 3}
    sums = [0.0, *expected_beams(model, prompt, 3, length_penalty=0.0, **options).scores, -100.0]
    border = (sums[num_counting] + sums[num_counting + 1]) / 2
    options["length_penalty"] = -math.log(-1e9 / border, 4)
    found, expected = dense_beams(model, prompt, 3, **options), expected_beams(model, prompt, 3, **options)
    assert len(found) == num_counting
    assert [hypothesis.token_ids for hypothesis in found] == expected.token_ids[:num_counting]
    assert [hypothesis.score for hypothesis in found] == expected.scores[:num_counting]
    assert expected.scores[num_counting:] == [-1e9] * (3 - num_counting)


def logits_of(*rows):
    return torch.tensor(rows, dtype=torch.float32).log()


def test_two_beams_by_hand():
    """Vocabulary a b c, c the EOS; the probabilities are the rows."""
    search = BeamSearch(2, max_new_tokens=4, eos_token_ids=(2,), length_penalty=0.0, num_return_sequences=2)
    parents, tokens = search.step(logits_of([0.5, 0.3, 0.2], [0.5, 0.3, 0.2]))
    assert (parents.tolist(), tokens.tolist()) == ([0, 0], [0, 1])
    # ac 0.3, ba 0.27 lead and ac ends; then ab 0.15.
    parents, tokens = search.step(logits_of([0.1, 0.3, 0.6], [0.9, 0.06, 0.04]))
    assert (parents.tolist(), tokens.tolist()) == ([1, 0], [0, 1])
    assert not search.is_done
    assert search.best()[0].token_ids == (0, 2)
    # bac 0.243 ends; what runs on has at most 0.15 * 0.8 = 0.12: it cannot win any more.
    parents, tokens = search.step(logits_of([0.04, 0.06, 0.9], [0.8, 0.1, 0.1]))
    assert search.is_done
    assert [found.token_ids for found in search.best()] == [(0, 2), (1, 0, 2)]
    for found, probability in zip(search.best(), (0.3, 0.243), strict=True):
        assert math.exp(found.score) == pytest.approx(probability)


def test_eos_below_the_likeliest_candidates_finishes_nothing():
    search = BeamSearch(2, max_new_tokens=4, eos_token_ids=(2,))
    search.step(logits_of([0.5, 0.3, 0.2], [0.5, 0.3, 0.2]))
    assert search.best() == []


def test_never_looks_at_the_present_length_where_long_texts_lose():
    """Penalty -1 multiplies by the length: the running beam beats the worse of c and aac now, though not at the end."""
    search = BeamSearch(
        2, max_new_tokens=40, eos_token_ids=(2,), length_penalty=-1.0, early_stopping="never", num_return_sequences=2
    )
    search.step(logits_of([0.6, 0.1, 0.3], [0.6, 0.1, 0.3]))
    search.step(logits_of([0.9, 0.04, 0.06], [0.98, 0.01, 0.01]))
    search.step(logits_of([0.5, 0.01, 0.49], [0.98, 0.01, 0.01]))
    assert [found.token_ids for found in search.best()] == [(2,), (0, 0, 2)]
    assert not search.is_done


@pytest.mark.parametrize("eos", [(), (0,), (4, 1)], ids=str)
def test_ties_go_as_in_transformers(eos):
    model = tiny_model("llama", num_hidden_layers=1)
    torch.nn.init.zeros_(model.lm_head.weight)  # all tokens are equally likely, always
    for num_beams in (2, 5):
        assert_same_beams(model, prompt_of(4, 0), num_beams, eos, max_new_tokens=4, num_return_sequences=num_beams)


def test_best_before_the_end_gives_what_is_finished():
    search = BeamSearch(1, max_new_tokens=3, eos_token_ids=(0,))
    assert search.best() == []
    search.step(logits_of([0.1, 0.6, 0.3]))
    assert (search.best(), search.num_new_tokens, search.is_done) == ([], 1, False)
    search.step(logits_of([0.8, 0.1, 0.1]))
    assert search.is_done
    assert search.best()[0].token_ids == (1, 0)


def test_half_logits_are_those_numbers_in_float32():
    logits = torch.randn(3, 50).to(torch.bfloat16)
    ours, theirs = BeamSearch(3, max_new_tokens=1), BeamSearch(3, max_new_tokens=1)
    for half, single in zip(ours.step(logits), theirs.step(logits.float()), strict=True):
        assert torch.equal(half, single)
    assert ours.best() == theirs.best()


def test_default_device_and_dtype_of_the_caller_do_not_matter():
    def answers():
        search = BeamSearch(3, max_new_tokens=3, eos_token_ids=(8,), num_return_sequences=3)
        steps = [part for rows in logits for part in search.step(rows)]
        return steps, search.best()

    logits = torch.randn(3, 3, 9)
    steps, best = answers()
    with other_defaults():
        others, other_best = answers()
    assert [len(steps), best] == [6, other_best]
    assert all(same_bits(other, step) for other, step in zip(others, steps, strict=True))


@pytest.mark.parametrize("eos", [[3, 4], np.array([3, 4]), (np.int32(3), np.uint8(4)), torch.tensor([4, 3])], ids=repr)
@pytest.mark.parametrize("penalty", [np.float32(2), np.float64(2), np.int8(2), 2], ids=repr)
def test_numbers_of_numpy_are_those_of_python(eos, penalty):
    """max_new_tokens ** penalty is beyond the type that the numbers came in."""
    counts = {"num_beams": np.int8(2), "max_new_tokens": np.int8(100), "num_return_sequences": np.uint8(2)}
    ours = BeamSearch(**counts, eos_token_ids=eos, length_penalty=penalty)
    theirs = BeamSearch(2, max_new_tokens=100, num_return_sequences=2, eos_token_ids=(3, 4), length_penalty=2.0)
    assert {type(token) for token in ours.eos_token_ids} == {int}
    assert {type(count) for count in (ours.num_beams, ours.max_new_tokens, ours.num_return_sequences)} == {int}
    while not ours.is_done:
        logits = torch.randn(2, 9)
        for our_part, their_part in zip(ours.step(logits), theirs.step(logits), strict=True):
            assert torch.equal(our_part, their_part)
    assert theirs.is_done
    assert ours.best() == theirs.best()


def test_step_leaves_the_logits_alone():
    logits = torch.randn(2, 9)
    before = logits.clone()
    step = BeamSearch(2, max_new_tokens=3).step(logits)
    assert torch.equal(logits, before)
    assert [(part.dtype, tuple(part.shape)) for part in step] == [(torch.int64, (2,))] * 2


@pytest.mark.parametrize(
    ("logits", "error", "words"),
    [
        (torch.zeros(3, 8), ValueError, r"logits must have shape \[B, V\] with B = 2"),
        (torch.zeros(2, 8, 1), ValueError, r"logits must have shape \[B, V\]"),
        (torch.zeros(2, 2), ValueError, "logits must be of at least 3 tokens"),
        (torch.zeros(2, 8, dtype=torch.int64), TypeError, "logits must have dtype float32"),
        (torch.tensor([[0.0] * 8, [math.nan] * 8]), FloatingPointError, "logits of beam 1 must have a finite maximum"),
        (torch.full((2, 8), -math.inf), FloatingPointError, "logits of beam 0 must have a finite maximum, got -inf"),
    ],
)
def test_step_refuses_and_changes_nothing(logits, error, words):
    search, untouched = (BeamSearch(2, max_new_tokens=2, eos_token_ids=(3, 4)) for _ in range(2))
    with pytest.raises(error, match=words):
        search.step(logits)
    good = torch.randn(2, 8)
    for ours, theirs in zip(search.step(good), untouched.step(good), strict=True):
        assert torch.equal(ours, theirs)


def test_step_refuses_once_done():
    search = BeamSearch(2, max_new_tokens=1)
    search.step(torch.randn(2, 4))
    found = search.best()
    with pytest.raises(ValueError, match="must not be called on a search that is done"):
        search.step(torch.randn(2, 4))
    assert search.best() == found
    assert isinstance(found[0], Hypothesis)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"num_beams": 0}, ValueError, "num_beams must be at least 1"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens must be an int"),
        ({"num_return_sequences": 3}, ValueError, r"num_return_sequences must be at most 2 \(num_beams\), got 3"),
        ({"num_return_sequences": 0}, ValueError, "num_return_sequences must be at least 1"),
        ({"eos_token_ids": (-1,)}, ValueError, "each of eos_token_ids must be at least 0"),
        ({"eos_token_ids": (True,)}, TypeError, "each of eos_token_ids must be an int, got bool"),
        ({"eos_token_ids": (1.0,)}, TypeError, "each of eos_token_ids must be an int, got float"),
        ({"eos_token_ids": 5}, TypeError, r"eos_token_ids must be several ints, got int. Pass \(token,\) for one"),
        ({"eos_token_ids": np.int64(5)}, TypeError, "eos_token_ids must be several ints, got int64"),
        ({"eos_token_ids": torch.tensor(5)}, TypeError, "eos_token_ids must be several ints, got Tensor"),
        ({"eos_token_ids": "5"}, TypeError, "eos_token_ids must be several ints, got str"),
        ({"early_stopping": "always"}, ValueError, "early_stopping must be True, False or 'never', got 'always'"),
        ({"early_stopping": 1}, ValueError, "early_stopping must be True, False or 'never', got 1"),
        ({"length_penalty": "1"}, TypeError, "length_penalty must be a number"),
        ({"length_penalty": True}, TypeError, "length_penalty must be a number, got bool"),
        ({"length_penalty": 10**400}, ValueError, "a float32 above 0, got inf with max_new_tokens 4"),
        ({"length_penalty": -(10**400), "max_new_tokens": 1}, ValueError, "above 0, got -inf with max_new_tokens 1"),
        ({"length_penalty": math.nan}, ValueError, "length_penalty must keep max_new_tokens"),
        ({"length_penalty": 50, "max_new_tokens": 9}, ValueError, "a float32 above 0, got 50 with max_new_tokens 9"),
        ({"length_penalty": -50.0, "max_new_tokens": 9}, ValueError, "length_penalty must keep max_new_tokens"),
        ({"length_penalty": math.inf, "max_new_tokens": 1}, ValueError, "length_penalty must keep max_new_tokens"),
    ],
)
def test_search_refuses(options, error, words):
    with pytest.raises(error, match=words):
        BeamSearch(**{"num_beams": 2, "max_new_tokens": 4, **options})
