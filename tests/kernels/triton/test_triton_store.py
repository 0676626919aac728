"""store_kv on the Triton back end: what the conformance cases do not reach by themselves."""

from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder

import pagedkv
from pagedkv.kernels.triton import move_kernel, runtime, shared_slots, store_kv
from pagedkv.kernels.triton.move_kernel import Form, tile_of, vector_bytes
from pagedkv.kernels.triton.runtime import IS_INTERPRETED
from pagedkv.testing.bits import same_bits
from pagedkv.testing.conformance import ConformanceCase
from pagedkv.testing.conformance.bit_patterns import bit_patterns
from pagedkv.testing.conformance.judge import moves_as_reference, placed
from pagedkv.testing.page_views import kv_page_views

DEVICE = "cpu" if IS_INTERPRETED else "cuda"
F32, F16, BF16, I8, E4M3 = torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def no_plans():
    """Constants that decide how tokens are stored are changed here; what was decided is kept otherwise."""
    yield
    forget_plans()


def forget_plans():
    store_kv._plan_to_move.cache_clear()
    store_kv._plan_to_quantize.cache_clear()


def assert_as_reference(make, name="store"):
    ConformanceCase("store_kv", name, moves_as_reference(pagedkv.store_kv, make))("triton", DEVICE)


def arguments(
    slots, *, num_pages=12, page_size=16, heads=3, dims=(64, 64), dtype=BF16, to=None, layout="NHD", form="separate"
):
    """A call with any bits in tokens and pages, and, to quantise, any scales."""
    shape = {"num_pages": num_pages, "page_size": page_size, "num_kv_heads": heads, "dtype": to or dtype}
    pages = kv_page_views(form, layout, **shape, head_dim=dims[0], value_dim=dims[1])
    for view in pages:
        view.copy_(bit_patterns(*view.shape, dtype=view.dtype))
    fill = partial(bit_patterns, dtype=dtype) if to is None else lambda *shape: torch.randn(shape).to(dtype)
    tokens = [fill(len(slots), heads, dim) for dim in dims]
    call = dict(zip(("key", "value", "key_pages", "value_pages"), (*tokens, *pages), strict=True))
    if to is not None:
        scales = torch.randn(2, num_pages, page_size, heads).transpose(2, 3)
        call |= {"key_scales": scales[0], "value_scales": scales[1]}
    return {**call, "slot_mapping": slots, "layout": layout}


def repeated_slots(num_tokens, num_slots):
    return lambda: torch.randint(-2, num_slots, (num_tokens,))


@pytest.fixture(params=["first", "last"] if IS_INTERPRETED else ["any"])
def first_program(request, monkeypatch):
    """Which program begins: interpreted ones run one by one, in either order; those of a GPU in any."""
    if request.param == "last":
        set_index = InterpreterBuilder.set_grid_idx

        def set_index_from_the_end(self, x, y, z):
            set_index(self, self.grid_dim[0] - 1 - x, y, z)

        monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", set_index_from_the_end)


@pytest.mark.parametrize("num_tokens, layout", [(100, "NHD"), (100, "HND"), (1024, "NHD"), (1025, "HND")])
def test_the_last_of_the_tokens_of_a_slot_wins(num_tokens, layout, first_program):
    assert_as_reference(lambda: arguments(repeated_slots(num_tokens, 150)(), heads=2, dims=(40, 8), layout=layout))


@pytest.mark.parametrize("num_tokens", [150, 1100])
def test_the_last_of_the_tokens_of_a_slot_is_quantised(num_tokens, first_program):
    assert_as_reference(lambda: arguments(repeated_slots(num_tokens, 150)(), heads=2, dims=(72, 24), to=I8))


@pytest.mark.parametrize("to", [None, I8, E4M3])
@pytest.mark.parametrize("num_claims", [1, 8, 256])
def test_slots_that_share_a_claim_are_told_apart(num_claims, to, monkeypatch):
    monkeypatch.setattr(shared_slots, "_MOST_THAT_LOOK_AHEAD", 20)
    monkeypatch.setattr(shared_slots, "_MOST_CLAIMS", num_claims)
    assert_as_reference(lambda: arguments(repeated_slots(90, 80)(), to=to, dims=(40, 24)))


