"""The exponential of a softmax read from a table, interpolated, with a bound on its error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..shapes import check_floating, check_int
from .attention_checks import as_float32
from .kept_tensors import kept_tensors

__all__ = ["VANISHED", "ExpTable", "ExpTensors", "check_softmax"]

_MOST_ENTRIES = 2**20
# Below it there would be more powers than entries.
_SHORTEST = 2.0**-10
# e^-104 is below half of the smallest float32 above 0.
VANISHED = 104.0
_SMALLEST_NORMAL = -math.log(torch.finfo(torch.float32).tiny)


class ExpTensors(NamedTuple):
    """The numbers of a table, float32: entries [num_entries], e^(-i * step); powers [K + 1], e^(-k * max_distance).

    The last power is 0: it is that of every distance at which e^x rounds to 0.
    """

    entries: torch.Tensor
    powers: torch.Tensor


@dataclass(frozen=True)
class ExpTable:
    """e^x for x <= 0 by linear interpolation between num_entries values over [-max_distance, 0].

    Rule:   with step = max_distance / (num_entries - 1), x = -(k * max_distance + r) and 0 <= r < max_distance:
            e^x is entry(r / step), interpolated, times e^(-k * max_distance). So there is no floor: distances beyond
            the table lose no accuracy, and e^-inf, the weight of a masked key, is exactly 0. NaN stays NaN.
    Error:  at most `max_relative_error` while e^x is a normal float32; 3.4e-5 with the defaults.
    Raises: ValueError, TypeError for num_entries not from 2 to 2^20 and max_distance not from 2^-10 to 104.

    >>> ExpTable().exp(torch.tensor([0.0, -1.0, -25.0, -torch.inf]))
    tensor([1.0000e+00, 3.6788e-01, 1.3888e-11, 0.0000e+00])
    """

    num_entries: int = 1024
    max_distance: float = 10.0

    def __post_init__(self) -> None:
        check_int("num_entries", self.num_entries, minimum=2)
        if self.num_entries > _MOST_ENTRIES:
            raise ValueError(f"num_entries must be at most {_MOST_ENTRIES}, got {self.num_entries}.")
        # Own types: numpy's would go on computing in theirs.
        object.__setattr__(self, "max_distance", float(as_float32("max_distance", self.max_distance)))
        if not _SHORTEST <= self.max_distance <= VANISHED:
            raise ValueError(f"max_distance must be from {_SHORTEST} to {VANISHED:g}, got {self.max_distance}.")

    @property
    def max_relative_error(self) -> float:
        """Bound of |table / e^x - 1|: h^2 / 8 * e^h of the interpolation, and the rounding of x and of the products."""
        step = self.max_distance / (self.num_entries - 1)
        return step * step / 8 * math.exp(step) + (_SMALLEST_NORMAL + 4) * 2.0**-22

    @property
    def num_steps(self) -> int:
        """Intervals of the table."""
        return self.num_entries - 1

    def tensors(self, device: torch.device | str = "cpu") -> ExpTensors:
        """The numbers of the table, made once a device: for reading, since all calls share them."""
        return ExpTensors(*_tensors(self.num_entries, self.max_distance, str(device)))

    def exp(self, x: torch.Tensor) -> torch.Tensor:
        """e^x, float32, for x <= 0 of any shape; what back ends compute, in plain torch.

        Raises: TypeError for what is not a floating tensor; x above 0 is not looked for and gives 1.
        """
        check_floating("x", x)
        entries, powers = self.tensors(x.device)
        steps = (x.float() * (-self.num_steps / self.max_distance)).clamp(min=0)
        # NaN, which no index may be made of, counts as the largest distance here.
        ranges = (steps / self.num_steps).nan_to_num(torch.inf).clamp(max=len(powers) - 1).floor()
        place = (steps - ranges * self.num_steps).nan_to_num(0.0).clamp(0, self.num_steps)
        below = place.floor().clamp(max=self.num_steps - 1)
        low, high = entries[below.long()], entries[below.long() + 1]
        result = (low + (place - below) * (high - low)) * powers[ranges.long()]
        result = torch.where(x < -VANISHED, 0.0, result)
        return torch.where(x.isnan(), torch.nan, result)


def check_softmax(softmax: object) -> ExpTable | None:
    """The table of `softmax="lut"` or of one given; None for "exact"."""
    if isinstance(softmax, ExpTable):
        return softmax
    if not isinstance(softmax, str):
        raise TypeError(f"softmax must be 'exact', 'lut' or an ExpTable, got {type(softmax).__name__}.")
    if softmax not in ("exact", "lut"):
        raise ValueError(f"softmax must be 'exact', 'lut' or an ExpTable, got {softmax!r}.")
    return ExpTable() if softmax == "lut" else None


@kept_tensors(maxsize=16)
def _tensors(num_entries: int, max_distance: float, device: str) -> ExpTensors:
    step = max_distance / (num_entries - 1)
    entries = torch.exp(-step * torch.arange(num_entries, dtype=torch.float64, device="cpu"))
    num_powers = int(VANISHED / max_distance) + 2
    powers = torch.exp(-max_distance * torch.arange(num_powers, dtype=torch.float64, device="cpu"))
    powers[-1] = 0
    return ExpTensors(entries.float().to(device), powers.float().to(device))
