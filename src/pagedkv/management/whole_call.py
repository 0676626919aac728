"""What makes a method of the manager, a sequence or a pin one call: all of it or nothing, one at a time.

A call that raises an Exception has put everything back by itself. A KeyboardInterrupt, or another one that a signal
handler raises, may end it between any two steps, and so may a lack of memory: the flag `is_torn`, which is up while a
call runs, is still up then, and the next call settles the books before it does its own work (management/settle.py).

A tier, a policy, a signal handler or a finalizer may call while a call of the same thread is under way, on books that
are half changed: `reading_call`s are answered, `closing_call`s wait for its end, and all others are refused. Methods
that are parts of a call of ours use `within`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

from .page_budget import PageBudget
from .settle import settle

__all__ = ["closing_call", "reading_call", "whole_call", "within"]


class _Budgeted(Protocol):
    @property
    def _budget(self) -> PageBudget: ...


_Self = TypeVar("_Self", bound=_Budgeted)
_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")
_Method = Callable[Concatenate[_Self, _Args], _Result]
_WhenInside = Callable[[PageBudget, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def whole_call(method: _Method[_Self, _Args, _Result]) -> _Method[_Self, _Args, _Result]:
    """A method that holds the lock of `self._budget`, works on settled books, and verifies them in debug mode."""
    return _whole(method, _refuse)


def closing_call(method: _Method[_Self, _Args, None]) -> _Method[_Self, _Args, None]:
    """The same; called inside another call it is made at the end of that one."""
    return _whole(method, _wait)


def reading_call(method: _Method[_Self, _Args, _Result]) -> _Method[_Self, _Args, _Result]:
    """The same of one that changes nothing; called inside another call it says what is there at that moment."""
    return _whole(method, _run)


def within(method: Callable[..., _Result], *args: Any) -> _Result:
    """Makes a whole call as a part of another: `within(Sequence.close, seq)`."""
    return cast("_Result", method.__wrapped__(*args))  # type: ignore[attr-defined]


def _whole(method: _Method[_Self, _Args, _Result], when_inside: _WhenInside) -> _Method[_Self, _Args, _Result]:
    @wraps(method)
    def call(self: _Self, *args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        budget = self._budget
        # Asked of the lock, because an interrupt cannot leave that wrong as it could a count of ours.
        if budget.lock._is_owned():  # type: ignore[attr-defined]
            return cast("_Result", when_inside(budget, method, (self, *args), kwargs))
        with budget.lock:
            if budget.is_torn:
                settle(budget)
            budget.is_torn = True
            try:
                result = method(self, *args, **kwargs)
            except (MemoryError, RecursionError):
                raise
            except Exception:
                _finish(budget)
                raise
            if budget.waiting or budget.verify is not None:
                _finish(budget)
            budget.is_torn = False
            return result

    return cast("_Method[_Self, _Args, _Result]", call)


def _finish(budget: PageBudget) -> None:
    while budget.waiting:
        with suppress(Exception):  # nobody is there any more to hear it
            budget.waiting.pop(0)()
    budget.is_torn = False
    if budget.verify is not None:
        budget.verify()


def _refuse(budget: PageBudget, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    raise ValueError(
        f"{method.__name__.strip('_')} must not be called inside another call of the manager, got a call of a tier, a "
        "policy, a signal handler or a finalizer. Return first."
    )


def _wait(budget: PageBudget, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    budget.waiting.append(partial(method, *args, **kwargs))


def _run(budget: PageBudget, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return method(*args, **kwargs)
