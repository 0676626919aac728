"""The beams of one request: how their sequences follow a search, and what the search found."""

from __future__ import annotations

import torch

from ..management.manager import KVCacheManager
from .continuation import Continuation, Ending, FinishReason
from .request import Request
from .text import TextStream

__all__ = ["advance_beams", "found_endings", "take_tokens"]


def advance_beams(request: Request, logits: torch.Tensor, manager: KVCacheManager) -> None:
    """Lets a request's beams go on as its search says: with pages of their parents, and a token each.

    Shapes: logits [B, V], of each beam's last token.
    When:   all tokens of all beams are computed. When the search is done afterwards, the beams are what they were.
    Raises: as BeamSearch.step, with nothing changed.
    """
    search, beams = request.search, request.continuations
    assert search is not None  # beams have one
    step = search.step(logits)
    if search.is_done:
        return
    seqs = manager.reorder([beam.seq for beam in beams if beam.seq is not None], step.parents.cpu())
    for beam, seq in zip(beams, seqs, strict=True):
        beam.seq = seq
    take_tokens(request)


def found_endings(request: Request, tokenizer: object) -> list[Ending]:
    """What a search that is done found, best first, each with its text and why it ends there.

    Raises: ValueError when it found nothing.
    """
    assert request.search is not None  # beams have one
    found: list[Ending] = []
    for rank, (token_ids, score) in enumerate(request.search.best()):
        continuation = Continuation(request, rank)
        continuation.score = score
        continuation.cumulative_logprob = score * len(token_ids) ** float(request.params.length_penalty)
        if tokenizer is not None:
            continuation.stream = TextStream(tokenizer, ())
        is_stopped = token_ids[-1] in request.stop_ids
        for token in token_ids[: len(token_ids) - is_stopped]:
            continuation.push(token)
        reason: FinishReason = "stop" if is_stopped else "length"
        found.append(Ending(continuation, reason))
    if not found:
        raise ValueError("beam search must find a text, got none with a score above -1e9. Raise length_penalty.")
    return found


def take_tokens(request: Request) -> None:
    """Gives the beams the tokens of their search; pages that did not follow it are of no use to them then."""
    assert request.search is not None  # beams have one
    for beam, text in zip(request.continuations, request.search.running, strict=True):
        beam.ids = [*request.prompt_ids, *text]