@pytest.mark.parametrize("to", [None, I8])
def test_shared_slots_are_set_right_whichever_token_was_there_last(to, monkeypatch):
    """Programs run in any order: of the tokens of a slot, one left its number and others parts of their numbers."""
    monkeypatch.setattr(shared_slots, "_MOST_THAT_LOOK_AHEAD", 20)
    slots = torch.randint(-1, 40, (90,))
    call = arguments(slots, dims=(40, 24), to=to)
    expected, actual = placed(call, torch.device("cpu")), placed(call, torch.device(DEVICE))
    pagedkv.store_kv(**expected, backend="reference")
    names = ("key", "key_pages", "key_scales"), ("value", "value_pages", "value_scales")
    sides = [store_kv._Side(*(actual.get(name) for name in of)) for of in names]
    first, second = store_kv._launches(sides, actual["slot_mapping"], num_multiprocessors=4, has_e4m3=False)
    first.run(sides[0].pages)
    for slot in slots.unique().tolist():
        of_slot = (slots == slot).nonzero()[:, 0]
        if slot < 0 or len(of_slot) == 1:
            continue
        first.tensors["Claims"][slot] = of_slot[torch.randint(len(of_slot), ())]
        for pages in (sides[0].pages, sides[1].pages):
            pages[slot // 16, slot % 16].view(torch.uint8).fill_(77)
    second.run(sides[0].pages)
    for name in ("key_pages", "value_pages", *(["key_scales", "value_scales"] if to else [])):
        assert same_bits(actual[name].cpu(), expected[name]), name


def test_where_no_slot_is_shared_the_second_launch_writes_nothing(monkeypatch):
    monkeypatch.setattr(shared_slots, "_MOST_THAT_LOOK_AHEAD", 20)
    actual = placed(arguments(torch.randperm(192)[:90]), torch.device(DEVICE))
    sides = [store_kv._Side(actual[name], actual[f"{name}_pages"], None) for name in ("key", "value")]
    first, second = store_kv._launches(sides, actual["slot_mapping"], num_multiprocessors=4, has_e4m3=False)
    first.run(sides[0].pages)
    for side in sides:
        side.tokens.view(torch.int16).fill_(0x5555)
    after = [side.pages.clone() for side in sides]
    second.run(sides[0].pages)
    assert all(same_bits(side.pages, pages) for side, pages in zip(sides, after, strict=True))


@triton.jit(do_not_specialize=["num_tokens"])
def look_for(Slots, Last, Is_last, num_tokens, ROWS: tl.constexpr, SCAN: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * ROWS
    token = first + tl.arange(0, ROWS)
    exists = token < num_tokens
    slot = tl.load(Slots + token, mask=exists, other=-1)
    last = shared_slots.last_with(Slots, slot, token, slot > 0, num_tokens, SCAN)
    is_last = shared_slots.is_last(Slots, slot, first, num_tokens, SCAN)
    tl.store(Last + token, last, mask=exists)
    tl.store(Is_last + token, is_last.to(tl.int64), mask=exists)


@triton.jit(do_not_specialize=["num_tokens", "sought"])
def find_last(Slots, Last, num_tokens, sought, ROWS: tl.constexpr, SCAN: tl.constexpr):
    token = tl.arange(0, ROWS).to(tl.int64)
    slot = tl.load(Slots + token)
    tl.store(Last + token, shared_slots.last_with(Slots, slot, token, slot == sought, num_tokens, SCAN))


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 130])
@pytest.mark.parametrize("num_slots", [1, 2, 40, 2**33])
def test_the_last_token_of_a_slot_is_found_and_none_beyond_the_call(num_tokens, num_slots):
    """Slots up to 0 are not looked for: of those tokens nothing is read, wherever a search would have ended."""
    slots = torch.randint(-2, num_slots, (num_tokens,), device=DEVICE)
    # Of the large ones, some that agree in their lower halves.
    slots[: num_tokens // 2] = slots[num_tokens // 2 : num_tokens // 2 * 2] % 2**32
    found, is_last = torch.full((2, num_tokens), -7, device=DEVICE)
    look_for[(-(-num_tokens // 8),)](slots, found, is_last, num_tokens, 8, 16)
    last = {slot: token for token, slot in enumerate(slots.tolist())}
    for token, slot in enumerate(slots.tolist()):
        assert found[token] == (last[slot] if slot > 0 else token)
        if slot >= 0:
            assert is_last[token] == (last[slot] == token)


@pytest.mark.skipif(not IS_INTERPRETED, reason="only the interpreter can be watched")
@pytest.mark.parametrize(
    "sought, last, num_steps",
    [(0, [0, 1, 2, 3, 4, 5, 6, 7], 0), (1, [1023, 1, 2, 1023, 4, 5, 1023, 7], 1), (3, [0, 2, 2, 3, 4, 5, 6, 7], 64)],
    ids=["no-token", "padding", "the-second-and-third"],
)
def test_the_last_token_is_looked_for_from_the_end(sought, last, num_steps, monkeypatch):
    slots = torch.arange(2, 1026)
    slots[::3] = slots[1020:] = 1
    slots[7], slots[2] = 9, slots[1]
    steps, load = [], InterpreterBuilder.create_masked_load

    def counted_load(self, pointers, *rest):
        if pointers.data.shape == (16,):
            steps.append(pointers)
        return load(self, pointers, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
    found = torch.full((8,), -7)
    find_last[(1,)](slots, found, 1024, sought, 8, 16)
    assert found.tolist() == last
    assert len(steps) == num_steps


@pytest.mark.parametrize("num_tokens", [30, 1100])
@pytest.mark.parametrize("to", [None, E4M3])
def test_slots_out_of_range_that_are_not_refused_are_skipped(num_tokens, to, monkeypatch):
    monkeypatch.setattr(runtime, "checks_bounds", lambda: False)
    call = arguments(torch.randint(-2, 192, (num_tokens,)), dims=(16, 16), to=to)
    is_wild = torch.rand(num_tokens) < 0.3
    wild = torch.tensor([192, 193, 2**31 + 3, 2**32 + 5, 2**40, 2**62])[torch.randint(6, (num_tokens,))]
    expected, actual = placed(call, torch.device("cpu")), placed(call, torch.device(DEVICE))
    expected["slot_mapping"] = call["slot_mapping"].masked_fill(is_wild, -1)
    actual["slot_mapping"] = torch.where(is_wild, wild, call["slot_mapping"]).to(DEVICE)
    pagedkv.store_kv(**expected, backend="reference")
    pagedkv.store_kv(**actual, backend="triton")
    for name in ("key_pages", "value_pages"):
        assert same_bits(actual[name].cpu(), expected[name])


def test_slots_out_of_range_are_refused_by_request(monkeypatch):
    monkeypatch.setenv("PAGEDKV_DEBUG", "1")
    call = placed(arguments(torch.tensor([0, 192, 5])), torch.device(DEVICE))
    with pytest.raises(ValueError, match=r"slot_mapping must be below 192 \(N \* P slots\), got 192 at entry 1\."):
        pagedkv.store_kv(**call, backend="triton")


# Elements before the first one, the width of a head, and the bytes of a vector that follow for bfloat16.
ALIGNMENTS = [(0, 16, 16), (8, 16, 16), (4, 16, 8), (2, 16, 4), (1, 16, 2), (0, 20, 8), (0, 18, 4), (0, 7, 2)]


@pytest.mark.parametrize("which", ["tokens", "pages", "both"])
@pytest.mark.parametrize("offset, dim, num_bytes", ALIGNMENTS, ids=str)
def test_vectors_are_as_wide_as_addresses_and_widths_allow(offset, dim, num_bytes, which):
    def shifted(shape, is_shifted):
        skip = offset if is_shifted else 0
        return bit_patterns(shape.numel() + skip, dtype=BF16)[skip:].view(shape)

    call = arguments(torch.randperm(24)[:21], num_pages=6, page_size=4, dims=(dim, dim))
    for name in ("key", "value", "key_pages", "value_pages"):
        call[name] = shifted(call[name].shape, which == "both" or ("pages" in name) == (which == "pages"))
    forms = [Form.of(call[name]) for name in ("key", "value", "key_pages", "value_pages")]
    assert vector_bytes(*forms) == num_bytes
    assert_as_reference(lambda: call)


def test_strides_decide_over_the_width_of_vectors_and_those_of_single_entries_do_not():
    def width(*strides, shape=(4, 3, 8)):
        return vector_bytes(Form(torch.Size(shape), (*strides, 1), 2, 0))

    assert width(24, 8) == 16
    assert width(28, 8) == 8
    assert width(27, 8) == 2
    assert width(27, 8, shape=(1, 3, 8)) == 16
    assert width(32, 2) == 4


@pytest.mark.parametrize("heads, dims", [(1, (576, 512)), (1, (512, 64)), (40, (128, 128)), (5, (0, 24)), (5, (24, 0))])
def test_rows_of_more_and_of_fewer_vectors_than_a_tile(heads, dims):
    assert_as_reference(lambda: arguments(repeated_slots(37, 192)(), heads=heads, dims=dims, dtype=F16, layout="HND"))


@pytest.mark.parametrize("num_tokens, dims, most_programs", [(256, 128, 1024), (16384, 128, 8192), (64, 576, 2048)])
def test_tiles_keep_a_large_device_busy_and_few_lanes_idle(num_tokens, dims, most_programs, monkeypatch):
    monkeypatch.setattr(move_kernel, "_TILE", 512)
    monkeypatch.setattr(move_kernel, "_SMALL_TILE", 128)
    width = 8 * dims * 2 // 16
    tile = tile_of(num_tokens, [width, width], 16, 132)
    num_chunks = -(-width // tile.vectors[0])
    assert 132 <= 2 * num_chunks * -(-num_tokens // tile.rows) <= most_programs
    assert 8 * num_chunks * tile.vectors[0] <= 9 * width


@pytest.mark.parametrize("num_tokens, dtype", [(20, F32), (20, F16), (1100, BF16)])
def test_float8_codes_by_the_instruction_are_those_made_of_bits(num_tokens, dtype, monkeypatch):
    monkeypatch.setattr(runtime, "has_e4m3", lambda target: IS_INTERPRETED)
    assert_as_reference(
        lambda: arguments(repeated_slots(num_tokens, 192)(), heads=2, dims=(24, 36), dtype=dtype, to=E4M3)
    )


def test_tokens_of_two_dtypes_are_quantised_in_one_launch():
    call = arguments(torch.randperm(192)[:50], to=I8, dims=(40, 128), layout="HND")
    call["value"] = call["value"].float()
    assert_as_reference(lambda: call)


@pytest.mark.parametrize("step", [1, -1])
def test_tokens_that_lie_in_the_pages_count_as_before_the_call(step):
    """Each slot takes what its neighbour held, across all programs."""

    def make():
        call = arguments(torch.arange(1, 151) + step)
        return {**call, **{name: call[f"{name}_pages"].flatten(0, 1)[1:151] for name in ("key", "value")}}

    assert_as_reference(make)


def test_tokens_that_lie_in_the_scales_count_as_before_the_call():
    def make():
        memory = torch.randn(2, 8, 1, 4)
        scales = memory[0, :, 0, 0].view(8, 1, 1), memory[1, :, 0, 1].view(8, 1, 1)
        pages = torch.zeros(2, 8, 1, 1, 4, dtype=I8)
        call = {"key": memory[0], "value": memory[1], "key_pages": pages[0], "value_pages": pages[1]}
        return {**call, "slot_mapping": torch.arange(8).flip(0), "key_scales": scales[0], "value_scales": scales[1]}

    assert_as_reference(make)


@pytest.mark.parametrize("num_tokens, num_pages, dims", [(0, 4, (8, 8)), (3, 0, (8, 8)), (3, 4, (0, 0))])
def test_nothing_is_launched_for_nothing(num_tokens, num_pages, dims):
    call = arguments(torch.full((num_tokens,), -1), num_pages=num_pages, dims=dims)
    sides = [store_kv._Side(call[name], call[f"{name}_pages"], None) for name in ("key", "value")]
    assert not store_kv._launches(sides, call["slot_mapping"], num_multiprocessors=4, has_e4m3=False)
    assert_as_reference(lambda: call)


def test_heads_of_no_width_are_quantised_to_a_scale_alone():
    assert_as_reference(lambda: arguments(torch.tensor([3, -1, 40]), dims=(0, 4), to=I8))


def test_pages_are_marked_as_written():
    call = placed(arguments(torch.tensor([3])), torch.device(DEVICE))
    before = call["key_pages"]._version, call["value_pages"]._version
    pagedkv.store_kv(**call, backend="triton")
    assert call["key_pages"]._version > before[0]
    assert call["value_pages"]._version > before[1]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_addresses_are_of_64_bits(axis, tmp_path):
    """Of pages whose `axis` has entries 2**31 elements apart; on a CPU, what is not touched takes no memory."""
    shape, strides, run = (3, 4, 2, 8), [0] * 4, 1
    for at in reversed(range(4)):
        strides[at] = 2**31 + 64 if at == axis else run
        run *= 1 if at == axis else shape[at]
    num_elements = shape[axis] * (2**31 + 64)
    if IS_INTERPRETED:
        memory = torch.from_file(str(tmp_path / "memory"), shared=True, size=num_elements, dtype=F16)
        (tmp_path / "memory").unlink()
    else:
        memory = torch.zeros(num_elements, dtype=F16, device=DEVICE)
    far, near = memory.as_strided(shape, strides), torch.zeros(2, *shape, dtype=F16, device=DEVICE)
    tokens, slots = torch.randn(2, 5, 2, 8).half().to(DEVICE), torch.tensor([11, 0, 7, -1, 8]).to(DEVICE)
    pagedkv.store_kv(*tokens, far, near[1], slots, backend="triton")
    pagedkv.store_kv(*tokens, near[0], near[1], slots, backend="reference")
    assert same_bits(far.cpu(), near[0].cpu())
    read, _ = pagedkv.gather_kv(far, near[1], slots, backend="triton")
    assert same_bits(read.cpu(), pagedkv.gather_kv(*near, slots, backend="reference")[0].cpu())
