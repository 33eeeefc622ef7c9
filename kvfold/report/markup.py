"""Writing HTML and SVG so that nothing from a result file can become markup.

`tag` escapes every attribute and every child that is plain text; only what `tag` itself made passes unchanged.
"""

from html import escape


class Markup(str):
    """Text that is already HTML or SVG, and safe to put into a page as it stands."""

    __slots__ = ()


def tag(name: str, /, *children: str | None, **attributes: object) -> Markup:
    """One element. `class_` stands for class, `stroke_width` for stroke-width; an attribute that is None is left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def join(parts) -> Markup:
    """Several pieces one after the other, plain text escaped, None left out."""
    return Markup("".join(part if isinstance(part, Markup) else escape(part) for part in parts if part is not None))


def _plain(value: object) -> str:
    """Coordinates with one digit behind the point: a tenth of a pixel is enough, and pages stay small."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
