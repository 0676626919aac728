"""Memory of fixed addresses for one plan after the other: what a captured CUDA graph replays with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..kernels import triton
from ..kernels.attention_plan import DeviceWork, PlanSettings
from ..kernels.upload import aligned_offsets
from ..shapes import check_int
from ..storage.page_table import HostTable

__all__ = ["AttentionPlanBuffers"]

_Ints = npt.NDArray[np.int32]


class AttentionPlanBuffers:
    """Device memory for one plan at a time, of any batch within the limits: `plan_attention(..., buffers=buffers)`.

    A plan made with them is views of this memory at its full size. The next plan with them overwrites what all plans
    before it read, at the same addresses: a CUDA graph that was captured with one of them replays with the newest.
    Rows of a query and a result beyond the newest batch are neither read nor written.

    max_num_seqs, max_num_tokens, max_num_pages: sequences, new tokens and entries of the page table of a batch.
    max_query_len: new tokens of one sequence, by default max_num_tokens. With 1, a decode step, a graph has no programs
                   for more.
    max_seq_len:   tokens of one sequence, by default what max_num_pages hold. A kernel that turns keys (`rope=`) gets a
                   table of that many positions.
    Owns:   the memory, and on a GPU twice as much pinned memory of the host, so that a plan is copied while the one
            before may still be on its way. One plan at a time: not for several threads.
    When:   page_size, causal and window_left are those of the first plan, as are the heads given here: a graph has them
            as constants. Run once before the capture, which compiles kernels and makes their tables. Plan and replay
            on one stream, or order the streams: a plan is copied on the current one.
    Raises: ValueError, TypeError for numbers below 1 and heads that do not fit each other. A plan that does not fit, or
            has other settings, raises before anything is written.

    >>> buffers = AttentionPlanBuffers(4, 4, 32, num_q_heads=8, num_kv_heads=2, head_dim=64, max_query_len=1)
    >>> table = PageTable.from_rows([[3, 7], [5]], seq_lens=[20, 4], page_size=16)
    >>> starts = torch.tensor([0, 1, 2], dtype=torch.int32)
    >>> plan = plan_attention(starts, table, num_q_heads=8, num_kv_heads=2, head_dim=64, buffers=buffers)
    >>> plan.seq_lens.tolist()
    [20, 4, 0, 0]
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_num_tokens: int,
        max_num_pages: int,
        *,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        max_query_len: int | None = None,
        max_seq_len: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        value_dim = head_dim if value_dim is None else value_dim
        max_query_len = max_num_tokens if max_query_len is None else max_query_len
        for name, count in (
            ("max_num_seqs", max_num_seqs),
            ("max_num_tokens", max_num_tokens),
            ("max_num_pages", max_num_pages),
            ("num_q_heads", num_q_heads),
            ("num_kv_heads", num_kv_heads),
            ("head_dim", head_dim),
            ("value_dim", value_dim),
            ("max_query_len", max_query_len),
            ("max_seq_len", 1 if max_seq_len is None else max_seq_len),
        ):
            check_int(name, count, minimum=1)
        if num_q_heads > 2**16:
            raise ValueError(f"num_q_heads must be at most {2**16}, got {num_q_heads}.")
        if num_q_heads % num_kv_heads:
            raise ValueError(f"num_q_heads must be a multiple of num_kv_heads = {num_kv_heads}, got {num_q_heads}.")
        self.max_num_seqs = max_num_seqs
        self.max_num_tokens = max_num_tokens
        self.max_num_pages = max_num_pages
        self.max_query_len = min(max_query_len, max_num_tokens)
        self.max_seq_len = max_seq_len
        self._heads = num_q_heads, num_kv_heads, head_dim, value_dim
        self._settings: PlanSettings | None = None
        # "cuda" is the current one: tensors say which.
        self.device = torch.empty(0, device=device).device
        work_shapes, self._num_partial_rows = self._work_limits()
        shapes = [(max_num_seqs + 1,), (max_num_seqs + 1,), (max_num_seqs,), *work_shapes, (max_num_pages,)]
        sizes = [math.prod(shape) for shape in shapes]
        offsets = aligned_offsets(sizes)
        # Outside inference mode, so that plans can be made inside and outside of it later.
        with torch.inference_mode(False):
            self._buffer = torch.zeros(offsets[-1], dtype=torch.int32, device=self.device)
            self._staging = _Staging(offsets[-1], self.device)
        self._parts = [slice(start, start + size) for start, size in zip(offsets, sizes, strict=False)]
        views = [self._buffer[part].view(shape) for part, shape in zip(self._parts, shapes, strict=True)]
        self.query_indptr, self.page_indptr, self.seq_lens, *work, self.page_indices = views
        self.device_work = DeviceWork.of(work, self._num_partial_rows) if work else None

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("AttentionPlanBuffers must stay where they are, got a call of copy or pickle. Make others.")

    @property
    def num_bytes(self) -> int:
        """Bytes on the device, without the partial results that a run takes besides."""
        return self._buffer.numel() * self._buffer.element_size()

    @property
    def num_positions(self) -> int:
        """Above every position of a key of any batch, and above minus that of every row."""
        page_size = self._settings.page_size if self._settings is not None else 1
        max_seq_len = self.max_num_pages * page_size if self.max_seq_len is None else self.max_seq_len
        return max(max_seq_len, self.max_query_len + 1)

    def _work_limits(self) -> tuple[list[tuple[int, int]], int]:
        """Shapes of items and merges of any batch, and the number of its partial rows; none without the back end."""
        capacity, runtime = (triton.module_for(self.device, name) for name in ("work_capacity", "runtime"))
        if capacity is None or runtime is None:
            return [], 0
        num_q_heads, num_kv_heads, head_dim, value_dim = self._heads
        most = capacity.work_capacity(
            max_num_seqs=self.max_num_seqs,
            max_num_tokens=self.max_num_tokens,
            max_query_len=self.max_query_len,
            max_seq_len=2**31 - 1 if self.max_seq_len is None else self.max_seq_len,
            group=num_q_heads // num_kv_heads,
            num_kv_heads=num_kv_heads,
            head_dim=max(head_dim, value_dim),
            num_multiprocessors=runtime.num_multiprocessors(self.device),
        )
        return [(count, _WORK_COLUMNS) for count in (*most.items, most.merges)], most.num_partial_rows

    def check(self, settings: PlanSettings, device: torch.device, starts: _Ints, table: HostTable) -> None:
        """Refuses a batch that does not fit, and settings other than those of the first plan."""
        if device != self.device:
            raise ValueError(f"table must be on {self.device} like the buffers, got {device}.")
        fixed = self._settings
        if fixed is None:
            num_q_heads, num_kv_heads, head_dim, value_dim = self._heads
            fixed = PlanSettings(num_q_heads, num_kv_heads, head_dim, value_dim, *settings[4:])
        for name, value, wanted in zip(PlanSettings._fields, settings, fixed, strict=True):
            if value != wanted:
                raise ValueError(f"{name} must be {wanted} (fixed by the buffers), got {value}. Make other buffers.")
        query_lens = np.diff(starts)
        for name, count, limit in (
            ("max_num_seqs", table.seq_lens.shape[0], self.max_num_seqs),
            ("max_num_tokens", int(starts[-1]), self.max_num_tokens),
            ("max_num_pages", int(table.indptr[-1]), self.max_num_pages),
            ("max_query_len", _largest(query_lens), self.max_query_len),
            ("max_seq_len", _largest(table.seq_lens), self.max_seq_len),
        ):
            if limit is not None and count > limit:
                raise ValueError(f"the batch must have at most {limit} ({name} of the buffers), got {count}.")

    def write(self, settings: PlanSettings, starts: _Ints, table: HostTable) -> None:
        """Puts a batch that was checked in the place of the one before."""
        work = self._divided(settings, starts, table)
        num_pages = int(table.indptr[-1])
        contents: list[tuple[_Ints, int]] = [
            # Sequences beyond the batch have no rows, no pages and no tokens.
            (starts, int(starts[-1])),
            (table.indptr, num_pages),
            (table.seq_lens, 0),
            *work,
        ]
        *parts, pages = self._parts
        staging = self._staging.take()
        for part, (array, filler) in zip(parts, contents, strict=True):
            stop = part.start + array.size
            staging[part.start : stop] = array.reshape(-1)
            staging[stop : part.stop] = filler
        stop = pages.start + num_pages
        staging[pages.start : stop] = table.indices[:num_pages]
        self._staging.copy_to(self._buffer, stop)
        self._settings = settings

    def _divided(self, settings: PlanSettings, starts: _Ints, table: HostTable) -> list[tuple[_Ints, int]]:
        """Items, with sequence -1 for none, and merges, with 0 chunks for none, as far as they fit by their bounds."""
        if self.device_work is None:
            return []
        module = triton.module_for(self.device, "attention_work")
        assert module is not None  # it gave the limits
        work = module.divide_batch(settings, np.diff(starts), table.seq_lens, self.device)
        parts = [*work.items, work.merges]
        assert work.num_partial_rows <= self._num_partial_rows  # by work_capacity
        assert all(array.shape[0] <= room.shape[0] for array, room in zip(parts, self.device_work[:4], strict=True))
        return [(array, -1) for array in work.items] + [(work.merges, 0)]

    def __repr__(self) -> str:
        limits = f"{self.max_num_seqs}, {self.max_num_tokens}, {self.max_num_pages}"
        return f"AttentionPlanBuffers({limits}, device={str(self.device)!r}, {self.num_bytes / 2**20:.1f} MiB)"


