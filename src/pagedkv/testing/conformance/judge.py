"""What a case does with its tensors: copies on the device of the back end, and the comparison of every bit."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ...kernels.attention_plan import AttentionPlan
from ..bits import same_bits, storage_bytes
from ..numeric import assert_close_to_oracle
from .case import Check, threads_of_caller

__all__ = ["assert_rounded_once", "assert_same", "assert_same_memory", "moves_as_reference", "placed", "refuses"]

Arguments = Mapping[str, Any]
CPU = torch.device("cpu")


def placed(arguments: Arguments, device: torch.device) -> dict[str, Any]:
    """Copies of all tensors on `device`: strides, offsets and which of them share memory stay as they are."""
    copies: dict[int, torch.UntypedStorage] = {}

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in copies:
            copies[storage._cdata] = storage_bytes(tensor).to(device).untyped_storage()
        there = torch.empty(0, dtype=tensor.dtype, device=device)
        return there.set_(copies[storage._cdata], tensor.storage_offset(), tensor.shape, tensor.stride())

    def place(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return copy(value)
        return _placed_plan(value, device) if isinstance(value, AttentionPlan) else value

    return {name: place(value) for name, value in arguments.items()}


def _placed_plan(plan: AttentionPlan, device: torch.device) -> AttentionPlan:
    if device.type == "cpu":
        return plan
    tensors = ("query_indptr", "page_indptr", "page_indices", "seq_lens", "custom_mask", "mask_indptr")
    given = {name: getattr(plan, name) for name in tensors}
    there: dict[str, Any] = {name: None if t is None else t.to(device) for name, t in given.items()}
    # The cut into items is for the threads of the native core, or for another device.
    return dataclasses.replace(plan, work=None, device_work=None, **there)


def moves_as_reference(op: Callable[..., Any], make: Callable[[], Arguments]) -> Check:
    """The op must give and write, of `make()`, the bits that the reference does, and write no other byte."""

    def check(backend: str, device: torch.device) -> None:
        arguments = make()
        expected, actual = placed(arguments, CPU), placed(arguments, device)
        wanted_results = _tensors(op(**expected, backend="reference"))
        with threads_of_caller():
            results = _tensors(op(**actual, backend=backend))
        for number, (wanted, given) in enumerate(zip(wanted_results, results, strict=True)):
            assert_same(f"result {number}", given, wanted)
        assert_same_memory(actual, expected)

    return check


def refuses(op: Callable[..., Any], make: Callable[[], Arguments], culprit: str) -> Check:
    """The op must raise a ValueError that names the culprit, and write nothing."""

    def check(backend: str, device: torch.device) -> None:
        arguments = make()
        actual = placed(arguments, device)
        words = None
        try:
            with threads_of_caller():
                op(**actual, backend=backend)
        except ValueError as error:
            words = str(error)
        assert_same_memory(actual, arguments)
        assert words is not None, f"the call must raise a ValueError that names {culprit}, got no error."
        assert re.search(rf"(?<!\d){re.escape(culprit)}(?!\d)", words), f"the error must name {culprit}, got {words!r}."

    return check


def assert_same_memory(actual: Arguments, expected: Arguments) -> None:
    """Asserts of each tensor, and of all bytes of the memory it is a view of, that they are those expected."""
    for name, wanted in expected.items():
        if isinstance(wanted, torch.Tensor):
            assert_same(name, actual[name], wanted)
    for name, wanted in expected.items():
        if isinstance(wanted, torch.Tensor):
            around = storage_bytes(actual[name]).cpu()
            assert torch.equal(around, storage_bytes(wanted)), f"bytes outside {name} must stay as they were."


def assert_same(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Asserts shape, dtype and every bit, and says where the first difference is."""
    actual = actual.cpu()
    for what in ("shape", "dtype"):
        wanted, given = getattr(expected, what), getattr(actual, what)
        assert given == wanted, f"{name} must have {what} {wanted}, got {given}."
    if same_bits(actual, expected):
        return
    rows = [t.contiguous().view(-1).view(torch.uint8).view(t.numel(), -1) for t in (actual, expected)]
    differs = (rows[0] != rows[1]).any(1).view(expected.shape).nonzero()
    first = tuple(differs[0].tolist())
    raise AssertionError(
        f"{name} must have the bits expected, got {len(differs)} of {expected.numel()} elements that differ, "
        f"the first at {list(first)}: {actual[first].item()} instead of {expected[first].item()}."
    )


def assert_rounded_once(name: str, actual: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> None:
    """The rule of `testing/numeric.py` and, of 16 bits, that each element was rounded to nearest, not cut.

    For results that are computed in float32: half of the distance between two numbers of the dtype at each element, and
    twice the largest error of plain torch.
    """
    assert_close_to_oracle(name, actual, exact, plain)
    if actual.dtype == torch.float32 or not actual.numel():
        return
    limits = torch.finfo(actual.dtype)
    unit = torch.exp2(torch.frexp(exact)[1].double() - 1).clamp(min=limits.tiny) * limits.eps
    errors = (actual.double() - exact).abs()
    beyond = float((errors - unit / 2).max())
    allowed = 2 * float((plain.double() - exact).abs().max())
    assert beyond <= allowed, (
        f"{name} must be rounded to nearest, got {beyond:.3g} more than half a unit in the last place."
    )


def _tensors(result: Any) -> Iterable[torch.Tensor]:
    return () if result is None else tuple(result)
