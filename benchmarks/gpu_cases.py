"""What is measured on a GPU, the most telling first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch

import pagedkv

from .case import OURS, WrongResultError
from .gpu_batch import GpuBatch, GpuShape, LatentBatch
from .gpu_ceilings import Kind
from .gpu_clock import Clock
from .gpu_peers import flashinfer_run, has_flashinfer, sdpa_run

__all__ = ["GpuCase", "GpuSpec", "Host", "Run", "Target", "all_specs", "latent_batch", "work_of"]

Run = Callable[[int], object]


@dataclass(frozen=True)
class Target:
    """What ours is held to: a share of the ceiling, TFLOP/s, or a multiple of the rate of a contender."""

    kind: str
    least: float
    words: str


@dataclass(frozen=True)
class GpuCase:
    """Ready to run: contenders by name, OURS first where it takes part; work in bytes or operations of the ceiling.

    notes: words, or what gives them when the timing is over.
    """

    contenders: Mapping[str, Run]
    check: Callable[[], None]
    ceiling: Kind | None = None
    work: int = 0
    target: Target | None = None
    notes: tuple[str | Callable[[], str], ...] = ()


@dataclass(frozen=True)
class Host:
    """What is timed with the host's clock, until the device is idle: contenders by name."""

    contenders: Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class GpuSpec:
    """A case by name; `build` takes its memory when its turn comes."""

    name: str
    build: Callable[[Clock, bool, str], GpuCase | Host] = field(repr=False)


_DECODES = (GpuShape(64, 4096), GpuShape(1, 131072), GpuShape(256, 1024, num_q_heads=64))
_E4M3, _INT8 = torch.float8_e4m3fn, torch.int8
_READ_85 = Target("share", 0.85, ">= 85 % of read")
_COPY_85 = Target("share", 0.85, ">= 85 % of copy")
_STORED_TOKENS = 131072


def all_specs() -> Iterator[GpuSpec]:
    """In this order, so that a run that is cut short has the targets first."""
    yield GpuSpec("ceilings", _ceilings)
    for shape in _DECODES:
        yield GpuSpec(f"decode/{shape}", partial(_attention, shape=shape, target=_READ_85))
    yield GpuSpec("prefill/" + str(_PREFILL), partial(_attention, shape=_PREFILL, target=_TFLOPS_450))
    yield GpuSpec("mla_decode/S64-ctx4096-H128-512+64-bf16", _mla)
    yield GpuSpec(f"store_kv/T{_STORED_TOKENS}-8x128-bf16", _store)
    yield GpuSpec("copy_pages/8192-of-64KiB", _copy_pages)
    for shape in _DECODES:
        fp8 = replace(shape, dtype=_E4M3)
        yield GpuSpec(f"decode/{fp8}", partial(_quantised_decode, shape=fp8))
    yield GpuSpec("decode_graph/S64-ctx4096-4-layers", partial(_graph, shape=GpuShape(64, 4096)))
    yield GpuSpec("decode_graph/S8-ctx256-4-layers", partial(_graph, shape=GpuShape(8, 256)))
    for shape in (_DECODES[0], _DECODES[2]):
        name = f"plan_attention/S{shape.num_seqs}-ctx{shape.kv_len}-P16"
        yield GpuSpec(name, partial(_plan, shape=shape))
    for shape in _DECODES:
        int8 = replace(shape, dtype=_INT8)
        yield GpuSpec(f"decode/{int8}", partial(_quantised_decode, shape=int8))
    plain = GpuShape(64, 4096, dtype=_E4M3, has_scales=False)
    yield GpuSpec(f"decode/{plain}", partial(_quantised_decode, shape=plain))
    for page_size in (1, 64):
        shape = GpuShape(64, 4096, page_size=page_size)
        yield GpuSpec(f"decode/{shape}", partial(_attention, shape=shape, target=_READ_85))
    append = GpuShape(8, 8192, q_len=512)
    yield GpuSpec(f"append/{append}", partial(_attention, shape=append, target=None))
    yield GpuSpec(f"gather_kv/T{_STORED_TOKENS}-8x128-bf16", _gather)
    for dtype, label in ((_INT8, "int8"), (_E4M3, "e4m3")):
        name = f"store_kv_quantized/T{_STORED_TOKENS}-8x128-bf16-to-{label}"
        yield GpuSpec(name, partial(_store, dtype=dtype))
    yield GpuSpec("merge_states/T4096-K4-H32-128-f32", _merge)
    yield GpuSpec("store_kv/T64-8x128-bf16", partial(_store, num_tokens=64))
    if has_flashinfer():
        # Last: it compiles its kernels at the first call, which may take minutes, or not end.
        for shape in (*_DECODES, _PREFILL, plain, append):
            yield GpuSpec(f"beside_flashinfer/{shape}", partial(_beside_flashinfer, shape=shape))


