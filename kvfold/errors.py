"""What a user did wrong, and what a machine has too little of. A module of its own on the lowest floor: every room refuses
something.
"""

import importlib.util
from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake of the user's: one line that says what was given, which rule it breaks, and the remedy.

    The command line ends with exit code 2 on one. Any other error is a failure or a fault of ours, and ends with 1.
    """


def one_line(error: BaseException) -> str:
    """An error's text on one line, cut to a readable length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."


def unknown_name(what: str, name: str, known: Iterable[str], shown: Iterable[str] | None = None) -> UserError:
    """The one-line error for a `name` that no `what` has, with what was probably meant; `shown` replaces `known` where that is
    too long to read.
    """
    known = sorted(known)
    near = get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    return UserError(f"unknown {what} '{name}'{hint}: use one of {', '.join(shown or known)}")


def need_packages(*names: str, extra: str, what: str) -> None:
    """Raises `UserError` where a package is not installed that `what` needs and kvfold's `extra` brings."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed: {what} needs it: run pip install 'kvfold[{extra}]'")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was too small: Python's, a GPU's, or the plain RuntimeError of torch on a CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY)


def raised_in_kvfold(error: BaseException) -> bool:
    """Whether our own code raised it, and not a library that it called."""
    frames = error.__traceback__
    while frames is not None and frames.tb_next is not None:
        frames = frames.tb_next
    return frames is not None and str(frames.tb_frame.f_globals.get("__name__")).partition(".")[0] == "kvfold"


_NO_MEMORY = ("can't allocate memory", "not enough memory")
"""In what torch's allocator for CPUs says."""
