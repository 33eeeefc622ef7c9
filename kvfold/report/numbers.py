"""How numbers are written for people: three significant digits, thousands apart, units, a difference with its error.

Every function takes None for a figure that was not measured and says so.
"""

MISSING = "not measured"
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def count(value: float | None) -> str:
    """A whole number with its thousands apart: 1,024. A count that is a mean (256.5) keeps three digits."""
    if value is None:
        return MISSING
    return f"{round(value):,}" if float(value).is_integer() else three(value)


def three(value: float | None) -> str:
    """Three significant digits: 29.7, 0.0312, 1,230; a minus is a real one."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    if abs(value) < 1e-5:
        return _minus(f"{value:.2e}")
    return _minus(_fixed(value, 2 - _exponent(value)))


def size(value: float | None) -> str:
    """Bytes in decimal units: 12.1 MB; 1 MB = 1,000,000 bytes."""
    if value is None:
        return MISSING
    for unit, name in _UNITS:
        if abs(value) >= unit * 0.9995:
            return f"{three(value / unit)} {name}"
    return f"{count(value)} B"


def amount(value: float | None) -> str:
    """A large count in words: 135 million."""
    if value is None:
        return MISSING
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if value >= unit * 0.9995:
            return f"{three(value / unit)} {name}"
    return count(value)


def tick(value: float) -> str:
    """A round number at an axis, without idle zeros: 20, 12.5, 1,500."""
    return _minus(f"{value:,.10g}")


def size_unit(most: float) -> tuple[float, str]:
    """Bytes of the unit in which an axis up to `most` bytes is written, and its name."""
    return next(((unit, name) for unit, name in reversed(_UNITS) if most < unit * 1000), _UNITS[0])


def percent(share: float | None) -> str:
    """A share between 0 and 1 in percent: 25.2 %."""
    return MISSING if share is None else f"{three(100 * share)} %"


def times(value: float | None) -> str:
    """How many times: 4.03×."""
    return MISSING if value is None else f"{three(value)}×"


def signed(value: float | None) -> str:
    """A difference with its sign: +1.93, −0.12, 0."""
    if value is None:
        return MISSING
    return f"+{three(value)}" if value > 0 else three(value)


def difference(mean: float | None, error: float | None, unit: str = "") -> str:
    """A mean with its standard error, both cut where the error has two digits: +1.93 ± 0.62 %."""
    unit = f" {unit}" if unit else ""
    if mean is None:
        return MISSING
    if error is None:
        return f"{signed(mean)}{unit} (error {MISSING})"
    if error == 0:
        return f"{signed(mean)}{unit}"
    places = 1 - _exponent(error)
    plus = "+" if round(mean, places) > 0 else ""
    return f"{plus}{_minus(_fixed(mean, places))} ± {_fixed(error, places)}{unit}"


def spread(low: float | None, high: float | None) -> str:
    """The smallest and largest of several runs: 17.9 to 18.6; "" if they were not kept."""
    return "" if low is None or high is None else f"{three(low)} to {three(high)}"


def middle(low: float | None, median: float | None, high: float | None, unit: str = "") -> str:
    """A median with the spread behind it: 18.3 (17.9 to 18.6)."""
    if median is None:
        return MISSING
    around = spread(low, high)
    return f"{three(median)}{unit}" + (f" ({around})" if around else "")


def _exponent(value: float) -> int:
    """The power of ten of the first digit, after rounding to three: 9.996 counts as 10.0."""
    return int(f"{abs(value):.2e}".split("e")[1])


def _fixed(value: float, places: int) -> str:
    text = f"{round(value, places):,.{max(0, places)}f}"
    return text.removeprefix("-") if float(text.replace(",", "")) == 0 else text


def _minus(text: str) -> str:
    return text.replace("-", "−")
