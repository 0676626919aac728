import math

import pytest
import torch

import pagedkv
from pagedkv import Llama31Scaling, RotaryEmbedding
from pagedkv.kernels.rope import cos_sin_table
from pagedkv.testing.numeric import assert_close_to_oracle, rope_oracle

LLAMA31 = Llama31Scaling(low_freq_factor=1.0, high_freq_factor=4.0, old_context_len=8192, factor=8.0)

ROPES = {
    "half": RotaryEmbedding(64),
    "interleaved": RotaryEmbedding(64, interleaved=True),
    "partial": RotaryEmbedding(24, theta=500.0),
    "partial-interleaved": RotaryEmbedding(2, interleaved=True),
    "scaled": RotaryEmbedding(64, scale=4.0),
    "llama31": RotaryEmbedding(64, theta=500000.0, llama31=LLAMA31),
    "llama31-scaled-interleaved": RotaryEmbedding(64, 500000, 2.0, True, LLAMA31),
}


@pytest.fixture(params=ROPES)
def rope(request):
    return ROPES[request.param]


def assert_rotated(actual, x, positions, rope):
    exact = rope_oracle(x, positions, rope)
    assert_close_to_oracle("x", actual, exact, rope_oracle(x, positions, rope, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rotation_is_as_exact_as_torch(rope, dtype):
    x, positions = torch.randn(37, 3, 72).to(dtype), torch.randint(-5000, 150000, (37,))
    rotated = pagedkv.apply_rope(x, positions, rope, backend="reference")
    assert (rotated.dtype, rotated.shape) == (dtype, x.shape)
    assert torch.equal(rotated[..., rope.dim :], x[..., rope.dim :])
    assert_rotated(rotated, x, positions, rope)


def test_positions_may_be_any_int64():
    x, rope = torch.randn(3, 1, 8), RotaryEmbedding(8)
    positions = torch.tensor([2**40, -(2**40), 0])
    rotated = pagedkv.apply_rope(x, positions, rope)
    assert_rotated(rotated, x, positions, rope)
    assert torch.equal(rotated[2], x[2])


def test_a_dot_product_depends_on_the_distance_alone(rope):
    query, key = torch.randn(2, 1, 1, 64, dtype=torch.float64)
    dots = [
        (rope_oracle(query, torch.tensor([at]), rope) * rope_oracle(key, torch.tensor([at - 7]), rope)).sum()
        for at in (0, 3, 1000)
    ]
    # In float64 they differ by its rounding, far below that of float32.
    assert max(dots) - min(dots) < torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    "theta, llama31", [(10000.0, None), (500000.0, LLAMA31), (10000.0, Llama31Scaling(2, 3, 50, 7))]
)
def test_frequencies_are_those_of_transformers(theta, llama31):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_type": "linear", "rope_theta": theta, "factor": 3.0}
    rope = RotaryEmbedding(96, theta, scale=3.0)
    if llama31 is not None:
        rope = RotaryEmbedding(96, theta, llama31=llama31)
        parameters = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": float(llama31.factor),
            "low_freq_factor": float(llama31.low_freq_factor),
            "high_freq_factor": float(llama31.high_freq_factor),
            "original_max_position_embeddings": llama31.old_context_len,
        }
    config = LlamaConfig(
        head_dim=96, hidden_size=192, num_attention_heads=2, max_position_embeddings=131072, rope_parameters=parameters
    )
    theirs, _ = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")
    # Theirs is float32 throughout: a power's exponent is rounded, which ln(theta) makes a relative error of the power.
    relative = torch.finfo(torch.float32).eps * (math.log(theta) + 4)
    ours = rope.inverse_frequencies()
    assert ours.dtype == torch.float64
    assert ((theirs.double() - ours).abs() <= relative * ours).all()


def test_llama31_keeps_fast_frequencies_and_divides_slow_ones():
    plain = RotaryEmbedding(128, 500000.0).inverse_frequencies()
    ratio = plain / RotaryEmbedding(128, 500000.0, llama31=LLAMA31).inverse_frequencies()
    assert ratio[0] == 1
    assert ratio[-1] == LLAMA31.factor
    assert (ratio.diff() >= 0).all()
    assert ((ratio > 1) & (ratio < LLAMA31.factor)).any()


def test_rotation_of_no_tokens_and_no_heads():
    rope = RotaryEmbedding(8)
    for shape in ((0, 3, 8), (3, 0, 8)):
        positions = torch.arange(shape[0])
        assert pagedkv.apply_rope(torch.empty(shape), positions, rope).shape == shape


def test_strides_are_honoured_and_nothing_is_written():
    wide = torch.randn(3, 9, 70)
    x, positions, rope = wide[:, 1:8:2, 3:67].transpose(0, 1), torch.arange(8).repeat_interleave(2)[::4], ROPES["half"]
    before = wide.clone()
    rotated = pagedkv.apply_rope(x, positions, rope)
    assert rotated.is_contiguous()
    assert torch.equal(rotated, pagedkv.apply_rope(x.contiguous(), positions.contiguous(), rope))
    assert torch.equal(wide, before)


