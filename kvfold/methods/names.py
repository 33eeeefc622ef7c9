"""The one way an unknown name is refused: name what was given, what is known, and what was probably meant."""

from collections.abc import Iterable
from difflib import get_close_matches

from kvfold.errors import UserError


def unknown_name(what: str, name: str, known: Iterable[str], shown: Iterable[str] | None = None) -> UserError:
    """The one-line error for a `name` that no `what` has; `shown` replaces `known` where that is too long to read."""
    known = sorted(known)
    near = get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    return UserError(f"unknown {what} '{name}'{hint}: use one of {', '.join(shown or known)}")
