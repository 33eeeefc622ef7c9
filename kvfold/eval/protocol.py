"""How text is read when methods are compared: how many windows, how long, how many at once, in calls of how many tokens."""

from dataclasses import dataclass

from kvfold.errors import UserError

CALL_TOKENS = 64
"""Tokens a row of one call, of methods whose state does not depend on where calls are cut, unless asked otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """One way of measuring; rows of one table share it."""

    windows: int = 32
    """Windows of each text, evenly spaced over it."""
    context_tokens: int = 1024
    """Tokens of a window."""
    batch: int = 32
    """Windows read side by side, in one cache."""
    call_tokens: int | None = None
    """Tokens a row of one call, for prefix methods; None = CALL_TOKENS. It changes no result. Steps methods read one."""

    def __post_init__(self) -> None:
        for name, least in (("windows", 1), ("context_tokens", 2), ("batch", 1), ("call_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} {value}: it is {least} or more: ask for more")
