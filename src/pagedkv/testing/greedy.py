"""Whether two greedy answers differ for a reason: the first token where they part, and how close the choice was.

Needs the extra `transformers`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .rounded_cache import RoundedCache

__all__ = ["GreedyDifference", "first_greedy_difference"]


@dataclass(frozen=True)
class GreedyDifference:
    """The first token at which two answers to one prompt differ.

    margin:   logit of the likelier of the two minus that of the other, of the model in float64.
    rounding: how far two right computations may move that margin: each of the two logits may be off by twice the error
              the model's own dtype makes here, in either computation.
    """

    position: int
    ours: int
    theirs: int
    margin: float
    rounding: float

    @property
    def is_tie(self) -> bool:
        """True when rounding alone may decide between the two tokens."""
        return self.margin <= self.rounding

    def __str__(self) -> str:
        verdict = "a tie to rounding" if self.is_tie else "no tie"
        return (
            f"token {self.position}: {self.ours} against {self.theirs}, margin {self.margin:.3g}, "
            f"rounding {self.rounding:.3g}: {verdict}"
        )


def first_greedy_difference(
    model: Any,
    prompt_ids: Sequence[int],
    ours: Sequence[int],
    theirs: Sequence[int],
    *,
    kv_dtype: torch.dtype | None = None,
) -> GreedyDifference | None:
    """Compares two greedy answers, EOS included; None when they are equal.

    Where they part, the model judges the tokens both agree on twice: as it is, and in float64. The largest difference
    of its logits is the error of its dtype there, from which `rounding` is derived; nothing is chosen by hand.
    kv_dtype: of the cache both answers come from; the judge then attends over keys and values rounded to it.
    Raises: ValueError when one answer merely ends before the other: no token can be compared then.
    """
    at = next((at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if at is None:
        if len(ours) != len(theirs):
            raise ValueError(f"answers must end at the same token, got {len(ours)} and {len(theirs)} equal tokens.")
        return None
    token_ids = torch.tensor([[*prompt_ids, *ours[:at]]])
    with torch.inference_mode():
        rounded = _last_logits(model, token_ids, kv_dtype)
        exact = _last_logits(copy.deepcopy(model).double(), token_ids, kv_dtype)
    error = float((rounded - exact).abs().max())
    margin = float(abs(exact[ours[at]] - exact[theirs[at]]))
    # Two logits, each off by twice `error` at most, in each of the two computations.
    return GreedyDifference(at, int(ours[at]), int(theirs[at]), margin, 2 * 2 * 2 * error)


def _last_logits(model: Any, token_ids: torch.Tensor, kv_dtype: torch.dtype | None) -> torch.Tensor:
    cache: dict[str, Any] = {"use_cache": False}
    if kv_dtype is not None:
        cache = {"use_cache": True, "past_key_values": RoundedCache(model.config, kv_dtype)}
    logits: torch.Tensor = model(input_ids=token_ids, logits_to_keep=1, **cache).logits[0, -1]
    return logits.double()
