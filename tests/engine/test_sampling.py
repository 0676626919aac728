"""Sampling: each row by its own numbers, and what top-k and top-p keep."""

import pytest
import torch

from pagedkv.engine.sampling import SamplingParams, sample


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def drawn(logits, params, num_draws=400):
    """How often each token is drawn."""
    generator = torch.Generator().manual_seed(0)
    rows = logits[None].expand(num_draws, -1)
    tokens = sample(rows, [params] * num_draws, [generator] * num_draws)
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[0])


def test_greedy_rows_draw_nothing():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    assert sample(logits, [SamplingParams()] * 2, [None, None]) == [1, 0]


def test_row_is_the_same_alone_and_among_others():
    logits = torch.randn(5, 1000)
    params = [SamplingParams(temperature=0.5 + row, top_k=row * 10, top_p=1 - row / 10) for row in range(5)]
    together = sample(logits, params, generators(*range(5)))
    alone = [sample(logits[row : row + 1], params[row : row + 1], generators(row))[0] for row in range(5)]
    assert together == alone


def test_temperature_gives_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0]) * 2
    counts = drawn(logits, SamplingParams(temperature=2.0), num_draws=20_000).double()
    probabilities = torch.softmax(logits.double() / 2, dim=0)
    # Five standard deviations of a binomial count.
    spread = 5 * (20_000 * probabilities * (1 - probabilities)).sqrt()
    assert ((counts - 20_000 * probabilities).abs() < spread).all()


def test_top_k_keeps_the_k_likeliest():
    assert (drawn(torch.tensor([1.0, 3.0, 2.0, 0.0]), SamplingParams(temperature=5.0, top_k=2)) > 0).tolist() == [
        False, True, True, False,
    ]  # fmt: skip


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    logits = torch.tensor([0.5, 0.2, 0.2, 0.1]).log()
    for top_p, kept in ((0.5, 1), (0.4, 1), (0.69, 3), (0.95, 4), (1.0, 4)):
        assert int((drawn(logits, SamplingParams(temperature=1.0, top_p=top_p)) > 0).sum()) == kept


def test_top_p_of_a_flat_distribution_looks_beyond_the_first_candidates():
    logits = torch.zeros(5000)
    logits[0] = 1.0
    tokens = sample(
        logits[None].expand(50, -1), [SamplingParams(temperature=1.0, top_p=0.9)] * 50, generators(*range(50))
    )
    assert max(tokens) > 4000


def test_top_k_applies_before_top_p():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    counts = drawn(logits, SamplingParams(temperature=1.0, top_k=2, top_p=0.5))
    assert (counts > 0).tolist() == [True, False, False, False]


def test_tiny_temperature_is_greedy():
    logits = torch.tensor([[-1e4, 0.0, 1e4, 9999.0]])
    assert sample(logits, [SamplingParams(temperature=1e-30)], generators(0)) == [2]


def test_params_take_one_stop_string():
    assert SamplingParams(stop="end").stop == ("end",)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1"),
        ({"temperature": -0.1}, ValueError, "temperature must be 0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be 0"),
        ({"top_k": -1}, ValueError, "top_k must be at least 0"),
        ({"top_k": 1.5}, TypeError, "top_k must be an int"),
        ({"top_p": 0.0}, ValueError, "top_p must be above 0"),
        ({"top_p": 1.1}, ValueError, "top_p must be above 0"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"stop": ("a", "")}, ValueError, "stop must hold strings that are not empty"),
    ],
)
def test_params_refuse(options, error, words):
    with pytest.raises(error, match=words):
        SamplingParams(**options)
