"""apply_rope and rope_store_kv in Triton: angles, tiles, and slots that several tokens share."""

import math
import mmap
from fractions import Fraction

import pytest
import torch

import pagedkv
from pagedkv import RotaryEmbedding
from pagedkv.kernels.triton import rope as rope_file
from pagedkv.kernels.triton import rope_store_kv as fused_file
from pagedkv.kernels.triton import runtime, shared_slots
from pagedkv.testing.bits import same_bits, storage_bytes

ROPES = {
    "half": RotaryEmbedding(64),
    "interleaved": RotaryEmbedding(64, interleaved=True),
    "partial": RotaryEmbedding(22, theta=500.0),
    "partial-interleaved": RotaryEmbedding(22, theta=500.0, interleaved=True),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# To 80 digits, as the angles of far positions need.
PI = Fraction(31415926535897932384626433832795028841971693993751058209749445923078164062862089, 10**79)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of few tokens, so that a small call takes many programs, each of some heads."""
    monkeypatch.setattr(rope_file, "_TILE", 128)
    monkeypatch.setattr(rope_file, "_MANY_TOKENS", 32)


@pytest.fixture
def few_that_look_ahead(monkeypatch):
    """Calls as of many tokens: claims, and a second launch."""
    monkeypatch.setattr(shared_slots, "_MOST_THAT_LOOK_AHEAD", 4)


def turned(x, positions, rope, backend="triton"):
    return pagedkv.apply_rope(x, positions, rope, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROPES)
def test_rows_have_the_bits_of_the_reference_where_its_angles_are_exact_enough(name, dtype, small_tiles):
    x, positions = torch.randn(50, 5, 72).to(dtype), torch.randint(-1000, 1000, (50,))
    x[1], x[2], positions[3] = 0.0, -0.0, 0
    assert same_bits(turned(x, positions, ROPES[name]), turned(x, positions, ROPES[name], "reference"))


@pytest.mark.parametrize("position", [2**31 - 1, -(2**31) - 3, 10**15 + 7, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("rope", [RotaryEmbedding(8), RotaryEmbedding(8, theta=0.01, scale=1e-3)], ids=["slow", "fast"])
def test_angles_are_exact_at_any_position(position, rope):
    # The reference rounds such angles to float64, which is more than a turn at the last of these.
    x = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]).view(1, 1, 8)
    result = turned(x, torch.tensor([position]), rope)[0, 0].tolist()
    for pair, frequency in enumerate(rope.inverse_frequencies().tolist()):
        angle = float(position * Fraction(frequency) % (2 * PI))
        # 2**-64 of a turn a position, and the rounding of the cosine.
        allowed = math.pi * abs(position) / 2**64 + torch.finfo(torch.float32).eps
        assert abs(result[pair] - math.cos(angle)) <= allowed
        assert abs(result[pair + 4] - math.sin(angle)) <= allowed


def test_every_eighth_of_a_turn_falls_in_the_right_quarter():
    # One pair, turned by exactly an eighth of a turn a position: whole quarters are exact.
    rope = RotaryEmbedding(2)
    eighth = torch.tensor([2**61])
    x, positions = torch.tensor([3.0, 5.0]).expand(33, 1, 2).contiguous(), torch.arange(-16, 17)
    result = torch.empty(33, 1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rope_file, "turns_of_pairs", lambda rope, device: eighth)
        rope_file.apply_rope(x, positions, rope, result)
    half = 0.5**0.5
    for position, (first, second) in zip(positions.tolist(), result[:, 0].tolist(), strict=True):
        cos, sin = [(1, 0), (half, half), (0, 1), (-half, half), (-1, 0), (-half, -half), (0, -1), (half, -half)][
            position % 8
        ]
        expected = 3 * cos - 5 * sin, 5 * cos + 3 * sin
        if position % 2 == 0:
            assert (first, second) == expected
        else:
            assert abs(first - expected[0]) + abs(second - expected[1]) < 8 * torch.finfo(torch.float32).eps


def test_tokens_2_to_the_31_elements_apart_are_found():
    between = torch.frombuffer(mmap.mmap(-1, 2 * (2**31 + 2048), flags=mmap.MAP_PRIVATE), dtype=torch.float16)
    rows = torch.randn(2, 2, 64).half()
    positions = torch.tensor([7, 9])
    for strides in ((2**31, 64, 1), (64, 2**31, 1)):
        x = between.as_strided((2, 2, 64), strides)
        x.copy_(rows)
        assert same_bits(turned(x, positions, ROPES["half"]), turned(rows, positions, ROPES["half"]))


class Launches:
    """In place of a kernel: notes the grids."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **options: None


def test_programs_lie_on_the_one_axis_of_a_grid_that_holds_more_than_65535(monkeypatch):
    launches = Launches()
    monkeypatch.setattr(rope_file, "_apply_rope_kernel", launches)
    monkeypatch.setattr(fused_file, "rope_store_tokens", launches)
    monkeypatch.setattr(rope_file, "_TILE", 64)
    x, positions, rope = torch.zeros(1, 3, 128).expand(70_001, 3, 128), torch.arange(70_001), RotaryEmbedding(128)
    rope_file.apply_rope(x, positions, rope, torch.empty(1).expand(70_001, 3, 128))
    pages = torch.zeros(4, 1, 3, 128)
    fused_file.rope_store_kv(x, x, x, positions, rope, pages, pages.clone(), -positions - 1, None, None, x)
    assert launches.grids == [(70_001,)] * 3


def test_what_pairs_turn_is_copied_to_the_device_once():
    device = torch.device("cpu")
    first = rope_file.turns_of_pairs(ROPES["half"], device)
    # Nor does it go when other embeddings come: a captured graph reads it by its address.
    for theta in range(2, 22):
        rope_file.turns_of_pairs(RotaryEmbedding(2, theta=theta), device)
    assert rope_file.turns_of_pairs(RotaryEmbedding(64), device) is first
    assert first.dtype == torch.int64


def a_call(num_tokens, slots, dtype=torch.float32, codes=None, rope=ROPES["half"]):
    """Arguments of rope_store_kv on 20 slots, to pages of zeros."""
    pages = {"key_pages": torch.zeros(5, 4, 2, 72), "value_pages": torch.zeros(5, 4, 2, 24)}
    arguments = {
        "query": torch.randn(num_tokens, 3, 72).to(dtype),
        "key": torch.randn(num_tokens, 2, 72).to(dtype),
        "value": torch.randn(num_tokens, 2, 24).to(dtype),
        "positions": torch.randint(-1000, 1000, (num_tokens,)),
        "rope": rope,
        **{name: tensor.to(codes or dtype) for name, tensor in pages.items()},
        "slot_mapping": slots,
    }
    if codes is not None:
        arguments |= {name: torch.zeros(5, 2, 4) for name in ("key_scales", "value_scales")}
    return arguments


def assert_as_the_reference(arguments):
    expected = {name: t.clone() if isinstance(t, torch.Tensor) else t for name, t in arguments.items()}
    result = pagedkv.rope_store_kv(**arguments, backend="triton")
    assert same_bits(result, pagedkv.rope_store_kv(**expected, backend="reference"))
    for name, tensor in expected.items():
        if isinstance(tensor, torch.Tensor):
            assert same_bits(arguments[name], tensor), name


@pytest.mark.parametrize("codes", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("name", ROPES)
def test_rope_store_kv_in_many_programs_has_the_bits_of_the_reference(name, codes, small_tiles):
    arguments = a_call(50, torch.randint(-3, 20, (50,)), torch.bfloat16, codes, ROPES[name])
    arguments["key"][:4] = 0
    arguments["value"][3:, 1, 2] = math.inf
    if codes is not None:  # moved, a NaN keeps its bits; in torch it loses them in bfloat16
        arguments["key"][4:8, 0, 70] = math.nan
    assert_as_the_reference(arguments)


@pytest.mark.parametrize("num_claims", [1, 4, 2**22])
@pytest.mark.parametrize("slots", ["many-duplicates", "one-slot", "none"])
@pytest.mark.parametrize("codes", [None, torch.int8], ids=str)
def test_the_last_token_of_a_slot_wins_among_many(
    codes, slots, num_claims, small_tiles, few_that_look_ahead, monkeypatch
):
    monkeypatch.setattr(shared_slots, "_MOST_CLAIMS", num_claims)
    slot_mapping = {
        "many-duplicates": torch.randint(-3, 20, (60,)),
        "one-slot": torch.full((60,), 7),
        "none": torch.cat([torch.randperm(20), torch.full((40,), -1)]),
    }[slots]
    assert_as_the_reference(a_call(60, slot_mapping, codes=codes))


@pytest.mark.parametrize("num_tokens", [1025, 2049, 5000])
def test_one_slot_of_more_tokens_than_a_tile_has(num_tokens):
    x, positions = torch.randn(num_tokens, 1, 8), torch.arange(num_tokens)
    pages = torch.zeros(2, 1, 16, 1, 8)
    pagedkv.rope_store_kv(x, x, x, positions, RotaryEmbedding(8), *pages, positions * 0 + 5, backend="triton")
    assert torch.equal(pages[1, 0, 5], x[-1])


@pytest.mark.parametrize("stale", [-1, 0, 5, 10**6])
def test_whatever_claims_held_before_does_not_matter(stale, few_that_look_ahead, monkeypatch):
    class Torch:
        def __getattr__(self, name):
            return getattr(torch, name)

        def empty(self, *shape, **options):
            return torch.full(shape, stale, **options)

    monkeypatch.setattr(fused_file, "torch", Torch())
    assert_as_the_reference(a_call(8, torch.tensor([3, 9, 3, -1, 9, 0, 3, 1])))


@pytest.mark.parametrize("num_tokens", [3, 6])
def test_slots_beyond_the_pool_that_are_not_refused_are_skipped(num_tokens, few_that_look_ahead, monkeypatch):
    slots = torch.tensor([20, 3, 2**40, 2**32, 2**63 - 1, 4])[:num_tokens]
    arguments = a_call(num_tokens, slots)
    expected = {name: t.clone() if isinstance(t, torch.Tensor) else t for name, t in arguments.items()}
    expected["slot_mapping"] = torch.where(slots < 20, slots, -1)
    monkeypatch.setattr(runtime, "checks_bounds", lambda: False)
    around = storage_bytes(arguments["key_pages"]).numel()
    result = pagedkv.rope_store_kv(**arguments, backend="triton")
    assert same_bits(result, pagedkv.rope_store_kv(**expected, backend="reference"))
    assert same_bits(arguments["key_pages"], expected["key_pages"])
    assert same_bits(arguments["value_pages"], expected["value_pages"])
    assert around == arguments["key_pages"].numel() * 4


def test_pages_that_were_written_are_known_to_autograd():
    arguments = a_call(3, torch.tensor([0, 1, 2]), codes=torch.int8)
    before = {name: arguments[name]._version for name in ("key_pages", "value_pages", "key_scales", "value_scales")}
    pagedkv.rope_store_kv(**arguments, backend="triton")
    assert all(arguments[name]._version > version for name, version in before.items())


@pytest.mark.parametrize("head_dim", [2, 6, 40, 128, 576])
@pytest.mark.parametrize("num_tokens", [1, 3, 5])
def test_any_width_and_few_tokens(head_dim, num_tokens):
    x, positions = torch.randn(num_tokens, 3, head_dim), torch.arange(num_tokens) * 1000
    for dim in {2, head_dim // 4 * 2 or 2, head_dim}:
        for is_interleaved in (False, True):
            rope = RotaryEmbedding(dim, interleaved=is_interleaved)
            assert same_bits(turned(x, positions, rope), turned(x, positions, rope, "reference"))