def test_table_holds_what_positions_are_turned_by(rope):
    table = cos_sin_table(rope, 37)
    assert (table.shape, table.dtype) == ((37, rope.dim // 2, 2), torch.float32)
    assert table.is_contiguous()
    angles = torch.arange(37.0, dtype=torch.float64)[:, None] * rope.inverse_frequencies()
    assert torch.equal(table, torch.stack((angles.cos(), angles.sin()), -1).float())


def test_a_growing_table_is_made_anew_at_powers_of_two_alone():
    rope = RotaryEmbedding(8, theta=123.0)
    starts = {num_positions: cos_sin_table(rope, num_positions).data_ptr() for num_positions in range(65, 130)}
    assert len({starts[n] for n in range(65, 129)}) == 1
    assert starts[129] != starts[128]
    assert cos_sin_table(rope, 0).shape == (0, 4, 2)
    assert cos_sin_table(rope, 1).shape == (1, 4, 2)


def test_table_of_inference_mode_serves_autograd():
    rope = RotaryEmbedding(8, theta=321.0)
    with torch.inference_mode():
        cos_sin_table(rope, 5)
    assert not cos_sin_table(rope, 5).is_inference()


@pytest.mark.parametrize("name", ROPES)
def test_pack_keeps_every_field(name):
    assert RotaryEmbedding.unpack(ROPES[name].pack()) == ROPES[name]


@pytest.mark.parametrize(
    "fields, error, words",
    [
        ({"dim": 7}, ValueError, "dim must be even, got 7"),
        ({"dim": 0}, ValueError, "dim must be at least 2, got 0"),
        ({"dim": 8.0}, TypeError, "dim must be an int, got float"),
        ({"theta": 0.0}, ValueError, "theta must be finite and positive, got 0.0"),
        ({"theta": "x"}, TypeError, "theta must be a number, got str"),
        ({"scale": math.inf}, ValueError, "scale must be finite and positive, got inf"),
        ({"scale": 10**400}, ValueError, "scale must be finite and positive, got 1000"),
        ({"interleaved": 1}, TypeError, "interleaved must be a bool, got int"),
        ({"llama31": 8.0}, TypeError, "llama31 must be a Llama31Scaling or None, got float"),
    ],
)
def test_unusable_fields_are_refused(fields, error, words):
    with pytest.raises(error, match=words):
        RotaryEmbedding(**{"dim": 8, **fields})


@pytest.mark.parametrize(
    "fields, error, words",
    [
        ({"factor": -1.0}, ValueError, "factor must be finite and positive, got -1"),
        ({"low_freq_factor": math.nan}, ValueError, "low_freq_factor must be finite and positive, got nan"),
        ({"high_freq_factor": 1.0}, ValueError, "high_freq_factor must be above low_freq_factor = 1.0, got 1.0"),
        ({"old_context_len": 0}, ValueError, "old_context_len must be at least 1, got 0"),
        ({"old_context_len": 1.5}, TypeError, "old_context_len must be an int, got float"),
    ],
)
def test_unusable_scaling_is_refused(fields, error, words):
    with pytest.raises(error, match=words):
        Llama31Scaling(**fields)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"x": torch.zeros(4, 8)}, ValueError, r"x must have shape \[T, H, D\], got \[4, 8\]"),
        (
            {"x": torch.zeros(4, 2, 8).double()},
            TypeError,
            "x must have dtype float32 or float16 or bfloat16, got float64",
        ),
        ({"x": torch.zeros(4, 2, 16)[..., ::2]}, ValueError, "x must have a contiguous last dimension"),
        ({"x": torch.zeros(4, 2, 6)}, ValueError, r"rope\.dim must be at most 6 \(D of x\), got 8"),
        ({"positions": torch.zeros(3).long()}, ValueError, r"positions must have shape \[T\] with T = 4 \(set by x\)"),
        ({"positions": torch.zeros(4).int()}, TypeError, "positions must have dtype int64, got int32"),
        ({"positions": torch.zeros(4).long().to("meta")}, ValueError, "positions must be on cpu like x, got meta"),
        ({"rope": 10000.0}, TypeError, "rope must be a RotaryEmbedding, got float"),
        ({"x": torch.zeros(4, 2, 8, requires_grad=True)}, ValueError, "x must not require a gradient"),
        ({"backend": "abacus"}, ValueError, "backend must be 'auto' or one of"),
    ],
)
def test_misuse_is_refused(change, error, words):
    arguments = {"x": torch.zeros(4, 2, 8), "positions": torch.arange(4), "rope": RotaryEmbedding(8)}
    with pytest.raises(error, match=words):
        pagedkv.apply_rope(**{**arguments, **change})


def test_table_refuses_a_negative_number_of_positions():
    with pytest.raises(ValueError, match="num_positions must be at least 0, got -1"):
        cos_sin_table(RotaryEmbedding(8), -1)


def test_opcheck():
    arguments = torch.randn(5, 2, 64), torch.arange(-2, 3), ROPES["llama31"].pack(), "auto"
    torch.library.opcheck(torch.ops.pagedkv.apply_rope, arguments)


def test_compiled_call_gives_the_same_bits(rope):
    x, positions = torch.randn(5, 2, 64), torch.arange(-2, 3)
    compiled = torch.compile(pagedkv.apply_rope, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, positions, rope), pagedkv.apply_rope(x, positions, rope))
