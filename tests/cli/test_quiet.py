"""Silence ends with the block, also after an error."""

import contextlib
import logging

from transformers.utils import logging as transformers_logging

from pagedkv.cli.quiet import quiet_transformers


def test_quiet_puts_everything_back():
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    hub_level = logging.getLogger("huggingface_hub").level
    with contextlib.suppress(KeyboardInterrupt), quiet_transformers():
        assert transformers_logging.get_verbosity() == logging.ERROR
        assert not transformers_logging.is_progress_bar_enabled()
        raise KeyboardInterrupt
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before
    assert logging.getLogger("huggingface_hub").level == hub_level
