"""The sections that look inside: what every head holds of one document, and how a retrofit went, step by step."""

from collections.abc import Mapping, Sequence

from kvfold.report.groups import Group
from kvfold.report.learned_sheets import curve_sheet, document_sheet, growth_sheet
from kvfold.report.markup import Markup, join, tag
from kvfold.report.numbers import count, times
from kvfold.report.pictures.curve import COMPRESSION, LOSS, layers_picture, lines_picture, series_of
from kvfold.report.pictures.growth import growth_picture
from kvfold.report.pictures.kept import compression_map, kept_picture, key_picture, scale_of
from kvfold.report.pictures.tokens import HeadText, head_texts, legend, text_page
from kvfold.report.pieces import NOTHING, behind, drawn, figure, section, source_line, titled
from kvfold.report.results import number, words
from kvfold.report.series import label_of
from kvfold.report.sheets import kept_sheets


def document_section(group: Group, colours: Mapping[str, int]) -> Markup:
    """Compression of each layer and head, the kept tokens as the text comes in, and the text as some heads hold it."""
    lead = (
        "One text, read from its beginning. Every figure and every mark here is read off the cache itself: which positions it "
        "holds, head by head."
    )
    parts = [
        *_compression_figures(group),
        drawn(lambda width: growth_picture(group.rows, colours, width), _growth_caption()),
    ]
    tokens = group.newest.get("tokens")
    for row in group.rows:
        if pages := head_texts(row, tokens if isinstance(tokens, list) else []):
            parts.append(_text_figure(row, pages))
    sheets = [
        document_sheet(group.rows),
        *(sheet for row in group.rows for sheet in kept_sheets(row)),
        growth_sheet(group.rows),
    ]
    return section(
        titled(f"Inside one text, {words(group.newest, 'text') or 'unnamed'}", group),
        tag("p", lead), *parts, behind(*sheets), source_line(group),
    )  # fmt: skip


def _compression_figures(group: Group) -> list[Markup]:
    maps = [one for row in group.rows if (one := compression_map(row)) is not None]
    if not maps:
        return [NOTHING]
    scale = scale_of(maps)
    said: list[str] = [
        tag("strong", "Compression of each layer and head,"),
        " tokens seen over tokens kept at the end of the text. Every column is a layer, every row one of its KV heads; "
        "stronger colour is more, and equal steps of colour are equal ratios.",
    ]
    whole = [
        f"{label_of(one.row)} {times(value)}" for one in maps if (value := number(one.row, "compression")) is not None
    ]
    if whole:
        said.append(f" All heads together, by bytes: {', '.join(whole)}.")
    return [
        figure(
            lambda width: [*(kept_picture(one, scale, width) for one in maps), key_picture(maps[0], scale)], join(said)
        )
    ]


def _growth_caption() -> Markup:
    return join(
        [
            tag("strong", "Tokens kept as the text comes in."),
            " Lines are means over all heads; the darker band holds the middle half of the heads, the fainter one, with an "
            "outline, all of them. The straight line is what a full cache holds.",
        ]
    )


def _text_figure(row: Mapping, pages: Sequence[HeadText]) -> Markup:
    states = set().union(*(page.states for page in pages))
    said = [
        tag("strong", f"{label_of(row)}: the text as single heads hold it"),
        f" after {count(number(row, 'seen_tokens'))} tokens. ",
        *legend(states),
    ]
    body = tag("div", *(text_page(page) for page in pages), class_="pages")
    return tag("figure", body, tag("figcaption", join(said)))


def curve_section(group: Group, colours: Mapping[str, int]) -> Markup:
    """Loss and compression over the steps of a retrofit."""
    lead = "How the training went. Every step draws new text and new noise, so single steps scatter."
    losses, reached = series_of(group.rows, LOSS), series_of(group.rows, COMPRESSION)
    if len(losses) == 2 and losses[0].points == losses[1].points:
        losses = losses[:1]  # nothing but one part was minimised
    said = [
        tag("strong", "Loss, and compression reached by the gates' noisy decisions"),
        " over the steps; a dashed line is what the schedule asked for. A long run shows means of neighbouring steps.",
    ]
    parts: list[Markup] = []
    pictures = [(losses, "loss", None), (reached, "compression", 1.0)]
    if any(lines for lines, _, _ in pictures):

        def draw(width: float) -> list[Markup]:
            return [lines_picture(lines, title, width, from_zero=zero) for lines, title, zero in pictures if lines]

        parts.append(figure(draw, join(said), wide=HALF))
    else:
        parts.append(NOTHING)
    if layers_picture(group.rows, HALF) is not None:
        caption = [tag("strong", "Compression of each layer over the steps."), " Stronger colour is more."]
        parts.append(figure(lambda width: [layers_picture(group.rows, width)], join(caption)))
    return section(
        f"How a retrofit went: {words(group.newest, 'name') or group.sources[-1].name}",
        tag("p", lead), *parts, behind(curve_sheet(group.rows)), source_line(group),
    )  # fmt: skip


HALF = 530.0
"""Width of one of two pictures that stand side by side."""
