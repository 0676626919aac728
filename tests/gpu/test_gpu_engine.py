"""The engine and the tile decoder over a model on the device answer as over one on the CPU."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("transformers", reason="needs the extra transformers")

import torch

from pagedkv.engine import Engine, SamplingParams, TileDecoder
from pagedkv.testing.greedy import first_greedy_difference
from pagedkv.testing.tiny_models import tiny_model


def prompts():
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(250, (29,), generator=generator).tolist()
    return [(shared if n % 2 else []) + torch.randint(250, (n,), generator=generator).tolist() for n in (5, 13, 20, 1)]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_greedy_answers_are_those_of_the_cpu(device, name):
    model = tiny_model(name)
    there = copy.deepcopy(model).to(device)
    params = SamplingParams(max_new_tokens=12)
    # Few pages, so that sequences are preempted, too.
    answers = [Engine(place, num_pages=12, max_batch_tokens=24).generate(prompts(), params) for place in (model, there)]
    for ours, theirs in zip(*answers, strict=True):
        assert ours.error is None
        assert theirs.error is None
        difference = first_greedy_difference(model, ours.prompt_ids, ours.token_ids, theirs.token_ids)
        assert difference is None or difference.is_tie, str(difference)


def test_beams_over_tiles_are_those_of_the_cpu(device):
    model = tiny_model("llama")
    there = copy.deepcopy(model).to(device)
    found = [
        TileDecoder(place, num_beams=3, max_tokens=48).generate(prompts()[0], max_new_tokens=8)
        for place in (model, there)
    ]
    assert [each.token_ids for each in found[0]] == [each.token_ids for each in found[1]]
