"""The page as a reader has it: every number of the results, nothing that it loads, no markup from a result file."""

import json
import math
import random
import re
import subprocess
import sys

import pytest

import report_samples as samples
from html_reading import Page
from kvfold.record import KINDS
from kvfold.report import results as numbers
from kvfold.report.drawing import COLOURS
from kvfold.report.page import page_of as text_of
from kvfold.report.page import write_page
from kvfold.report.results import Result

HOSTILE = "</td></svg></style><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;$title ${x} {{ 7*7 }} \x00 javascript:"


def test_the_page_needs_nothing_else(whole, whole_text):
    assert not re.search(r"https?://|<script|@import|url\(|<iframe|<object|<embed|\bsrc=|xlink", whole_text)
    links = [attributes for name, attributes in whole.tags if name in ("link", "a", "base")]
    assert [link["href"] for link in links] == ["data:,"]
    inside = {attributes["href"] for name, attributes in whole.tags if name == "use"}
    assert inside <= {f"#{attributes['id']}" for _, attributes in whole.tags if "id" in attributes}
    assert "default-src 'none'" in whole_text and "@media print" in whole_text
    assert len(whole_text) < 700_000


def test_light_and_dark_have_every_colour_and_pictures_use_no_other(whole_text):
    style, _, body = whole_text.partition("</style>")
    light, dark = style.split("prefers-color-scheme: dark")
    for name, (in_light, in_dark) in COLOURS.items():
        assert f"--{name}: {in_light};" in light and f"--{name}: {in_dark};" in dark
    assert not re.findall(r"(?:fill|stroke): #.{40}", body) and "var(--k1)" in body
    assert len({light for light, _ in COLOURS.values()}) == len(COLOURS)


def test_every_section_is_there(whole):
    headings = [text for name, text in whole.texts if name == "h2"]
    for heading in (
        "Quality against memory", "What training gives back", "Finding a hidden number", "Tasks", "Memory while it writes",
        "What each layer and head keeps", "Inside one text, persuasion", "Speed", "What gates cost in training", "Serving",
        "The plan", "Trained from scratch",
    ):  # fmt: skip
        assert f"{heading}: Sample-135M" in headings
    assert {"How a retrofit went: made-up-adapter", "Trained from scratch: 4 models", "The methods", "Words"} <= set(
        headings
    )
    assert "135 million parameters" in whole.text
    assert "Made-up CPU @ 2.0 GHz, 2 cores, 2 threads, device cpu, float32" in whole.text
    assert "kvfold eval MADE-UP --time full --windows 8" in whole.text and "commit 0123456789" in whole.text
    assert "over 32 windows of 1,024 tokens" in whole.text and "measured 2031-02-03 04:05" in whole.text
    assert "arXiv 2306.14048" in whole.text and "read one token a call when measured" in whole.text
    assert "Left out: broken.json: not readable as JSON" in whole.text


def test_pictures_speak_and_say_more_on_hover(whole):
    pictures = [attributes for name, attributes in whole.tags if name == "svg" and "aria-hidden" not in attributes]
    assert len(pictures) >= 15 and all(picture["role"] == "img" and picture["aria-label"] for picture in pictures)
    hovers = {text for name, text in whole.texts if name == "title"}
    for said in (
        "H2O 128+128: 25.4 % of the bytes kept, perplexity +1.85 ± 0.38 %",
        f"TOVA 25%: {numbers.size(samples.memory()['rows'][4]['allocated_bytes'][5])} after 160 tokens",
        "made-up-mqa-cla2: 192 bytes a token, perplexity 124", "tokens 333,824: made-up-mqa 6.50", "step 40: reached 3.56",
        "kvfold, 1 × 64: 18.3 tokens/s, runs from 17.6 to 18.8", "after-20000: 20,000 tokens, +200.0 ± 1.5 %",
        "DMC 12: 60 of 120 kept, from 24 to 108 over heads",
    ):  # fmt: skip
        assert said in hovers
    assert any(re.fullmatch(r"layer 2, head 1: \d+ of 360 kept: [\d.]+×", said) for said in hovers)


