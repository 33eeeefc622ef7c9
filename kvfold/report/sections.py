"""The sections of the page, one function a kind of result: a plain sentence, the picture, its caption, its table."""

from collections.abc import Callable, Mapping, Sequence

from kvfold.report.groups import Group
from kvfold.report.inside import curve_section, document_section
from kvfold.report.learned_sheets import step_sheet, uptraining_sheet
from kvfold.report.markup import Markup, join, tag
from kvfold.report.numbers import count, percent
from kvfold.report.pictures.decode import DECODE, STEP, speed_picture
from kvfold.report.pictures.kept import HeadMap, head_map, kept_picture, key_picture, scale_of
from kvfold.report.pictures.memory import memory_picture
from kvfold.report.pictures.passkey import lengths_of, passkey_pictures, unfolded_share, worth_showing
from kvfold.report.pictures.quality import axes_of, quality_pictures
from kvfold.report.pictures.uptraining import roads_of, uptraining_picture
from kvfold.report.pieces import NOTHING, behind, drawn, figure, protocol_text, section, source_line, table, titled
from kvfold.report.scratch import pretraining_section
from kvfold.report.series import Line, quality_lines, texts_of
from kvfold.report.serve_sheet import serve_sheet
from kvfold.report.sheets import (
    decode_sheet,
    kept_sheets,
    memory_sheet,
    passkey_sheet,
    plan_sheet,
    quality_sheet,
    tasks_sheet,
)  # fmt: skip
from kvfold.report.summary import short_answer, summary_table
from kvfold.report.tables import method_labels

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
        parts.append(_uptraining_section(group))
    if group.passkey:
        parts.append(_passkey_section(group))
    if group.tasks:
        parts.append(_scores_section(group, group.tasks))
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
    picture = figure(draw, _quality_caption(group, panels), wide, class_="thirds" if wide == THIRD else None)
    return [picture, behind(sheet), source_line(group)]


def _quality_caption(group: Group, panels: Sequence[Sequence[Line]]) -> Markup:
    lines = [line for panel in panels for line in panel]
    protocol = protocol_text(group)
    said = [
        tag("strong", "Perplexity change against the bytes that are kept."),
        " Each mark is one budget; towards the right the cache gets smaller, on a scale of halves."
        " Whiskers are ± one standard error of the paired difference",
        f" over {protocol}." if protocol else ".",
    ]
    if any(line.from_unfolded for line in lines):
        said.append(
            " Dotted strokes lead from the unfolded model, which a method equals when its budget covers the "
            "whole text; nothing was measured along them."
        )
    if any(line.from_unfolded and not line.grows for line in lines):
        said.append(
            " Filled marks: a fixed budget. It drops nothing until it is full, so it looks better here than it "
            "would on a longer text."
        )
    if any(line.grows for line in lines):
        said.append(" Hollow marks, names with %: a budget that grows with the text and is small from the start.")
    if axes_of(panels).bent:
        said.append(" The upper part of the vertical scale is compressed.")
    return join(said)


def _uptraining_section(group: Group) -> Markup | None:
    roads = roads_of(group.rows)
    if not roads:
        return None
    lead = (
        "A model whose layers share keys and values, or that has fewer heads, is worse at first and learns with every token of "
        "training. How far does it get?"
    )
    caption = join(
        [
            tag("strong", "Perplexity change over tokens of training."),
            " Both scales are logarithmic. The line joins the best models at each length, hollow marks are others of the same"
            " layers. Dashed: extrapolated, not measured, as if it went on like the last three points of the line.",
        ]
    )

    def draw(width: float) -> list[Markup]:
        panels = [(text, [road for road in roads if road.text == text]) for text in texts_of(group.rows)]
        return [
            join([tag("h3", f"Text: {text or 'unnamed'}"), uptraining_picture(here, width)])
            for text, here in panels
            if here
        ]

    wide = PANEL_WIDTHS.get(len({road.text for road in roads}), THIRD)
    shown = figure(draw, caption, wide, class_="thirds" if wide == THIRD else None)
    return section(titled("What training gives back", group), tag("p", lead), shown, behind(uptraining_sheet(roads)))


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
    picture = figure(lambda width: passkey_pictures(group.passkey, labels, width), join(said), wide=520.0)
    return section(
        titled("Finding a hidden number", group),
        tag("p", lead),
        picture,
        behind(passkey_sheet(group.passkey, labels)),
        None if group.rows else source_line(group),
    )


def tasks_section(group: Group, colours: Mapping[str, int]) -> Markup:
    """Scores of tasks, and passkeys where they were asked in the same run."""
    return join([_scores_section(group, group.rows), _passkey_section(group) if group.passkey else None])


def _scores_section(group: Group, rows: Sequence[Mapping]) -> Markup:
    lead = (
        "Questions with known answers, asked through the cache by lm-evaluation-harness. Changes are against the same model, "
        "unfolded, question by question."
    )
    shown = table(tasks_sheet(rows)) if rows else NOTHING
    return section(titled("Tasks", group), tag("p", lead), shown, source_line(group))


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
    picture = drawn(lambda width: memory_picture(group.rows, colours, width), caption)
    return section(
        titled("Memory while it writes", group),
        tag("p", lead),
        picture,
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
    picture = drawn(lambda width: speed_picture(group.rows, DECODE, width), join(said))
    return section(
        titled("Speed", group), tag("p", lead), picture, behind(decode_sheet(group.rows)), source_line(group)
    )


def step_section(group: Group, colours: Mapping[str, int]) -> Markup:
    """What gates cost in training."""
    lead = (
        "Teaching a model to compress takes more than plain training: gates decide, entries are merged or hidden. Here is one "
        "step of it beside a step of the same training without."
    )
    said = [
        tag("strong", "Speed of training steps."),
        " Bars are medians; the thin line reaches from the slowest round to the fastest. Both sides have the same model, the "
        "same loss and the same tokens, and take turns. At the right: time of a step with gates over one without.",
    ]
    picture = drawn(lambda width: speed_picture(group.rows, STEP, width), join(said))
    return section(
        titled("What gates cost in training", group),
        tag("p", lead),
        picture,
        behind(step_sheet(group.rows)),
        source_line(group),
    )


def serve_section(group: Group, colours: Mapping[str, int]) -> Markup:
    """Many requests in one budget: a table, no picture."""
    lead = "The same requests under each method, in the same bytes for keys and values."
    return section(titled("Serving", group), tag("p", lead), table(serve_sheet(group.rows)), source_line(group))


def plan_section(group: Group, colours: Mapping[str, int]) -> Markup:
    """Planned bytes: a table, no picture."""
    lead = "Worked out from the shape of the model alone, before anything runs."
    return section(titled("The plan", group), tag("p", lead), table(plan_sheet(group.rows)), source_line(group))


SECTIONS: Mapping[str, Callable[[Group, Mapping[str, int]], Markup]] = {
    "quality": quality_section,
    "tasks": tasks_section,
    "memory": memory_section,
    "kept": kept_section,
    "document": document_section,
    "curve": curve_section,
    "decode": decode_section,
    "serve": serve_section,
    "step": step_section,
    "plan": plan_section,
    "pretraining": pretraining_section,
}
