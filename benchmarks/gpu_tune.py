"""Other tiles, warps, stages and numbers of programs than the launchers choose, in turns with what they choose."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

from .case import OURS
from .gpu_batch import GpuBatch, GpuShape, LatentBatch
from .gpu_cases import GpuCase, GpuSpec, Run
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
    long, one, many = GpuShape(64, 4096), GpuShape(1, 131072), GpuShape(256, 1024)
    fp8 = GpuShape(64, 4096, dtype=torch.float8_e4m3fn)
    for shape in (long, one, many, fp8):
        yield GpuSpec(f"tiles/{shape}", partial(_tiles, shape=shape, tiles=_DECODE_TILES, ceiling="read"))
    prefill = GpuShape(1, 16384, q_len=16384)
    yield GpuSpec(f"tiles/{prefill}", partial(_tiles, shape=prefill, tiles=_PREFILL_TILES, ceiling="matmul"))
    yield GpuSpec("tiles/mla-S64-ctx4096-H128", _latent_tiles)
    for shape in (long, one, many):
        yield GpuSpec(f"programs/{shape}", partial(_programs, shape=shape))


Change = Callable[[], AbstractContextManager[None]]


def _tiles(clock: Clock, tiny: bool, backend: str, *, shape: GpuShape, tiles: Sequence[Tile], ceiling: Kind) -> GpuCase:
    shape, tiles = (shape.tiny(), tiles[:1]) if tiny else (shape, tiles)
    batch = GpuBatch(shape, clock.device, backend)
    module = _module("paged_attention")

    @contextmanager
    def changed(tile: Tile) -> Iterator[None]:
        original = module.form_of

        def form_of(*args: Any) -> tuple[Any, Any]:
            form, launch = original(*args)
            form = form._replace(block_n=tile.keys, edge_n=min(form.edge_n, tile.keys))
            return form, launch._replace(num_warps=tile.num_warps, num_stages=tile.num_stages)

        with _set(module, "form_of", form_of):
            yield

    work = shape.num_bytes if ceiling == "read" else shape.num_flops
    return _case(batch, {str(tile): partial(changed, tile) for tile in tiles}, ceiling, work)


def _latent_tiles(clock: Clock, tiny: bool, backend: str) -> GpuCase:
    if tiny:
        batch = LatentBatch(2, 37, 4, clock.device, backend, widths=(32, 16), page_size=16)
    else:
        batch = LatentBatch(64, 4096, 128, clock.device, backend)
    module = _module("mla_attention")

    @contextmanager
    def changed(tile: Tile) -> Iterator[None]:
        ours = module.Tile(tile.rows, tile.keys, tile.num_warps, tile.num_stages)
        tiles = dict.fromkeys(module._TILES, ((ours,), ours))
        # Without its cache, which knows the launcher's own tiles.
        with _set(module, "_TILES", tiles), _set(module, "_specialised", module._specialised.__wrapped__):
            yield

    tiles = _LATENT_TILES[:1] if tiny else _LATENT_TILES
    return _case(batch, {str(tile): partial(changed, tile) for tile in tiles}, "matmul", batch.num_flops)


def _programs(clock: Clock, tiny: bool, backend: str, *, shape: GpuShape) -> GpuCase:
    shape = shape.tiny() if tiny else shape
    batch = GpuBatch(shape, clock.device, backend)
    work = _module("attention_work")
    changes: dict[str, Change] = {}
    for programs in _PROGRAMS[:1] if tiny else _PROGRAMS:
        with _set(work, "_PROGRAMS_EACH", (programs, *work._PROGRAMS_EACH[1:])):
            plan = batch.make_plan()
            plan = plan if plan.device_work is not None else _with_work(work, plan)
        changes[f"{programs} programs a multiprocessor"] = partial(_set, batch, "plan", plan)
    return _case(batch, changes, "read", shape.num_bytes)


def _with_work(work: Any, plan: Any) -> Any:
    """Where it is made at the first run, as on the CPU, that is now."""
    work.work_of(plan)
    return plan


def _case(batch: GpuBatch | LatentBatch, changes: dict[str, Change], ceiling: Kind, work: int) -> GpuCase:
    """A change under which the batch is wrong, or does not compile, is a note."""
    contenders: dict[str, Run] = {OURS: batch.run}
    notes: list[str] = []

    def run_changed(change: Change, i: int) -> object:
        with change():
            return batch.run(i)

    for name, change in changes.items():
        try:
            with change():
                batch.check()
        except Exception as error:  # noqa: BLE001 - a tile too large for the device, say
            notes.append(f"{name}: {type(error).__name__}: {str(error)[:150]}")
        else:
            contenders[name] = partial(run_changed, change)
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
