"""Of tokens with one slot the last wins: how kernels that store tokens see to it, though programs run in any order.

Few tokens look through all that come after them, in one launch. Many take two: the first stores every token, and each
leaves its number in the claim of its slot, where one of several stays; in the second, whoever does not find its own
number there finds the last token of its slot and stores that one once more. So claims need no clearing, and where no
slot is shared, as in most calls, the second launch only reads slots and claims. Tokens of different slots that share a
claim store what is there already.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["last_with", "looks_ahead", "num_claims"]

# Of more tokens, each looking at all after it would take longer than a second launch.
_MOST_THAT_LOOK_AHEAD = 1024
# A claim for each slot, up to 16 MiB; beyond, slots share them.
_MOST_CLAIMS = 2**22


def looks_ahead(num_tokens: int) -> bool:
    """Whether one launch is enough."""
    return num_tokens <= _MOST_THAT_LOOK_AHEAD


def num_claims(num_slots: int) -> int:
    """A power of two: the claim of a slot is the slot modulo this."""
    return min(1 << max(num_slots - 1, 0).bit_length(), _MOST_CLAIMS)


@triton.jit
def last_with(Slots, slot, token, first, num_tokens, SCAN: tl.constexpr):
    """[BLOCK_ROWS] the last token that has the same slot, from the token itself on."""
    last = token
    for start in range(first, num_tokens, SCAN):
        later = start + tl.arange(0, SCAN)
        other = tl.load(Slots + later, mask=later < num_tokens, other=-1)
        same = other[None, :] == slot[:, None]
        last = tl.maximum(last, tl.max(tl.where(same, later[None, :], -1).to(tl.int64), 1))
    return last
