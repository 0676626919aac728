"""What every wrapper has: a workspace that is taken and checked, buffers of graph mode, the batch of the last plan."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from ...kernels.pages import check_writable
from .arguments import Result, check_workspace, int32_indices
from .layouts import check_kv_layout
from .planned import FLOAT8_DTYPES, PlannedBatch

__all__ = ["PlannedWrapper", "check_planned", "check_window", "extra_arguments", "fill_buffers", "takes_sinks"]


class PlannedWrapper:
    """Base of the wrappers: `plan` sets the batch, `run` uses it for any number of layers."""

    def __init__(
        self, float_workspace_buffer: torch.Tensor | None, kv_layout: str = "NHD", use_cuda_graph: bool = False
    ) -> None:
        check_kv_layout(kv_layout)
        check_workspace(float_workspace_buffer)
        self._float_workspace_buffer = float_workspace_buffer
        self._int_workspace_buffer: torch.Tensor | None = None
        self._kv_layout = kv_layout
        self._use_cuda_graph = use_cuda_graph
        self._batch: PlannedBatch | None = None

    @property
    def device(self) -> torch.device | None:
        """Where the workspace is and so where runs take place; None follows the index tensors."""
        return None if self._float_workspace_buffer is None else self._float_workspace_buffer.device

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether sizes are fixed by buffers that were given when the wrapper was made."""
        return self._use_cuda_graph

    def reset_workspace_buffer(
        self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor | None = None
    ) -> None:
        """Takes other workspaces, checked alike; plans stay valid."""
        check_workspace(float_workspace_buffer)
        check_workspace(int_workspace_buffer, "int_workspace_buffer")
        self._float_workspace_buffer = float_workspace_buffer
        self._int_workspace_buffer = int_workspace_buffer

    def plan(self, *args: Any, **kwargs: Any) -> None:
        """Each wrapper's own."""
        raise NotImplementedError

    def workspace_size(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Bytes (float, int) that a plan with these arguments takes at most, of our own memory; nothing is planned."""
        probe = copy.copy(self)
        probe._use_cuda_graph = False
        # Engines put a function of their own in the place of `plan`.
        type(probe).plan(probe, *args, **kwargs)
        plan = probe.batch.plan
        return plan.workspace_bytes, 0 if plan.work is None else plan.work.numel() * plan.work.element_size()

    def end_forward(self) -> None:
        """Does nothing; kept for callers that pair it with begin_forward."""

    @property
    def batch(self) -> PlannedBatch:
        """The batch of the last plan.

        Raises: RuntimeError when there was none.
        """
        return check_planned(self._batch)

    def _run_changed(self, batch: PlannedBatch, run: Callable[[], Result]) -> Result:
        """Runs with another batch, which takes the place of the plan's unless the run fails: what `forward` does."""
        before, self._batch = self._batch, batch
        try:
            return run()
        except BaseException:
            self._batch = before
            raise

    def _check_buffers(self, **buffers: torch.Tensor | None) -> None:
        """In graph mode each must have been given."""
        if not self._use_cuda_graph:
            return
        for name, buffer in buffers.items():
            if not isinstance(buffer, torch.Tensor):
                raise ValueError(f"{name} must be a tensor in CUDA graph mode, got {type(buffer).__name__}.")


def check_planned(batch: PlannedBatch | None) -> PlannedBatch:
    """Raises RuntimeError where `plan` was not called yet."""
    if batch is None:
        raise RuntimeError("plan must be called before run.")
    return batch


def fill_buffers(
    buffers: dict[str, torch.Tensor | None],
    given: dict[str, torch.Tensor],
    may_be_shorter: str = "",
    *,
    check_only: bool = False,
) -> None:
    """Copies the arrays of a plan to the front of the buffers of graph mode.

    may_be_shorter: the array that needs to fit only; the others must have the size of their buffers.
    Raises:         ValueError where it is not so, before anything is written.
    """
    filled = [(name, b, int32_indices(name, given[name])) for name, b in buffers.items() if b is not None]
    for name, buffer, source in filled:
        num, room = source.numel(), buffer.numel()
        if num > room or (num != room and name != may_be_shorter):
            rule = "at most" if name == may_be_shorter else "exactly"
            raise ValueError(f"{name} must have {rule} the {room} entries of its buffer in CUDA graph mode, got {num}.")
        check_writable(f"the buffer of {name}", buffer)
    for _, buffer, source in [] if check_only else filled:
        buffer[: source.numel()].copy_(source)


def check_window(window_left: int | None, batch: PlannedBatch) -> None:
    """A window given to `run` must be the plan's: AssertionError, as FlashInfer raises it."""
    # `assert` itself may be switched off.
    if window_left is not None and max(window_left, -1) != batch.plan.window_left:
        raise AssertionError(f"window_left must be {batch.plan.window_left} (set by plan), got {window_left}.")


_VARIANT_NAME, _TENSOR_NAMES, _SCALAR_NAMES = 11, 7, 9


def takes_sinks(jit_args: list[object] | None) -> bool:
    """True for the one variant of FlashInfer's run-time compilation that is a feature here: attention sinks.

    Raises: NotImplementedError for any other, whose CUDA source has no meaning here.
    """
    if jit_args is None:
        return False
    if (
        len(jit_args) > _VARIANT_NAME
        and jit_args[_VARIANT_NAME] == "AttentionSink"
        and jit_args[_TENSOR_NAMES] == ["sink"]
        and jit_args[_SCALAR_NAMES] == ["sm_scale"]
    ):
        return True
    raise NotImplementedError(
        "jit_args compiles CUDA source, which pagedkv.integrations.flashinfer does not; only the variant AttentionSink "
        "with a tensor 'sink' and a scalar 'sm_scale' is known. docs/adding_a_variant.md shows how variants are added."
    )


def extra_arguments(args: tuple[Any, ...], is_sink_variant: bool, q: torch.Tensor, **named: object) -> dict[str, Any]:
    """Options of `PlannedBatch.run` from what follows the caches by position, and those given by name.

    Rule:   of the sink variant the sinks and sm_scale; of queries of 8 bits the scales of q, k and v; else nothing.
    Raises: TypeError for anything else, and for an option that is given both ways.
    """
    if not args:
        return named
    if is_sink_variant:
        if len(args) == 2 and isinstance(args[0], torch.Tensor):
            return _once({"sinks": args[0], "sm_scale": float(args[1])}, named)
        expected = "a sink tensor and sm_scale"
    elif q.dtype in FLOAT8_DTYPES:
        if len(args) == 3:
            return _once(dict(zip(("q_scale", "k_scale", "v_scale"), args, strict=True)), named)
        expected = "the scales of q, k and v"
    else:
        expected = "nothing"
    raise TypeError(f"run must have {expected} by position after the caches, got {len(args)} arguments.")


def _once(by_position: dict[str, Any], named: dict[str, object]) -> dict[str, Any]:
    for name in by_position:
        if named.get(name) is not None:
            raise TypeError(f"run() got multiple values for argument {name!r}.")
    return {**named, **by_position}
