"""Interrupts at a chosen bytecode, so that a test can end a call at every point of it in turn."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

__all__ = ["Interrupter"]


class Interrupter:
    """Raises KeyboardInterrupt before bytecode `number` of the functions that `is_meant` names, in a `with` block.

    is_meant:    says of the code of a function that is called in the block whether its bytecodes count.
    num_skipped: so many calls of such functions are left out first.
    has_struck:  whether the block came so far.
    """

    def __init__(self, number: int, is_meant: Callable[[CodeType], bool], num_skipped: int = 0) -> None:
        self.has_struck = False
        self._number, self._is_meant, self._num_skipped = number, is_meant, num_skipped
        self._previous: Any = None

    def __enter__(self) -> Interrupter:
        self._previous = sys.gettrace()
        sys.settrace(self._trace_call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._previous)

    def _trace_call(self, frame: FrameType, event: str, argument: Any) -> Any:
        if self.has_struck or not self._is_meant(frame.f_code):
            return None
        self._num_skipped -= 1
        if self._num_skipped >= 0:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._trace_bytecode

    def _trace_bytecode(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "opcode" and not self.has_struck:
            if self._number == 0:
                self.has_struck = True
                raise KeyboardInterrupt
            self._number -= 1
        return self._trace_bytecode
