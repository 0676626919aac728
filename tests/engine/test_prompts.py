"""EOS ids of models, whatever form their generation config has them in."""

from types import SimpleNamespace

import pytest

from pagedkv.engine.prompts import eos_token_ids


@pytest.mark.parametrize(("eos", "expected"), [(None, set()), (2, {2}), ([2, 5], {2, 5})])
def test_eos_token_ids(eos, expected):
    assert eos_token_ids(SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=eos))) == expected


def test_eos_token_ids_of_a_model_without_generation_config():
    assert eos_token_ids(SimpleNamespace()) == set()
