"""Which versions of other people's servers the plugins were tested with, and the warning about others."""

import warnings
from collections.abc import Sequence
from importlib import metadata


def installed_version(packages: Sequence[str]) -> str | None:
    """The version of the first of these packages that is installed; None where there is none."""
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def warn_untested(what: str, version: str | None, tested: tuple[str, str], *, stacklevel: int = 3) -> None:
    """One warning with the tested range, from its first up to, not including, its second, where `version` lies outside."""
    if version is not None and not _number(tested[0]) <= _number(version) < _number(tested[1]):
        warnings.warn(
            f"{what} {version}: kvfold's plugin is tested with {tested[0]} up to, not including, {tested[1]}",
            stacklevel=stacklevel,
        )


def _number(version: str) -> tuple[int, ...]:
    """`0.32.1` -> (0, 32); a build's or a candidate's suffix says nothing here."""
    return tuple(int(part) for part in version.split(".")[:2])