def test_every_quality_number_is_on_the_page(whole):
    lines = whole.table("method", "KL", "same top-1")
    assert len(lines) == 1 + len(samples.TEXTS) * len(samples.METHODS) + len(samples.LAW)
    for row, cells in zip(samples.quality()["rows"], lines[1:], strict=False):
        change, loss = row["perplexity_change_percent"], row["loss_difference"]
        assert cells[1:] == [
            row["text"], "no", numbers.three(row["perplexity"]), numbers.difference(*change.values(), "%"),
            numbers.difference(*loss.values()), numbers.three(row["bits_per_byte"]), numbers.three(row["kl"]),
            numbers.percent(row["top1_agreement"]), numbers.count(row["kept_tokens"]), numbers.times(row["compression"]),
            numbers.times(row["compression_mean_over_time"]), numbers.size(row["allocated_bytes"]),
            numbers.size(54_321 + samples.TEXTS.index(row["text"])), numbers.size(9_876),
            numbers.size(row["full_bytes"]), numbers.three(row["tokens_per_second"]), "32,736", "109",
        ]  # fmt: skip
    window = dict(zip(lines[0], lines[3], strict=True))
    assert (window["method"], window["compression"], window["bytes held"]) == (
        "Window + sinks 252+4",
        "3.94×",
        "6.10 MB",
    )
    assert lines[-4][2] == "20,000 tokens"


def test_every_other_number_is_on_the_page(whole):
    keys = whole.table("length, tokens", "depth", "found", "tries")
    assert [[int(n.replace(",", "")) for n in (line[1], *line[3:])] for line in keys[1:]] == [
        [row["length_tokens"], row["found"], row["tries"]] for row in samples.quality()["passkey"]
    ]
    memory = whole.table("tokens seen", "Full attention", "TOVA 25%")
    for column, row in enumerate(samples.memory()["rows"], start=1):
        assert [line[column] for line in memory[1:]] == [numbers.size(held) for held in row["allocated_bytes"]]
    for row in samples.decode()["rows"]:
        side = row["ours"]["tokens_per_second"]
        assert numbers.middle(side["min"], side["median"], side["max"]) in whole.text
        assert (
            numbers.size(row["theirs"]["peak_bytes"]) in whole.text
            and numbers.times(row["ratio"]["median"]) in whole.text
        )
    layers = [table for table in whole.tables if table[0][:2] == ["layer", "head 0"]]
    assert len(layers) == 5 + len(samples.document()["rows"])
    assert layers[4][1:] == [
        [str(at), *map(numbers.count, line)] for at, line in enumerate(samples.kept()["rows"][2]["kept"])
    ]
    assert whole.table("cache", "bytes a token")[3] == ["cla2, h2o:128+128", "23,040", "6.06 MB", "–"]
    assert whole.table("side", "budget")[2][:5] == [
        "DMS 128", "40.0 MB", "not measured", "120 (118 to 124)", "2.10× (2.00 to 2.20)",
    ]  # fmt: skip
    assert whole.table("kept, mean", "kept, least")[1][:3] == ["DMS 64", "360", "1.88×"]
    growth = whole.table("tokens seen", "DMS 64, mean", "DMC 12, most")
    assert growth[-1][:4] == ["360", numbers.three(180.0), numbers.three(72.0), numbers.three(324.0)]


def test_what_training_gives_back_says_what_was_not_measured(whole):
    head, *lines = whole.table("layers", "tokens", "change")
    assert head == ["model", "layers", "text", "tokens", "change"]
    assert lines[0] == ["after-20000", "cla2", "brown", "20,000", "+200.0 ± 1.5 %"]
    assert lines[-1] == ["extrapolated, not measured", "cla2", "brown", "12,800,000", "+7.91 %"]


def test_what_a_step_costs(whole):
    cells = whole.table("method", "cost", "trained weights")
    assert cells[1][:5] == ["DMS 128", "all weights", "KL of student from teacher", "1,024", "1"]
    for row, line in zip(samples.step()["rows"], cells[1:], strict=True):
        assert line[7] == numbers.middle(*(row["ratio"][edge] for edge in ("min", "median", "max")), "×")
    assert "DMC 12, all weights, 1 × 1,024 tokens" in whole.text and "134,567,890" in whole.text


