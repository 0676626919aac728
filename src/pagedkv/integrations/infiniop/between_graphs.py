"""How operators are called from compiled functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from ...kernels import pages

__all__ = ["runs_between_graphs"]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def runs_between_graphs(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """torch.compile ends its graph before the function and starts another behind it; nothing within is traced.

    Operators compare addresses and values, and keep descriptors: none of it fits a graph.
    """
    apart = pages.between_graphs(function)

    @wraps(function)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        # Asked each time: `apart` imports the compiler, which callers that never compile need not pay for.
        run = apart if torch.compiler.is_compiling() else function
        return run(*args, **kwargs)

    return call
