"""Attention arguments: honoured, harmless, or refused by name; never dropped."""

import pytest
import torch

from pagedkv.integrations.transformers.options import read_arguments

MODULE = torch.nn.Identity()


def test_arguments_are_read():
    arguments = read_arguments(
        MODULE, None, 0.25, 0.0, {"sliding_window": 8, "softcap": 30.0, "s_aux": torch.ones(4, dtype=torch.bfloat16)}
    )
    assert (arguments.sm_scale, arguments.window, arguments.soft_cap) == (0.25, 8, 30.0)
    assert arguments.sinks.dtype == torch.float32


def test_arguments_that_ask_for_nothing_pass():
    given = {"position_ids": torch.arange(3), "use_cache": True, "output_attentions": False, "position_bias": None}
    arguments = read_arguments(MODULE, None, None, 0.0, given)
    assert (arguments.sm_scale, arguments.window, arguments.soft_cap, arguments.sinks) == (None, None, 0.0, None)


@pytest.mark.parametrize(
    ("mask", "dropout", "given", "words"),
    [
        (torch.zeros(1, 1, 2, 2), 0.0, {}, "attention_mask must be None"),
        (None, 0.1, {}, "dropout must be 0"),
        (None, 0.0, {"is_causal": False}, "is_causal must be True"),
        (None, 0.0, {"output_attentions": True}, "'output_attentions' must be absent"),
        (None, 0.0, {"position_bias": torch.zeros(2)}, r"'position_bias' must be absent.* a tensor of shape \[2\]"),
        (None, 0.0, {"cu_seq_lens_q": torch.zeros(2)}, "'cu_seq_lens_q' must be absent"),
        (None, 0.0, {"block_indices": 3}, "'block_indices' must be absent in a paged call, got 3"),
    ],
)
def test_arguments_that_would_change_the_result_are_refused(mask, dropout, given, words):
    with pytest.raises(ValueError, match=words):
        read_arguments(MODULE, mask, None, dropout, given)