def test_models_from_scratch_stand_at_their_best_rate_with_all_their_seeds(whole):
    head, *lines = whole.table("layers with KV", "seeds")
    found = {line[0]: dict(zip(head, line, strict=True)) for line in lines}
    assert list(found) == ["made-up-mha", "made-up-mqa", "made-up-mqa-cla2", "made-up-small"]
    mqa = found["made-up-mqa"]
    assert (mqa["held-out perplexity"], mqa["learning rate"]) == ("121.00 (120.00 to 122.00)", "0.00200")
    assert (mqa["rates"], mqa["seeds"], mqa["layers with KV"], mqa["published"]) == ("2", "2", "8 of 8", "13.54")
    head, *lines = whole.table("layers shared", "difference")
    found = [dict(zip(head, line, strict=True)) for line in lines]
    assert [(one["beside"], one["its bytes"], one["difference"], one["in percent"]) for one in found] == [
        ("made-up-mqa", "2.00×", "+3.50", "+2.9 %"), ("made-up-small", "1.00×", "−3.50", "−2.8 %")
    ]  # fmt: skip
    assert [one["published, tuned"] for one in found] == ["+0.04, +0.3 %", "−0.31, −2.4 %"]
    assert "that saw 999,424 tokens" in whole.text


def test_the_short_answer_names_the_lowest_perplexity(whole):
    assert (
        "With 25.4 % of the cache left, the lowest perplexity among 6 ways measured is that of TOVA 256" in whole.text
    )


def test_a_length_that_the_unfolded_model_fails_is_in_the_table_alone(whole):
    assert "At 2,048 tokens the unfolded model itself finds only 75.0 %" in whole.text
    assert "24 of 24" in whole.text and "33 of 36" not in whole.text
    grids = [table for table in whole.tables if table[0][0] == "depth of the key"]
    assert len(grids) == 2 and grids[1][0] == ["depth of the key", "10 %", "50 %", "90 %"]
    assert grids[1][1] == ["Full attention", "4/4", "4/4", "4/4"]


def test_the_text_is_read_whole_and_marked_by_more_than_colour(whole, whole_text):
    held = "".join(samples.document()["tokens"])
    shown = [re.sub(r"<[^>]+>", "", body) for body in re.findall(r'<p class="held">(.*?)</p>', whole_text, re.DOTALL)]
    # Three heads of DMS, three of DMC, and the window's once: a page, and the rest.
    assert len(shown) == 14 and all(f"{first}{rest}" == held for first, rest in zip(*[iter(shown)] * 2, strict=True))
    assert "Every head asked for: 64 of 360 kept (5.62×)" in whole.text
    runs = [attributes for name, attributes in whole.tags if name == "span" and attributes.get("class") == "run"]
    # One more in the legend.
    assert len(runs) == 360 // 4 + 360 // 2 + 1 and runs[0]["title"] == "4 tokens in one entry"
    assert sum(name == "s" for name, _ in whole.tags) > 100
    for word in ("kept", "merged", "too new to go", "let go"):
        assert re.search(rf">{word}</(span|s)>", whole_text)
    for rule in (r"\.held s \{[^}]*line-through", r"\.waiting \{[^}]*dotted", r"\.run \{[^}]*outline"):
        assert re.search(rule, whole_text)


def test_pictures_are_drawn_for_a_phone_too(tmp_path):
    (tmp_path / "memory.json").write_text(json.dumps(samples.memory()))
    page = Page(write_page(tmp_path, tmp_path / "page.html").read_text(encoding="utf-8"))
    widths = [attributes["width"] for name, attributes in page.tags if name == "svg" and "aria-label" in attributes]
    assert widths == ["860", "350"] and {"panels wide", "panels narrow"} <= {one.get("class") for _, one in page.tags}


def test_one_model_gives_the_page_its_name(page_of):
    assert page_of(samples.plan()).text.startswith("The cache of Sample-135M, folded")


def test_a_file_of_models_of_another_size_is_a_section_of_its_own(page_of):
    one, two, other = samples.design_space()[:3]
    other["rows"][0] |= {"tokens": 1, "recipe": "other"}
    headings = [text for name, text in page_of(one, two, other).texts if name == "h2"]
    assert headings.count("Trained from scratch") == 2


def test_long_series_are_thinned_and_say_so(page_of):
    tokens = list(range(5001))
    row = {"method": "full", "title": "full", "tokens": tokens, "allocated_bytes": [at * 10 for at in tokens]}
    page = page_of({"kind": "memory", "rows": [row]})
    assert len(page.table("tokens seen")) < 204 and "5,000" in page.text and "50.0 kB" in page.text


