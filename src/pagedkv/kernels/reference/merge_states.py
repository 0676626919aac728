"""merge_states in plain torch: the specification."""

from __future__ import annotations

import torch

__all__ = ["merge_states"]


def merge_states(values: torch.Tensor, lse: torch.Tensor, out: torch.Tensor, out_lse: torch.Tensor) -> None:
    """Fills out and out_lse; everything is checked."""
    num_tokens, num_states, num_heads, dim = values.shape
    total = values.new_zeros(num_tokens, num_heads, dim, dtype=torch.float32)
    highest = lse.new_full((num_tokens, num_heads), -torch.inf)
    weight_sum = lse.new_zeros(num_tokens, num_heads)
    for k in range(num_states):
        new_highest = torch.maximum(highest, lse[:, k])
        # Rows that have seen no key yet keep the scale at 0: exp(-inf - -inf) would be NaN.
        base = new_highest.masked_fill(new_highest == -torch.inf, 0.0)
        old, new = torch.exp(highest - base), torch.exp(lse[:, k] - base)
        seen = (lse[:, k] > -torch.inf)[..., None]
        contribution = torch.where(seen, values[:, k].float(), 0.0) * new[..., None]
        total = total * old[..., None] + contribution
        weight_sum = weight_sum * old + new
        highest = new_highest
    empty = weight_sum == 0
    out.copy_(torch.where(empty[..., None], 0.0, total / weight_sum.masked_fill(empty, 1.0)[..., None]))
    out_lse.copy_(torch.where(empty, -torch.inf, highest + torch.log(weight_sum.masked_fill(empty, 1.0))))
