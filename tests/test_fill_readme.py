"""The tables of the README and of pages in docs say what the result files say."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

import report_samples as samples
from kvfold.record import write_whole_file

ROOT = Path(__file__).parents[1]
FILES = ("quality.json", "decode.json")
EMPTY = "# kvfold\n\n" + "\n\n".join(
    f"Before {name}.\n\n<!-- results: {name} -->\n<!-- end -->" for name in ("quality", "passkey", "decode")
)


@pytest.fixture(scope="module")
def fill_readme():
    spec = importlib.util.spec_from_file_location("fill_readme", ROOT / "docs" / "fill_readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def root(tmp_path) -> Path:
    """A project of a README and made-up results."""
    (tmp_path / "README.md").write_text(EMPTY + "\n\nAfter.\n")
    samples.write_samples(tmp_path / "results")
    return tmp_path


def cells_of(text: str, name: str) -> list[list[str]]:
    """The lines of a block's table, the heads first."""
    block = re.search(rf"<!-- results: {name} -->(.*?)<!-- end -->", text, re.DOTALL)[1]
    lines = [line for line in block.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


def caption_of(text: str, name: str) -> str:
    block = re.search(rf"<!-- results: {name} -->(.*?)<!-- end -->", text, re.DOTALL)[1]
    return block.strip().splitlines()[-1]


def test_the_readme_is_what_the_results_say(fill_readme):
    if not any((ROOT / "results" / file).is_file() for file in FILES):
        pytest.skip("nothing has been measured into results/ yet")
    assert fill_readme.main(["--check"]) is None


def test_every_block_stands_on_one_page(fill_readme):
    pages = [(ROOT / page).read_text() for page in fill_readme.PAGES]
    found = [name for page in pages for name in re.findall(r"<!-- results: (\w+) -->", page)]
    assert sorted(found) == sorted([*fill_readme.BLOCKS, *fill_readme.INTEGRATIONS, *fill_readme.STUDIES])


def test_quality_stands_text_by_text_the_largest_first(fill_readme, root):
    text = fill_readme.filled(EMPTY, root / "results")
    heads, *rows = cells_of(text, "quality")
    assert heads == ["text", "method", "perplexity", "change", "KL", "same top-1", "kept", "compression", "held, MB"]
    assert [row[0] for row in rows] == [name for name in samples.TEXTS for _ in samples.METHODS]
    assert rows[0] == ["brown", "Full attention", "29.7", "0 %", "0", "100 %", "1,024", "1.00×", "24.0"]
    for first in range(0, len(rows), len(samples.METHODS)):
        held = [float(row[-1]) for row in rows[first : first + len(samples.METHODS)]]
        assert held == sorted(held, reverse=True) and rows[first][1] == "Full attention"
    one = next(row for row in samples.quality()["rows"] if row["method"] == "tova:256" and row["text"] == "austen")
    shown = next(row for row in rows if row[:2] == ["austen", "TOVA 256"])
    assert shown[2] == f"{one['perplexity']:.1f}" and shown[-1] == f"{one['allocated_bytes'] / 1e6:.2f}"


def test_the_caption_says_what_where_and_how(fill_readme, root):
    caption = caption_of(fill_readme.filled(EMPTY, root / "results"), "quality")
    assert caption == (
        "Sample-135M, made-up figures, from a formula, 135 million parameters; 32 windows of 1,024 tokens, 32 at a time; "
        "Made-up CPU @ 2.0 GHz, 2 cores, 2 threads, float32; kvfold 0.1.0, torch 2.13.0, transformers 5.17.0, "
        "commit 0123456789. Measured with `kvfold eval MADE-UP --time full --windows 8`."
    )


def test_methods_side_by_side_the_largest_first(fill_readme, root):
    result = samples.quality()
    result["rows"] = [
        row | ({"trained_tokens": 262_144} if row["method"] == "tova:256" else {}) for row in result["rows"]
    ]
    result["rows"] = [row for row in result["rows"] if (row["method"], row["text"]) != ("tova:256", "austen")]
    (root / "results" / "time-axis.json").write_text(json.dumps(result))
    page = "<!-- results: time_axis -->\n<!-- end -->"
    heads, *rows = cells_of(fill_readme.filled(page, root / "results"), "time_axis")
    each = [f"{text}: {head}" for text in samples.TEXTS for head in ("change", "KL")]
    assert heads == [
        "method",
        "trained",
        "smaller",
        *each,
        *(f"keys, {length}" for length in ("512", "1,024", "2,048")),
    ]
    assert rows[0][:6] == ["Full attention", "no", "1.00×", "0 %", "0", "0 %"] and rows[0][-3] == "12 of 12"
    assert [row[0] for row in rows].count("TOVA 256") == 1 and len(rows) == len(samples.METHODS)
    smaller = [float(row[2].rstrip("×")) for row in rows]
    assert smaller == sorted(smaller) and smaller[-1] > 3
    one = next(row for row in result["rows"] if row["method"] == "tova:256")
    tova = next(row for row in rows if row[0] == "TOVA 256")
    assert tova[1] == "262,144 tokens" and tova[4] == f"{one['kl']:.3g}" and tova[7:9] == ["–", "–"]
    mine = [row for row in result["passkey"] if row["method"] == "tova:256" and row["length_tokens"] == 1024]
    assert tova[-2] == f"{sum(row['found'] for row in mine)} of 12"


def test_files_of_a_folder_are_one_table(fill_readme, root):
    """As a curve has them that was measured point by point; a method in two files stands as the newer one has it."""
    result, folder = samples.quality(), root / "results" / "cla"
    for name, commit, created, methods in (
        ("curve-1.json", "a" * 40, "2026-01-02", ("full", "window:252+4")),
        ("curve-2.json", "b" * 40, "2026-01-03", ("full", "tova:256")),
    ):
        rows = [row for row in result["rows"] if row["method"] in methods]
        write_whole_file(folder / name, json.dumps(result | {"rows": rows, "git_commit": commit, "created": created}))
    page = fill_readme.filled("<!-- results: cla_curve -->\n<!-- end -->", root / "results")
    assert [row[0] for row in cells_of(page, "cla_curve")[1:]] == ["Full attention", "Window + sinks 252+4", "TOVA 256"]
    caption = caption_of(page, "cla_curve")
    assert f"commits {'a' * 10}, {'b' * 10}." in caption
    assert caption.endswith("Measured with the commands in curve-1.json, curve-2.json.")


def test_a_converted_model_is_no_trained_one(fill_readme, root):
    result = samples.quality()
    for row in result["rows"]:
        if row["method"] == "tova:256":
            row |= {"method": "full of pairs", "title": "pairs", "model": "pairs", "layers": "cla2", "trained": True}
    (root / "results" / "layer-axis.json").write_text(json.dumps(result))
    page = fill_readme.filled("<!-- results: layer_axis -->\n<!-- end -->", root / "results")
    trained = {row[0]: row[1] for row in cells_of(page, "layer_axis")[1:]}
    assert trained["pairs"] == "converted only" and trained["Full attention"] == "no"


def test_recall_by_its_seeds(fill_readme, root):
    """Groups of fewer than five seeds are counted, not shown; nobody is said to have learned what one seed did not."""
    rows = []
    for variant, seeds, last in (("mqa", 5, 1.0), ("mqa-cla2", 5, 0.5), ("mqa-half-head", 2, 1.0)):
        for seed in range(seeds):
            points = [
                {"answers": answers, "accuracy": {"2x1": 1.0, "4x1": last, "8x1": score}}
                for answers, score in ((100, 0.25), (200 + 100 * seed, last))
            ]
            about = {
                "layers": 2,
                "steps": 400,
                "head_dim": 16,
                "variant": variant,
                "study": "s",
                "lr": 1.0,
                "adam_lr": 1.0,
            }
            made = {"cpu": "c", "kvfold": "0", "torch": "2", "threads": 1, "git_commit": "a" * 40}
            rows.append({**about, **made, "task": {}, "kv_bytes_per_token": 128, "points": points, "seed": seed})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_whole_file(root / "results" / "recall" / "recall.jsonl", text)
    page = fill_readme.filled("<!-- results: recall -->\n<!-- end -->", root / "results")
    found = {row[1]: row[-3:] for row in cells_of(page, "recall")[1:]}
    assert found == {"MQA": ["100 %", "5 of 5", "400"], "MQA with CLA2": ["50.0 %", "0 of 5", "–"]}
    assert "1 trials of fewer seeds are in the file" in caption_of(page, "recall")


def test_passkeys_by_length_and_depth(fill_readme, root):
    text = fill_readme.filled(EMPTY, root / "results")
    heads, *rows = cells_of(text, "passkey")
    assert heads == ["method", "tokens", "at 10.0 %", "at 50.0 %", "at 90.0 %", "in all"]
    # At 2,048 tokens the made-up unfolded model finds three of four, which is less than 80 %.
    assert [row[1] for row in rows] == ["512"] * len(samples.METHODS) + ["1,024"] * len(samples.METHODS)
    assert "At 2,048 tokens the unfolded model itself finds only 75.0 %." in text
    assert rows[0] == ["Full attention", "512", "4 of 4", "4 of 4", "4 of 4", "12 of 12"]
    mine = [row for row in samples.quality()["passkey"] if row["method"] == "tova:256" and row["length_tokens"] == 1024]
    found = [row["found"] for row in mine]
    shown = [f"{one} of 4" for one in found] + [f"{sum(found)} of 12"]
    assert ["TOVA 256", "1,024", *shown] in rows


def test_what_a_file_lacks_is_not_measured(fill_readme, root):
    (root / "results" / "quality.json").write_text(json.dumps(samples.quality() | {"passkey": []}))
    (root / "results" / "decode.json").write_text(json.dumps(samples.decode() | {"rows": []}))
    text = fill_readme.filled(EMPTY, root / "results")
    assert [caption_of(text, name) for name in ("passkey", "decode")] == ["Not measured."] * 2


def test_decode_shows_both_sides(fill_readme, root):
    heads, *rows = cells_of(fill_readme.filled(EMPTY, root / "results"), "decode")
    assert heads == ["point", "left padding", "kvfold, tokens/s", "transformers, tokens/s", "ratio"]
    assert rows[0] == ["1 × 64", "no", "18.3 (17.6 to 18.8)", "17.1 (16.4 to 17.6)", "1.07× (1.04 to 1.09)"]
    assert [row[:2] for row in rows[1:]] == [
        ["16 × (32 + 64)", "yes"], ["8 × 1,024", "no"], ["8 × 1,024, h2o:128+128", "no"],
    ]  # fmt: skip


def test_other_servers_stand_as_they_were_measured(fill_readme):
    results = ROOT / "results"
    data = json.loads((results / "integrations" / "ray-serve.json").read_text())
    _, *rows = cells_of(fill_readme.filled("<!-- results: ray_serve -->\n<!-- end -->", results), "ray_serve")
    assert [row[0] for row in rows] == [row["name"] for row in data["rows"]]
    assert [row[1:3] for row in rows] == [["200 of 200", "0"]] * 3 and rows[0][-1].endswith(" %")
    several = [{"model": "a", "devices": 2, "refused": "vLLM: no"}, {"model": "b", "devices": 3, "equal_answers": 7}]
    data = {"made": {"git_commit": "0123456789ab"}, "command": "x", "prompts": 8, "tensor_parallel": several}
    said = fill_readme.vllm_devices(data)
    assert "| a | 2 | refused: vLLM: no |\n| b | 3 | 7 of 8 |\n" in said
    _, *rows = cells_of(fill_readme.filled("<!-- results: vllm_capacity -->\n<!-- end -->", results), "vllm_capacity")
    assert [row[1] for row in rows] == ["smollm2-135m", "smollm2-135m-cla2"] * 2
    assert rows[0][-1] == "1.00× (1.00 to 1.00)"


def test_rewriting_and_checking(fill_readme, root, monkeypatch):
    def draw(results: Path, out: Path, families: tuple[str, ...]) -> Path:
        assert results == root / "results" / "time-axis.json" and "dms" in families
        return write_whole_file(out, b"a picture")

    monkeypatch.setattr(fill_readme, "save_quality", draw)
    (root / "results" / "time-axis.json").write_text(json.dumps(samples.quality()))
    readme = root / "README.md"
    stale = fill_readme.main(["--check"], root)
    assert stale == "README.md is not what results/ says: run `make readme`"
    assert readme.read_text() == EMPTY + "\n\nAfter.\n" and not (root / "docs").exists()
    assert fill_readme.main([], root) is None
    written = readme.read_text()
    assert written.startswith("# kvfold\n\nBefore quality.\n") and written.endswith("<!-- end -->\n\nAfter.\n")
    assert (root / "docs" / "quality.png").read_bytes() == b"a picture"
    assert fill_readme.main(["--check"], root) is None
    assert fill_readme.main([], root) is None and readme.read_text() == written
    changed = samples.decode()
    changed["rows"][0]["ratio"]["median"] = 2.0
    (root / "results" / "decode.json").write_text(json.dumps(changed))
    assert fill_readme.main(["--check"], root) == stale
    assert fill_readme.main([], root) is None
    (root / "docs" / "results.md").write_text(EMPTY)
    assert fill_readme.main(["--check"], root) == stale.replace("README.md", "docs/results.md")


def test_a_folder_of_models_from_scratch_is_one_table(fill_readme, root):
    folder = root / "results" / "design-space"
    folder.mkdir()
    for index, result in enumerate(samples.design_space()):
        (folder / f"{index}.json").write_text(json.dumps(result))
    (folder / "beside.json").write_text((root / "results" / "quality.json").read_text())  # not one of them
    page = "<!-- results: design -->\n<!-- end -->\n<!-- results: design_pairs -->\n<!-- end -->"
    text = fill_readme.filled(page, root / "results")
    head, *lines = cells_of(text, "design")
    assert [line[0] for line in lines] == ["made-up-mha", "made-up-mqa", "made-up-mqa-cla2", "made-up-small"]
    assert lines[1][head.index("held-out perplexity")] == "121.00 (120.00 to 122.00)"
    assert caption_of(text, "design").startswith("4 models of ") and "Measured with" not in caption_of(text, "design")
    head, *lines = cells_of(text, "design_pairs")
    assert lines[1][head.index("published, tuned")] == "−0.31, −2.4 %"


def test_what_was_not_measured_stays_as_it_is(fill_readme, root):
    (root / "results" / "decode.json").unlink()
    text = fill_readme.filled(EMPTY, root / "results")
    assert text.endswith("<!-- results: decode -->\n<!-- end -->") and "Full attention" in text
    assert fill_readme.filled(EMPTY, root / "nowhere") == EMPTY


def test_what_is_wrong_is_said_in_one_line(fill_readme, root):
    assert fill_readme.main(["--chek"], root).startswith("usage: ")
    (root / "results" / "decode.json").write_text("{")
    assert "no readable results" in fill_readme.main([], root)
    (root / "README.md").write_text("<!-- results: speed -->\n<!-- end -->")
    assert "write one of " + ", ".join(fill_readme.BLOCKS) in fill_readme.main([], root)
    assert (root / "README.md").read_text() == "<!-- results: speed -->\n<!-- end -->"
