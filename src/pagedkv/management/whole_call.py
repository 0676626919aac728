"""What makes a method of the manager, a sequence or a pin one call: all of it or nothing, one at a time.

A call that raises an Exception has put everything back by itself. A KeyboardInterrupt, or another one that a signal
handler raises, may end it between any two steps, and so may a lack of memory: the flag `is_torn`, which is up while a
call runs, is still up then, and the next call settles the books before it does its own work (management/settle.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar, cast

from .page_budget import PageBudget
from .settle import settle

__all__ = ["whole_call"]


class _Budgeted(Protocol):
    @property
    def _budget(self) -> PageBudget: ...


_Self = TypeVar("_Self", bound=_Budgeted)
_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


def whole_call(
    method: Callable[Concatenate[_Self, _Args], _Result],
) -> Callable[Concatenate[_Self, _Args], _Result]:
    """A method that holds the lock of `self._budget`, works on settled books, and verifies them in debug mode."""

    @wraps(method)
    def call(self: _Self, *args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        budget = self._budget
        # Asked of the lock, because an interrupt cannot leave that wrong as it could a count of ours.
        if budget.lock._is_owned():  # type: ignore[attr-defined]
            return method(self, *args, **kwargs)
        with budget.lock:
            if budget.is_torn:
                settle(budget)
            budget.is_torn = True
            try:
                result = method(self, *args, **kwargs)
            except (MemoryError, RecursionError):
                raise
            except Exception:
                budget.is_torn = False
                if budget.verify is not None:
                    budget.verify()
                raise
            budget.is_torn = False
            if budget.verify is not None:
                budget.verify()
            return result

    return cast("Callable[Concatenate[_Self, _Args], _Result]", call)
