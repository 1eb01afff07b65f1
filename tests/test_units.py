"""Quantities and durations as Kubernetes and Go read them."""

from __future__ import annotations

import pytest

from epp.units import parse_duration, parse_quantity


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("4096", 4096),
        ("32Mi", 33_554_432),
        ("32MiB", 33_554_432),
        ("4Ki", 4096),
        ("1Gi", 1_073_741_824),
        ("1Ei", 2**60),
        ("1.5G", 1_500_000_000),
        ("500M", 500_000_000),
        ("10k", 10_000),
        ("1e6", 1_000_000),
        ("1E3", 1000),
        ("2E", 2 * 10**18),
        ("2.5e-1", 1),  # rounded up
        ("100m", 1),
        ("1500m", 2),
        (".5Ki", 512),
        ("5.", 5),
        ("+7", 7),
        (" 8 ", 8),
    ],
)
def test_quantities(text: str, value: int) -> None:
    assert parse_quantity(text) == value


@pytest.mark.parametrize(
    "text", ["", "Mi", "32 Mi", "32mi", "1.2.3", "-1", "1e", "KB1", "0x10", "٣", "1e6Mi", "B1", "nan"]
)
def test_what_is_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a quantity"):
        parse_quantity(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        ("0s", 0.0),
        ("50ms", 0.05),
        ("2s", 2.0),
        ("1.5h", 5400.0),
        ("2h45m", 9900.0),
        ("1m30.5s", 90.5),
        ("100us", 1e-4),
        ("100µs", 1e-4),
        ("7ns", 7e-9),
        (".5s", 0.5),
        ("+3m", 180.0),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", "ms", "5 s", "1d", "-1s", "1s 2ms", "1e3s", "s5", "5S"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)