_PREFILL = GpuShape(1, 16384, q_len=16384)
_TFLOPS_450 = Target("tflops", 450.0, ">= 450 TFLOP/s")


def _ceilings(clock: Clock, tiny: bool, backend: str) -> GpuCase:
    """The probes, which the runner adds, in one round with another way to read: neither should be far ahead."""
    memory = torch.ones(1 << 14 if tiny else 1 << 28, device=clock.device)
    contenders: dict[str, Run] = {"torch.sum of 1 GiB": lambda i: memory.sum()}
    return GpuCase(contenders, lambda: None, "read", memory.numel() * memory.element_size())


def _attention(clock: Clock, tiny: bool, backend: str, *, shape: GpuShape, target: Target | None) -> GpuCase:
    shape = shape.tiny() if tiny else shape
    batch = GpuBatch(shape, clock.device, backend)
    contenders: dict[str, Run] = {OURS: batch.run}
    notes: list[str] = []
    if shape.q_len == shape.kv_len:
        _add_peer(contenders, notes, "torch SDPA, contiguous", lambda: sdpa_run(batch))
    return GpuCase(contenders, batch.check, *work_of(shape), target, tuple(notes))


def _quantised_decode(clock: Clock, tiny: bool, backend: str, *, shape: GpuShape) -> GpuCase:
    """Beside the same batch in bfloat16, in the same rounds."""
    of_bf16 = replace(shape, dtype=torch.bfloat16)
    shape, of_bf16 = (shape.tiny(), of_bf16.tiny()) if tiny else (shape, of_bf16)
    batch, plain = GpuBatch(shape, clock.device, backend), GpuBatch(of_bf16, clock.device, backend)
    contenders: dict[str, Run] = {OURS: batch.run, "ours on bf16 pages": plain.run}
    target = Target("ours on bf16 pages", 1.7, ">= 1.7x the rate of bf16 pages")
    return GpuCase(contenders, batch.check, "read", shape.num_bytes, target)


def _beside_flashinfer(clock: Clock, tiny: bool, backend: str, *, shape: GpuShape) -> GpuCase:
    batch = GpuBatch(shape.tiny() if tiny else shape, clock.device, backend)
    contenders: dict[str, Run] = {OURS: batch.run}
    notes: list[str] = []
    _add_peer(contenders, notes, "FlashInfer", lambda: flashinfer_run(batch))
    return GpuCase(contenders, batch.check, *work_of(batch.shape), notes=tuple(notes))


def work_of(shape: GpuShape) -> tuple[Kind, int]:
    """What limits such a batch, and how much of it there is."""
    return ("read", shape.num_bytes) if shape.q_len == 1 else ("matmul", shape.num_flops)


def _add_peer(contenders: dict[str, Run], notes: list[str], name: str, make: Callable[[], Run]) -> None:
    """A peer that cannot run here is a note, not a failure of ours."""
    try:
        run = make()
        run(0)
    except Exception as error:  # noqa: BLE001 - other people's code
        notes.append(f"{name} did not run: {type(error).__name__}: {str(error)[-200:]}")
    else:
        contenders[name] = run


