"""Models from scratch: each at its best rate, over its seeds; those that nothing beats; shared layers beside the others."""

from dataclasses import replace

import report_samples as samples
from kvfold.report.series import Model, Pair, frontier, models_of, pairs_of
from kvfold.report.sheets import pairs_sheet


def test_a_difference_has_the_spread_of_its_seeds():
    def model(perplexities: list[float], **row) -> Model:
        runs = [{"seed": seed, "validation_perplexity": one, **row} for seed, one in enumerate(perplexities)]
        return Model(recipe="r", kv_bytes=8.0, runs=tuple(runs), rates=1)

    pair = Pair(shared=model([5.0, 7.0, 6.0], layers="cla2"), other=model([6.0, 7.5]))
    assert pair.differences == [-1.0, -0.5]
    assert [(one.shared, one.other) for one in pairs_of([pair.shared, pair.other])] == [(pair.shared, pair.other)]
    sheet = pairs_sheet([pair.shared, pair.other])
    assert sheet.rows[0][3:7] == (
        "−0.75 (−1.00 to −0.50)",
        "−0.75 (−1.00 to −0.50)",
        "−11.7 % (−16.7 % to −6.7 %)",
        "2",
    )


def test_seeds_by_which_a_rate_was_chosen_are_no_fresh_ones():
    """They did best of several runs, so they look better than the model is."""
    shape = {"kv_bytes_per_token": 8, "num_layers": 2}
    sharing = {"recipe": "shares", "layers": "cla2", **shape}
    runs = [(1e-3, 0, 5.0), (2e-3, 0, 9.0), (1e-3, 1, 7.0), (1e-3, 2, 6.5)]
    rows = [{**sharing, "learning_rate": rate, "seed": seed, "validation_perplexity": one} for rate, seed, one in runs]
    plain = {"recipe": "plain", "learning_rate": 1e-3, **shape}
    rows += [{**plain, "seed": seed, "validation_perplexity": 6.0} for seed in range(3)]
    (pair,) = pairs_of(models_of(rows))
    assert pair.shared.tuning_seeds == {0} and pair.other.tuning_seeds == frozenset()
    assert (pair.differences, pair.fresh_differences) == ([-1.0, 0.5, 1.0], [0.5, 1.0])
    assert pairs_sheet([pair.shared, pair.other]).rows[0][4] == "+0.75 (+0.50 to +1.00)"
    assert pairs_sheet([replace(pair.shared, runs=pair.shared.runs[:1]), pair.other]).rows[0][4] == "none"


def test_a_model_is_on_the_line_where_nothing_of_as_few_bytes_is_better():
    shown = frontier(models_of(result["rows"][0] for result in samples.design_space()))
    assert [one.recipe for one in shown] == ["made-up-mha", "made-up-mqa", "made-up-mqa-cla2"]


def test_of_equal_bytes_and_equal_perplexity_one_is_on_the_line():
    twice = [Model(recipe=name, kv_bytes=8.0, runs=({"validation_perplexity": 3.0},), rates=1) for name in "ab"]
    assert len(frontier(twice)) == 1
