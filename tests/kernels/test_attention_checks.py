import math

import pytest
import torch

from pagedkv.kernels.attention_checks import as_float32, check_contiguous, check_no_overlap


def test_as_float32_rounds_to_what_kernels_compute_with():
    assert as_float32("x", 0.1) == torch.tensor(0.1).item()
    assert as_float32("x", 3) == 3.0
    assert as_float32("x", 1e-50) == 0.0


@pytest.mark.parametrize(
    "value, error, words",
    [
        ("1", TypeError, "x must be a number, got str"),
        (None, TypeError, "x must be a number, got NoneType"),
        (math.inf, ValueError, "x must be a finite float32, got inf"),
        (1e39, ValueError, r"x must be a finite float32, got 1e\+39"),
        (10**400, ValueError, "x must be a finite float32, got 1000"),
    ],
)
def test_as_float32_refuses_what_is_no_finite_number_there(value, error, words):
    with pytest.raises(error, match=words):
        as_float32("x", value)


def test_results_must_be_flat():
    check_contiguous("out", torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"out must be contiguous, got strides \[1, 3\]"):
        check_contiguous("out", torch.zeros(2, 3).T)
    with pytest.raises(ValueError, match="out must hold its values as they are, got a negated view"):
        check_contiguous("out", torch._neg_view(torch.zeros(3)))


def test_neighbours_in_one_buffer_do_not_overlap():
    buffer = torch.zeros(30)
    inputs = {"before": buffer[:10].view(2, 5), "after": buffer[20:].view(5, 2).T, "missing": None}
    check_no_overlap("out", buffer[10:20], **inputs)


@pytest.mark.parametrize("first, last", [(19, 30), (0, 11), (0, 30), (12, 13), (10, 20)])
def test_one_shared_element_is_an_overlap(first, last):
    buffer = torch.zeros(30)
    with pytest.raises(ValueError, match="out must not overlap query, got memory that both use"):
        check_no_overlap("out", buffer[10:20], query=buffer[first:last])


def test_the_range_of_a_strided_input_counts_and_its_end_is_exact():
    buffer = torch.zeros(4, 10)
    columns = buffer[:3, :4]  # ends 4 elements into row 2
    check_no_overlap("out", buffer.flatten()[24:], columns=columns)
    with pytest.raises(ValueError, match="out must not overlap columns"):
        check_no_overlap("out", buffer.flatten()[23:], columns=columns)


def test_what_holds_no_element_overlaps_nothing():
    buffer = torch.zeros(10)
    check_no_overlap("out", buffer[5:5], query=buffer)
    check_no_overlap("out", buffer, query=buffer[5:5])