def _mla(clock: Clock, tiny: bool, backend: str) -> GpuCase:
    batch = latent_batch(clock, tiny, backend)
    target = Target("share", 0.60, ">= 60 % of bf16 matmul")
    return GpuCase({OURS: batch.run}, batch.check, "matmul", batch.num_flops, target)


def latent_batch(clock: Clock, tiny: bool, backend: str) -> LatentBatch:
    """64 sequences of 4096 tokens, 128 heads."""
    if tiny:
        return LatentBatch(2, 37, 4, clock.device, backend, widths=(32, 16), page_size=16)
    return LatentBatch(64, 4096, 128, clock.device, backend)


class _Tokens:
    """T tokens of 8 heads of 128, pages for them, and slots in random order."""

    def __init__(self, num_tokens: int, tiny: bool, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        num_tokens, width = (min(num_tokens, 48), 32) if tiny else (num_tokens, 128)
        self.key, self.value = (torch.randn(num_tokens, 8, width, device=device).bfloat16() for _ in range(2))
        num_pages = -(-num_tokens // 16)
        self.pages = [torch.zeros(num_pages, 16, 8, width, device=device, dtype=dtype) for _ in range(2)]
        self.scales = [torch.zeros(num_pages, 8, 16, device=device) for _ in range(2)]
        self.slots = torch.randperm(num_pages * 16, device=device)[:num_tokens]
        self.num_bytes = 2 * self.key.numel() * self.key.element_size()

    def stored(self, pages: torch.Tensor) -> torch.Tensor:
        """[T, 8, D]: what the pages hold in the slots."""
        return pages.view(torch.uint8).flatten(0, 1)[self.slots].view(pages.dtype)


def _store(
    clock: Clock, tiny: bool, backend: str, *, num_tokens: int = _STORED_TOKENS, dtype: torch.dtype = torch.bfloat16
) -> GpuCase:
    tokens = _Tokens(num_tokens, tiny, clock.device, dtype)
    quantises = dtype != torch.bfloat16
    scales = {"key_scales": tokens.scales[0], "value_scales": tokens.scales[1]} if quantises else {}

    def run(i: int) -> object:
        return pagedkv.store_kv(tokens.key, tokens.value, *tokens.pages, tokens.slots, **scales, backend=backend)

    def check() -> None:
        run(0)
        for given, pages, scale in zip((tokens.key, tokens.value), tokens.pages, tokens.scales, strict=True):
            expected, expected_scales = given, None
            if quantises:
                expected, expected_scales = pagedkv.quantize_kv(given, dtype, backend="reference")
                _check_equal(scale.transpose(1, 2).flatten(0, 1)[tokens.slots], expected_scales)
            _check_equal(tokens.stored(pages).view(torch.uint8), expected.view(torch.uint8))

    # Read in bfloat16, written as pages, with a scale of 4 bytes a head.
    written = tokens.num_bytes // 2 + 2 * 4 * tokens.key[..., 0].numel() if quantises else tokens.num_bytes
    if num_tokens < _STORED_TOKENS:
        # Beside what any launch takes: so few bytes have no rate.
        few = torch.zeros(64, device=clock.device)
        return GpuCase({OURS: run, "zero_ of 64 numbers": lambda i: few.zero_()}, check)
    return GpuCase({OURS: run}, check, "copy", tokens.num_bytes + written, None if quantises else _COPY_85)


def _gather(clock: Clock, tiny: bool, backend: str) -> GpuCase:
    tokens = _Tokens(_STORED_TOKENS, tiny, clock.device)
    for pages in tokens.pages:
        pages.normal_()

    def run(i: int) -> object:
        return pagedkv.gather_kv(*tokens.pages, tokens.slots, backend=backend)

    def check() -> None:
        gathered = pagedkv.gather_kv(*tokens.pages, tokens.slots, backend=backend)
        for given, pages in zip(gathered, tokens.pages, strict=True):
            _check_equal(given, tokens.stored(pages))

    return GpuCase({OURS: run}, check, "copy", 2 * tokens.num_bytes)


def _copy_pages(clock: Clock, tiny: bool, backend: str) -> GpuCase:
    """Pages of 16 tokens, keys and values side by side: 64 KiB each."""
    num_pages, width = (6, 32) if tiny else (8192, 128)
    source, target = (torch.randn(num_pages, 2, 16, 8, width, device=clock.device).bfloat16() for _ in range(2))
    src, dst = (torch.randperm(num_pages, device=clock.device) for _ in range(2))

    def run(i: int) -> object:
        return pagedkv.copy_pages(source, target, src, dst, backend=backend)

    def check() -> None:
        target.fill_(torch.nan)
        run(0)
        _check_equal(target[dst], source[src])

    num_bytes = 2 * source.numel() * source.element_size()
    return GpuCase({OURS: run}, check, "copy", num_bytes, _COPY_85)


def _merge(clock: Clock, tiny: bool, backend: str) -> GpuCase:
    shape = (5, 4, 2, 32) if tiny else (4096, 4, 32, 128)
    values, lse = torch.randn(shape, device=clock.device), torch.randn(shape[:3], device=clock.device)

    def run(i: int) -> object:
        return pagedkv.merge_states(values, lse, backend=backend)

    def check() -> None:
        merged = pagedkv.merge_states(values, lse, backend=backend).out
        weights = torch.softmax(lse.double(), 1)[..., None]
        error = float((merged.double() - (values.double() * weights).sum(1)).abs().max())
        if not error <= 1e-5:
            raise WrongResultError(f"off by {error:.3g}, allowed are 1e-5")

    return GpuCase({OURS: run}, check, "read", values.numel() * values.element_size())


def _graph(clock: Clock, tiny: bool, backend: str, *, shape: GpuShape) -> GpuCase:
    """A step of four layers, each a store and a decode: replayed as a graph, and the same launches in a queue."""
    batch = GpuBatch(shape.tiny() if tiny else shape, clock.device, backend)
    last = batch.rows[:, -1] * batch.shape.page_size + (batch.shape.kv_len - 1) % batch.shape.page_size
    new = [batch.query[:, : batch.shape.num_kv_heads].clone() for _ in range(2)]

    def step() -> None:
        for _ in range(4):
            pagedkv.store_kv(*new, batch.key, batch.value, last, backend=backend)
            batch.run(0)

    replay = clock.captured(step)

    def check() -> None:
        step()
        expected = batch.out.clone()
        batch.out.fill_(torch.nan)
        replay()
        _check_equal(batch.out, expected)

    def kernels_alone() -> str:
        # The last: a profiler that was once on may leave launches slower.
        alone = clock.kernels_ms(step)
        return (
            "the profiler sees no kernels" if alone is None else f"the kernels alone, by the profiler: {alone:.4f} ms"
        )

    target = Target("the same launches, queued", 1.0, "no slower than the kernels in a queue")
    contenders: dict[str, Run] = {OURS: lambda i: replay(), "the same launches, queued": lambda i: step()}
    return GpuCase(contenders, check, target=target, notes=(kernels_alone,))


def _plan(clock: Clock, tiny: bool, backend: str, *, shape: GpuShape) -> Host:
    batch = GpuBatch(shape.tiny() if tiny else shape, clock.device, backend)

    def eager_call() -> object:
        return batch.run(0)

    return Host({OURS: batch.make_plan, "one decode, with its launches and the wait": eager_call})


def _check_equal(given: torch.Tensor, expected: torch.Tensor) -> None:
    if given.shape != expected.shape or not torch.equal(given, expected):
        raise WrongResultError("the elements are not those expected")
