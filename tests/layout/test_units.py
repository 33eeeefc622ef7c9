"""Amounts as people write them."""

import pytest

from kvfold.layout.planner import parse_count, parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("80GB", 80 * 10**9),
        ("80 gb", 80 * 10**9),
        ("16GiB", 16 * 2**30),
        ("0.5MiB", 2**19),
        ("1.5kB", 1500),
        ("2TB", 2 * 10**12),
        ("512", 512),
        ("512B", 512),
    ],
)
def test_sizes(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize(("text", "expected"), [("4096", 4096), ("32k", 32768), ("1M", 2**20), ("0.5K", 512)])
def test_counts(text, expected):
    assert parse_count(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "80XB", "1e9", "8 0GB", "0.1B", "٣GB"])
def test_sizes_refused(text):
    with pytest.raises(ValueError, match=r"memory .* write e\.g\. '80GB'"):
        parse_size(text)


@pytest.mark.parametrize("text", ["", "k", "32kB", "-4", "0", "3.5.1k"])
def test_counts_refused(text):
    with pytest.raises(ValueError, match=r"count .* write e\.g\."):
        parse_count(text)
