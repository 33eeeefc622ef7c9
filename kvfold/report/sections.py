"""The sections of the page, one function a kind of result: a plain sentence, the picture, its caption, its table."""

from collections.abc import Callable, Mapping, Sequence

from kvfold.report.groups import Group
from kvfold.report.markup import Markup, join, tag
from kvfold.report.numbers import count, percent
from kvfold.report.pictures.decode import decode_picture
from kvfold.report.pictures.kept import HeadMap, head_map, kept_picture, key_picture, scale_of
from kvfold.report.pictures.memory import memory_picture
from kvfold.report.pictures.passkey import lengths_of, passkey_pictures, unfolded_share, worth_showing
from kvfold.report.pictures.quality import axes_of, quality_pictures
from kvfold.report.pieces import WIDE, behind, figure, protocol_text, section, source_line, table, titled
from kvfold.report.series import Line, quality_lines, texts_of
from kvfold.report.sheets import (
    decode_sheet,
    kept_sheets,
    memory_sheet,
    passkey_sheet,
    plan_sheet,
    pretraining_sheet,
    quality_sheet,
)
from kvfold.report.summary import short_answer, summary_table
from kvfold.report.tables import method_labels

NOTHING = Markup("<p>Not measured.</p>")
PANEL_WIDTHS = {1: 760.0, 2: 500.0}
"""Width of a quality panel by the number of texts; of more, three share a line."""
THIRD = 354.0


def quality_section(group: Group, colours: Mapping[str, int]) -> Markup:
    """Quality against kept bytes, and whether hidden numbers are still found."""
    parts: list[Markup | None] = []
    if group.rows:
        lead = (
            "How much worse does the model predict a text once its cache is smaller? Every change is against "
            "the same model, unfolded, on the same windows of text."
        )
        parts.append(
            section(
                titled("Quality against memory", group),
                tag("p", lead),
                short_answer(group),
                summary_table(group, colours),
                *_quality_figure(group, colours),
            )
        )
    if group.passkey:
        parts.append(_passkey_section(group))
    return join(parts or [section(titled("Quality against memory", group), NOTHING, source_line(group))])


def _quality_figure(group: Group, colours: Mapping[str, int]) -> list[Markup]:
    panels = [lines for text in texts_of(group.rows) if (lines := quality_lines(group.rows, text))]
    sheet = quality_sheet(group.rows)
    if not panels:
        return [behind(sheet), source_line(group)]

    def draw(width: float) -> list[Markup]:
        pairs = quality_pictures(group.rows, colours, width)
        return [join([tag("h3", f"Text: {text or 'unnamed'}"), svg]) for text, svg in pairs]

    wide = PANEL_WIDTHS.get(len(panels), THIRD)
    drawn = figure(draw, _quality_caption(group, panels), wide, class_="thirds" if wide == THIRD else None)
    return [drawn, behind(sheet), source_line(group)]


def _quality_caption(group: Group, panels: Sequence[Sequence[Line]]) -> Markup:
    lines = [line for panel in panels for line in panel]
    protocol = protocol_text(group)
    said = [
        tag("strong", "Perplexity change against the bytes that are kept."),
        " Each mark is one budget; towards the right the cache gets smaller, on a scale of halves."
        " Whiskers are ± one standard error of the paired difference",
        f" over {protocol}." if protocol else ".",
        " Dotted strokes lead from the unfolded model, which every method equals when its budget covers the "
        "whole text; nothing was measured along them.",
    ]
    if any(not line.grows for line in lines):
        said.append(
            " Filled marks: a fixed budget. It drops nothing until it is full, so it looks better here than it "
            "would on a longer text."
        )
    if any(line.grows for line in lines):
        said.append(" Hollow marks, names with %: a budget that grows with the text and is small from the start.")
    if axes_of(panels).bent:
        said.append(" The upper part of the vertical scale is compressed.")
    return join(said)


