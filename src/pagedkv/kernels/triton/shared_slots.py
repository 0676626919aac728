"""Of tokens with one slot the last wins: how kernels that store tokens see to it, though programs run in any order.

Few tokens look through all that come after them, in one launch. Many take two: the first stores every token, and each
leaves its number in the claim of its slot, where one of several stays; in the second, whoever does not find its own
number there finds the last token of its slot and stores that one once more. So claims need no clearing, and where no
slot is shared, as in most calls, the second launch only reads slots and claims. Tokens of different slots that share a
claim store what is there already.

The last token is looked for from the end of the call on: at once where the tokens that share a slot are padding. A slot
whose last token is far from the end costs its program a look at all that comes after; claims that hold the largest
number would cost every call a launch more, to clear them.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["is_last", "last_with", "looks_ahead", "num_claims"]

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
def is_last(Slots, slot, first, num_tokens, SCAN: tl.constexpr):
    """[BLOCK_ROWS] of the tokens from `first` on, whether none after a token has its slot."""
    row = tl.arange(0, slot.shape[0])[:, None]
    num_left = (num_tokens - first).to(tl.int32)
    num_again = tl.zeros([slot.shape[0]], tl.int32)
    for start in range(0, num_left, SCAN):
        later = start + tl.arange(0, SCAN)
        other = tl.load(Slots + first + later, mask=later < num_left, other=-1)
        is_again = (other[None, :] == slot[:, None]) & (later[None, :] > row)
        # Once after the loop would be cheaper, but Triton 3.6 fails to lay out some tiles of codes that follow it.
        num_again += tl.sum(is_again.to(tl.int32), 1)
    return num_again == 0


@triton.jit
def last_with(Slots, slot, token, is_sought, num_tokens, SCAN: tl.constexpr):
    """[BLOCK_ROWS] the last token with the slot of each token that is sought; of the others, the token itself."""
    last = tl.where(is_sought, -1, token)
    start = tl.cast(tl.cdiv(num_tokens, SCAN), tl.int64) * SCAN
    # Each finds itself in the end, unless the caller changes the slots meanwhile, which must not hang the device.
    while (start > 0) & (tl.min(last, 0) < 0):
        start -= SCAN
        step = tl.arange(0, SCAN)
        other = tl.load(Slots + start + step, mask=start + step < num_tokens, other=-1)
        found = tl.max(tl.where(other[None, :] == slot[:, None], step[None, :], -1), 1)
        last = tl.where((last < 0) & (found >= 0), start + found, last)
    return tl.maximum(last, token)
