"""The section of the page about models from scratch: a table of runs, or a design space with its picture."""

from collections.abc import Mapping, Sequence

from kvfold.report.design import Model, design_sheet, models_of
from kvfold.report.design_pairs import pairs_sheet
from kvfold.report.groups import Group
from kvfold.report.learned_sheets import pretraining_sheet
from kvfold.report.markup import Markup, join, tag
from kvfold.report.numbers import amount
from kvfold.report.pictures.curve import lines_picture
from kvfold.report.pictures.design import design_picture, loss_lines
from kvfold.report.pieces import behind, drawn, notes, section, source_line, table, titled
from kvfold.report.results import number


def pretraining_section(group: Group, colours: Mapping[str, int]) -> Markup:
    """Models from scratch."""
    lead = "Models trained from scratch, each with its cache's bytes a token and its perplexity on held-out text."
    runs, models = pretraining_sheet(group.rows), models_of(group.rows)
    if len(models) < 2:
        return section(titled("Trained from scratch", group), tag("p", lead), table(runs), source_line(group))
    sheet, beside = design_sheet(models), pairs_sheet(models)
    return section(
        f"Trained from scratch: {len(models)} models",
        tag("p", f"{lead} {_size(models)}"),
        *_pictures(models),
        table(sheet),
        notes(sheet),
        *((tag("h3", beside.title), table(beside), notes(beside)) if beside else ()),
        behind(runs),
        source_line(group),
    )


def _size(models: Sequence[Model]) -> str:
    weights = [number(one.row, "parameters") for one in models if number(one.row, "parameters")]
    tokens = number(models[0].row, "tokens")
    least, most = (amount(one(weights)) if weights else "" for one in (min, max))
    size = (f" of {least} weights" if least == most else f" of {least} to {most} weights") if weights else ""
    seen = f" that saw {amount(tokens)} tokens" if tokens else ""
    return f"These are models{size}{seen}: what holds for them may not hold for larger ones." if size or seen else ""


def _pictures(models: Sequence[Model]) -> list[Markup]:
    said = [
        tag("strong", "Perplexity against bytes."),
        " Each mark is a model at the best of its learning rates, a mean over its seeds, which the thin stroke spans. ",
        tag("span", "Blue", class_="c1"),
        " marks are models whose layers share keys and values. Nothing below and to the left of the dashed line was found.",
    ]
    parts = [drawn(lambda width: design_picture(models, width), join(said))]
    lines = loss_lines(models)
    if lines:
        about = " of the best run of each, over the tokens it saw; a colour a model, not those above."
        caption = join([tag("strong", "Training loss"), about])
        parts.append(
            drawn(lambda width: lines_picture(lines, "loss", width, from_zero=None, x_title="tokens"), caption)
        )
    return parts