def _passkey_section(group: Group) -> Markup:
    labels = method_labels(list(group.rows))
    hidden = {
        length: unfolded_share(group.passkey, length)
        for length in lengths_of(group.passkey)
        if not worth_showing(group.passkey, length)
    }
    lead = (
        "Perplexity is a mean over all words. Here one thing counts: a number hidden somewhere in a long "
        "filler text, asked for at the end."
    )
    said = [
        tag("strong", "Passkeys found, by depth in the text."),
        " Each cell: found out of tries; stronger colour is more. Depth 0 % is the beginning of the text, "
        "100 % its end.",
    ]
    for length, share in hidden.items():
        said.append(
            f" At {count(length)} tokens the unfolded model itself finds only {percent(share)}, so that "
            "length is in the table alone."
        )
    drawn = figure(lambda width: passkey_pictures(group.passkey, labels, width), join(said), wide=520.0)
    return section(
        titled("Finding a hidden number", group),
        tag("p", lead),
        drawn,
        behind(passkey_sheet(group.passkey, labels)),
        None if group.rows else source_line(group),
    )


def memory_section(group: Group, colours: Mapping[str, int]) -> Markup:
    """Memory over time."""
    lead = (
        "A full cache grows with every token. A cache with a budget stops growing, and what it drops is free "
        "for others."
    )
    caption = join(
        [
            tag("strong", "Bytes that the cache holds"),
            " while text is generated, as allocated: whole pages, with positions and scores.",
        ]
    )
    drawn = _drawn(lambda width: memory_picture(group.rows, colours, width), caption)
    return section(
        titled("Memory while it writes", group),
        tag("p", lead),
        drawn,
        behind(memory_sheet(group.rows)),
        source_line(group),
    )


def kept_section(group: Group, colours: Mapping[str, int]) -> Markup:
    """What layers and heads keep; maps of one kind of value share a scale."""
    maps = [one for row in group.rows if (one := head_map(row)) is not None]
    if not maps:
        return section(titled("What each layer and head keeps", group), NOTHING, source_line(group))
    lead = "Layers and heads differ in what they need. Every column is a layer, every row one of its KV heads."
    figures = [
        _map_figure([one for one in maps if one.value_name == name])
        for name in dict.fromkeys(one.value_name for one in maps)
    ]
    sheets = [sheet for one in maps for sheet in kept_sheets(one.row)]
    return section(
        titled("What each layer and head keeps", group), tag("p", lead), *figures, behind(*sheets), source_line(group)
    )


def _map_figure(maps: Sequence[HeadMap]) -> Markup:
    scale = scale_of(maps)
    name = maps[0].value_name
    said = [tag("strong", name[:1].upper() + name[1:], "."), " Stronger colour is more; all maps here share one scale."]
    if all(len({cell for line in one.values for cell in line}) == 1 for one in maps):
        said.append(" An even colour is no accident: these methods give every head the same budget.")
    return figure(
        lambda width: [*(kept_picture(one, scale, width) for one in maps), key_picture(maps[0], scale)], join(said)
    )


def decode_section(group: Group, colours: Mapping[str, int]) -> Markup:
    """Speed beside transformers."""
    lead = (
        "Tokens written per second, by kvfold and by transformers' own generate, from one run of both on the "
        "same machine."
    )
    said = [
        tag("strong", "Decode speed."),
        " Bars are medians; the thin line reaches from the slowest run to the fastest. At the right: kvfold "
        "over transformers, above 1 where kvfold is faster.",
    ]
    drawn = _drawn(lambda width: decode_picture(group.rows, width), join(said))
    return section(titled("Speed", group), tag("p", lead), drawn, behind(decode_sheet(group.rows)), source_line(group))


def plan_section(group: Group, colours: Mapping[str, int]) -> Markup:
    """Planned bytes: a table, no picture."""
    lead = "Worked out from the shape of the model alone, before anything runs."
    return section(titled("The plan", group), tag("p", lead), table(plan_sheet(group.rows)), source_line(group))


def pretraining_section(group: Group, colours: Mapping[str, int]) -> Markup:
    """Models from scratch: a table."""
    lead = "Models trained from scratch, each with its cache's bytes a token and its perplexity on held-out text."
    sheet = pretraining_sheet(group.rows)
    return section(titled("Trained from scratch", group), tag("p", lead), table(sheet), source_line(group))


def _drawn(draw: Callable[[float], Markup | None], caption: Markup) -> Markup:
    """A figure of one picture, or a word that there is none."""
    return NOTHING if draw(WIDE) is None else figure(lambda width: [draw(width)], caption)


SECTIONS: Mapping[str, Callable[[Group, Mapping[str, int]], Markup]] = {
    "quality": quality_section,
    "memory": memory_section,
    "kept": kept_section,
    "decode": decode_section,
    "plan": plan_section,
    "pretraining": pretraining_section,
}
