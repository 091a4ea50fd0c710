"""Memory sizes as text."""

import pytest

from quartet.errors import ConfigError
from quartet.memory.sizes import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24GiB", 25_769_803_776),
        ("24GB", 24_000_000_000),
        ("80g", 85_899_345_920),
        (" 1.5 GiB ", 1_610_612_736),
        ("512", 512),
        ("512b", 512),
        ("300MiB", 314_572_800),
        ("300m", 314_572_800),
        ("2tb", 2_000_000_000_000),
        (".5k", 512),
    ],
)
def test_parse_bytes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "24 gigs", "-3GiB", "0", "1e3", "24GiBB", "4ib"])
def test_parse_bytes_refuses(text: str) -> None:
    with pytest.raises(ConfigError, match="24GiB, 24GB or 80g"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, "0 B"), (999, "999 B"), (1000, "0.98 KiB"), (25_769_803_776, "24.0 GiB"), (157_286_400, "150 MiB")],
)
def test_format_bytes(count: int, expected: str) -> None:
    assert format_bytes(count) == expected
