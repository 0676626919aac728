"""From tokens to text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

__all__ = ["Detokenizer", "StopStrings", "TextPiece", "TextStream"]

_REPLACEMENT = "�"


class TextPiece(NamedTuple):
    """Text that can be shown, and whether a stop string ended it."""

    text: str
    is_stopped: bool


class Detokenizer:
    """Turns tokens into text one at a time; bytes of an unfinished character are held back.

    Rule: the pieces joined are the decoding of all tokens, for every tokenizer whose text of a token is settled once
          the text after it does not end in an unfinished character.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._token_ids: list[int] = []
        # Tokens [start, shown) are decoded again with every new one: many tokenizers treat a first token apart, so the
        # new text is the difference of two decodings that begin alike.
        self._start = 0
        self._shown = 0

    def push(self, token_id: int) -> str:
        """The text that became certain with this token, often "" inside a character."""
        self._token_ids.append(token_id)
        before, after = self._decode(self._start, self._shown), self._decode(self._start)
        if after.endswith(_REPLACEMENT) or len(after) <= len(before):
            return ""
        self._start, self._shown = self._shown, len(self._token_ids)
        return after[len(before) :]

    def flush(self) -> str:
        """What was held back, at the end; an unfinished character becomes a replacement character."""
        before, after = self._decode(self._start, self._shown), self._decode(self._start)
        self._start = self._shown = len(self._token_ids)
        return after[len(before) :]

    def _decode(self, start: int, stop: int | None = None) -> str:
        text: str = self._tokenizer.decode(
            self._token_ids[start:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


class StopStrings:
    """Finds the first of some strings in text that comes in pieces; holds back what may be the beginning of one.

    >>> stops = StopStrings(("END",))
    >>> stops.push("the E")
    TextPiece(text='the ', is_stopped=False)
    >>> stops.push("ND.")
    TextPiece(text='', is_stopped=True)
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> TextPiece:
        """What of the text so far is before any stop string."""
        self._held += text
        found = [position for stop in self._stops if (position := self._held.find(stop)) >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return TextPiece(shown, True)
        kept = self._num_held()
        shown, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return TextPiece(shown, False)

    def flush(self) -> str:
        """What was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held

    def _num_held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest


class TextStream:
    """The text of one request: tokens in, text that may be shown out."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._tokenizer, self._strings = tokenizer, stops
        self.restart()

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string ended the text."""
        return self._is_stopped

    def restart(self) -> None:
        """Begins anew, with no tokens."""
        self._detokenizer = Detokenizer(self._tokenizer)
        self._stops = StopStrings(self._strings)
        self._is_stopped = False

    def push(self, token_id: int) -> TextPiece:
        """The text that became certain with this token."""
        piece = self._stops.push(self._detokenizer.push(token_id))
        self._is_stopped = piece.is_stopped
        return piece

    def flush(self) -> TextPiece:
        """What was held back, at the end of the request; nothing after a stop string."""
        if self._is_stopped:
            return TextPiece("", True)
        piece = self._stops.push(self._detokenizer.flush())
        return piece if piece.is_stopped else TextPiece(piece.text + self._stops.flush(), False)