def test_a_runs_curve_is_found_in_its_folder(tmp_path):
    out = tmp_path / "my-adapter"
    (out / "training").mkdir(parents=True)
    lines = [json.dumps(row) for row in samples.curve()["rows"]]
    (out / "training" / "curve.jsonl").write_text("\n".join(lines) + '\n{"step": 41, "lo')
    (out / "training" / "run.json").write_text(json.dumps({"source": "/somewhere/tiny.gguf", "settings": {}}))
    (out / "training" / "done.json").write_text(json.dumps({"command": "kvfold retrofit tiny my-adapter"}))
    page = Page(write_page(out, tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "The cache of tiny, folded" in page.text and "my-adapter/training/curve.jsonl" in page.text
    assert "How a retrofit went: my-adapter" in page.text and "kvfold retrofit tiny my-adapter" in page.text
    steps = page.table("step", "loss", "asked for")
    assert len(steps) == 41 and steps[40][:3] == ["40", "163,840", numbers.three(0.1 + 1 / 40)]
    assert "next token" not in steps[0]


def test_nothing_is_written_without_results(tmp_path):
    with pytest.raises(ValueError, match="no readable results"):
        write_page(tmp_path, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_remedy_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'kvfold\[report\]'"):
        write_page(samples.write_samples(tmp_path / "results"), tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def _everywhere(value, change):
    """Every text of a result changed, `kind` kept."""
    if isinstance(value, dict):
        return {key: item if key == "kind" else _everywhere(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_everywhere(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def test_hostile_texts_stay_texts(page_of):
    hostile = [_everywhere(_small(kind), lambda text: f"{text} {HOSTILE}") for kind in KINDS]
    page = page_of(*hostile)
    names = {name for name, _ in page.tags}
    assert "script" not in names and "img" not in names
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]
    assert not [
        attributes for _, attributes in page.tags for key in ("src", "href") if attributes.get(key, "data:,")[:6] != "data:,"
        and not attributes[key].startswith("#p")
    ]  # fmt: skip
    assert HOSTILE in page.text


def _small(kind: str) -> dict:
    """A row or two of a sample, so that every part of it can be spoilt in turn; what all kinds share stands in one."""
    if kind == "quality":
        result = samples.quality(["brown"])
        rows = [*result["rows"][:1], *result["rows"][-1:], *samples.trained()]
        result = {**result, "rows": rows, "passkey": result["passkey"][:2]}
        result["tasks"] = samples.tasks()["rows"][:1]
    else:
        result = {"kind": kind, "rows": getattr(samples, kind)()["rows"][:2]}
    if kind == "pretraining":
        result["rows"] = [one["rows"][0] for one in samples.design_space()[:4]]
    if kind == "document":
        result["tokens"] = samples.WORDS[:2]
    for row in result["rows"]:
        cut = ("tokens", "allocated_bytes", "kept", "score", "owners", "heads", "layer_compression")
        row |= {key: row[key][:2] for key in cut if isinstance(row.get(key), list)}
    return result


JUNK = (None, "x; y", [], {}, [[]], -1, 0, 1e-300, 1e29, math.nan)


def _spoilt(value, chance: float, dice: random.Random):
    """A copy in which parts are missing and others are junk."""
    if dice.random() < chance:
        return dice.choice(JUNK)
    if isinstance(value, dict):
        return {key: _spoilt(item, chance, dice) for key, item in value.items() if dice.random() > chance / 2}
    return [_spoilt(item, chance, dice) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("kind", KINDS)
def test_missing_parts_and_junk_never_stop_the_page(page_of, kind):
    """Drawn anew from a fixed seed; where one fails, the message has the result."""
    dice = random.Random(kind)
    for chance in (0.03, 0.15):
        result = {key: _spoilt(value, chance, dice) for key, value in _small(kind).items()}
        Page(text_of([Result(name="x.json", data={**result, "kind": kind})]))
    assert "not measured" in page_of({"kind": kind, "rows": [{}]}).text.lower() or kind == "plan"
    page_of({"kind": kind})


def test_what_was_not_measured_reads_so(page_of):
    row = {"method": "h2o:1+1", "title": "H2O", "text": "t", "perplexity": 12.0}
    cells = dict(zip(*page_of({"kind": "quality", "rows": [row]}).table("method", "KL"), strict=True))
    assert cells["perplexity"] == "12.0"
    assert {cells[head] for head in ("KL", "change", "bytes held", "trained", "kept")} == {"not measured"}


def test_reading_and_tables_need_neither_torch_nor_matplotlib():
    heavy = "{'torch', 'transformers', 'matplotlib', 'numpy'}"
    code = f"import kvfold.report.page, kvfold.report.sheets, sys; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