_WORK_COLUMNS = 5


class _Staging:
    """Memory of the host that is copied to a device: for a GPU pinned, and two in turn.

    What is written next then never waits for the copy before, and for the one before that only if it is not yet over.
    """

    def __init__(self, num_elements: int, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._turn = 0
        self._tensors = [
            torch.empty(num_elements, dtype=torch.int32, device="cpu", pin_memory=self._is_gpu)
            for _ in range(2 if self._is_gpu else 1)
        ]
        self._copied: list[Any] = [None for _ in self._tensors]

    def take(self) -> _Ints:
        """The next one, to be written and then copied."""
        self._turn = (self._turn + 1) % len(self._tensors)
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        array: _Ints = self._tensors[self._turn].numpy()
        return array

    def copy_to(self, buffer: torch.Tensor, num_elements: int) -> None:
        """Copies the first elements of what was taken, on the current stream of the buffer's device."""
        source = self._tensors[self._turn]
        buffer[:num_elements].copy_(source[:num_elements], non_blocking=self._is_gpu)
        if self._is_gpu:
            event = self._copied[self._turn] or torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(buffer.device))
            self._copied[self._turn] = event


def _largest(counts: Sequence[int] | npt.NDArray[Any]) -> int:
    return int(np.max(counts, initial=0))
