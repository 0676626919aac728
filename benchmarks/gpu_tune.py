"""Other tiles, warps, stages and numbers of programs than the launchers choose, each in turns with what they choose.

A case each, so that one that hangs or crashes costs no other.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from .case import OURS
from .gpu_batch import GpuBatch, GpuShape, LatentBatch
from .gpu_cases import GpuCase, GpuSpec, Run, latent_batch, work_of
from .gpu_ceilings import Kind
from .gpu_clock import Clock

__all__ = ["tune_specs"]


class Tile(NamedTuple):
    """Keys of a block, warps, stages; of MLA also the rows of a program."""

    keys: int
    num_warps: int
    num_stages: int
    rows: int = 0

    def __str__(self) -> str:
        rows = f"rows {self.rows}, " if self.rows else ""
        return f"{rows}keys {self.keys}, warps {self.num_warps}, stages {self.num_stages}"


_DECODE_TILES = tuple(
    Tile(keys, warps, stages)
    for keys, warps, stages in (
        (32, 4, 3),
        (32, 4, 5),
        (32, 2, 4),
        (64, 4, 2),
        (64, 4, 4),
        (64, 8, 3),
        (128, 4, 2),
        (128, 4, 3),
        (128, 8, 2),
        (128, 8, 3),
    )
)
_PREFILL_TILES = tuple(
    Tile(keys, warps, stages)
    for keys, warps, stages in ((32, 8, 3), (64, 4, 2), (64, 8, 3), (64, 8, 4), (128, 8, 2), (128, 8, 3))
)
_LATENT_TILES = tuple(
    Tile(keys, warps, stages, rows)
    for rows, keys, warps, stages in (
        (64, 64, 8, 2),
        (64, 64, 4, 2),
        (64, 32, 8, 2),
        (64, 32, 8, 3),
        (64, 32, 8, 4),
        (64, 32, 4, 2),
        (32, 64, 8, 2),
        (32, 32, 4, 3),
    )
)
# Programs a multiprocessor that keys are cut for.
_PROGRAMS = (2, 4, 8, 16, 32)


def tune_specs() -> Iterator[GpuSpec]:
    """Decode in bfloat16 and float8, prefill and latent attention."""
    long, one, many = GpuShape(64, 4096), GpuShape(1, 131072), GpuShape(256, 1024, num_q_heads=64)
    fp8, prefill = replace(long, dtype=torch.float8_e4m3fn), GpuShape(1, 16384, q_len=16384)

    def tiles(shape: GpuShape, of: Sequence[Tile]) -> Iterator[GpuSpec]:
        for tile in of:
            yield GpuSpec(f"tiles/{shape}/{tile}", partial(_tile, shape=shape, tile=tile))

    yield from tiles(long, _DECODE_TILES)
    yield from tiles(prefill, _PREFILL_TILES)
    for tile in _LATENT_TILES:
        yield GpuSpec(f"tiles/mla-S64-ctx4096-H128/{tile}", partial(_latent_tile, tile=tile))
    for shape in (long, one, many):
        for programs in _PROGRAMS:
            name = f"programs/{shape}/{programs} programs a multiprocessor"
            yield GpuSpec(name, partial(_programs, shape=shape, programs=programs))
    for shape in (fp8, many, one):
        yield from tiles(shape, _DECODE_TILES)


Change = Callable[[], AbstractContextManager[None]]


def _tile(clock: Clock, tiny: bool, backend: str, *, shape: GpuShape, tile: Tile) -> GpuCase:
    batch = GpuBatch(shape.tiny() if tiny else shape, clock.device, backend)
    module = _module("paged_attention")

    @contextmanager
    def changed() -> Iterator[None]:
        original = module.form_of

        def form_of(*args: Any) -> tuple[Any, Any]:
            form, launch = original(*args)
            form = form._replace(block_n=tile.keys, edge_n=min(form.edge_n, tile.keys))
            return form, launch._replace(num_warps=tile.num_warps, num_stages=tile.num_stages)

        with _set(module, "form_of", form_of):
            yield

    return _case(batch, str(tile), changed, *work_of(batch.shape))


def _latent_tile(clock: Clock, tiny: bool, backend: str, *, tile: Tile) -> GpuCase:
    batch = latent_batch(clock, tiny, backend)
    module = _module("mla_attention")

    @contextmanager
    def changed() -> Iterator[None]:
        ours = module.Tile(tile.rows, tile.keys, tile.num_warps, tile.num_stages)
        tiles = dict.fromkeys(module._TILES, ((ours,), ours))
        # Without its cache, which knows the launcher's own tiles.
        with _set(module, "_TILES", tiles), _set(module, "_specialised", module._specialised.__wrapped__):
            yield

    return _case(batch, str(tile), changed, "matmul", batch.num_flops)


def _programs(clock: Clock, tiny: bool, backend: str, *, shape: GpuShape, programs: int) -> GpuCase:
    batch = GpuBatch(shape.tiny() if tiny else shape, clock.device, backend)
    work = _module("attention_work")
    with _set(work, "_PROGRAMS_EACH", (programs, *work._PROGRAMS_EACH[1:])):
        plan = batch.make_plan()
        if plan.device_work is None:  # made at the first run, as on the CPU: that is now
            work.work_of(plan)
    return _case(batch, f"{programs} programs", partial(_set, batch, "plan", plan), "read", batch.shape.num_bytes)


def _case(batch: GpuBatch | LatentBatch, name: str, change: Change, ceiling: Kind, work: int) -> GpuCase:
    """A change under which the batch is wrong, or does not compile, is a note."""
    contenders: dict[str, Run] = {OURS: batch.run}
    notes: list[str] = []

    def run_changed(i: int) -> object:
        with change():
            return batch.run(i)

    try:
        with change():
            batch.check()
    except Exception as error:  # noqa: BLE001 - a tile too large for the device, say
        notes.append(f"{name}: {type(error).__name__}: {str(error)[-150:]}")
    else:
        contenders[name] = run_changed
    return GpuCase(contenders, batch.check, ceiling, work, notes=tuple(notes))


@contextmanager
def _set(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _module(name: str) -> Any:
    return importlib.import_module(f"pagedkv.kernels.triton.{name}")
