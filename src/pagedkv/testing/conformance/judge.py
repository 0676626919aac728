"""What a case does with its tensors: copies on the device of the back end, and the comparison of every bit."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ...kernels.attention_plan import AttentionPlan
from ..bits import same_bits, storage_bytes
from .case import Check

__all__ = ["assert_same", "assert_same_memory", "moves_as_reference", "placed", "refuses"]

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
    # The cut into items is for the threads of the native core.
    return dataclasses.replace(plan, work=None, **there)


def moves_as_reference(op: Callable[..., Any], make: Callable[[], Arguments]) -> Check:
    """The op must give and write, of `make()`, the bits that the reference does, and write no other byte."""

    def check(backend: str, device: torch.device) -> None:
        arguments = make()
        expected, actual = placed(arguments, CPU), placed(arguments, device)
        results = _tensors(op(**expected, backend="reference")), _tensors(op(**actual, backend=backend))
        for number, (wanted, given) in enumerate(zip(*results, strict=True)):
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


def _tensors(result: Any) -> Iterable[torch.Tensor]:
    return () if result is None else tuple(result)
