import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.report import results as numbers


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (numbers.three, 29.6512, "29.7"),
        (numbers.three, 0.031249, "0.0312"),
        (numbers.three, 9.996, "10.0"),
        (numbers.three, 1234.5, "1,230"),
        (numbers.three, -0.5, "−0.500"),
        (numbers.three, 0.0, "0"),
        (numbers.three, 1e-7, "1.00e−07"),
        (numbers.count, 1024, "1,024"),
        (numbers.count, 256.5, "256"),
        (numbers.count, 12.25, "12.2"),
        (numbers.size, 999, "999 B"),
        (numbers.size, 1000, "1.00 kB"),
        (numbers.size, 12_100_000, "12.1 MB"),
        (numbers.size, 999_900_000, "1.00 GB"),
        (numbers.size, 80e9, "80.0 GB"),
        (numbers.percent, 0.2537, "25.4 %"),
        (numbers.times, 4.0, "4.00×"),
        (numbers.amount, 134_515_008, "135 million"),
        (numbers.amount, 8_030_261_248, "8.03 billion"),
        (numbers.tick, 12.5, "12.5"),
        (numbers.tick, -2.0, "−2"),
        (numbers.tick, 1500.0, "1,500"),
    ],
)
def test_written(write, value, text):
    assert write(value) == text


@pytest.mark.parametrize(
    ("mean", "error", "text"),
    [
        (1.934, 0.6249, "+1.93 ± 0.62 %"),
        (47.31, 3.14, "+47.3 ± 3.1 %"),
        (-0.124, 0.0312, "−0.124 ± 0.031 %"),
        (0.001, 0.31, "0.00 ± 0.31 %"),
        (-0.001, 0.31, "0.00 ± 0.31 %"),
        (123.4, 45.6, "+123 ± 46 %"),
        (0.0, 0.0, "0 %"),
        (2.5, None, "+2.50 % (error not measured)"),
        (None, 0.1, "not measured"),
    ],
)
def test_differences_end_where_the_error_has_two_digits(mean, error, text):
    assert numbers.difference(mean, error, "%") == text


def test_a_median_stands_before_its_spread():
    assert numbers.middle(17.9, 18.31, 18.62) == "18.3 (17.9 to 18.6)"
    assert numbers.middle(None, 18.31, None) == "18.3"
    assert numbers.middle(1, None, 2) == "not measured"


@pytest.mark.parametrize("write", [numbers.three, numbers.count, numbers.size, numbers.percent, numbers.times])
def test_none_was_not_measured(write):
    assert write(None) == "not measured"


@given(st.floats(1e-4, 1e12))
def test_three_digits_are_exact(value):
    assert float(numbers.three(value).replace(",", "")) == pytest.approx(value, rel=0.00501)


@given(st.floats(1, 1e14))
def test_sizes_are_exact(value):
    number, unit = numbers.size(value).split()
    factor = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert float(number.replace(",", "")) * factor == pytest.approx(value, rel=0.00501)
