"""The demo's model and requests, loaded once."""

import pytest

from pagedkv.cli.quiet import quiet_transformers
from pagedkv.cli.workload import demo_requests
from pagedkv.integrations.transformers.checkpoint import load_causal_lm


@pytest.fixture(scope="session")
def demo_model():
    with quiet_transformers():
        return load_causal_lm()


@pytest.fixture(scope="session")
def demo_prompts(demo_model):
    return [request.prompt_ids for request in demo_requests(demo_model.tokenizer)]
