"""Fills the README's result blocks from results/*.json and draws its picture: `python docs/fill_readme.py`.

No figure in the README is typed by hand; `--check` only says whether it is up to date.
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from kvfold.report.numbers import size
from kvfold.report.pictures.png import save_quality_png
from kvfold.report.sheets import Sheet, decode_sheet, passkey_sheet, quality_sheet
from kvfold.report.tables import method_labels

ROOT = Path(__file__).parent.parent
HEADS = {
    "quality": ("text", "method", "perplexity", "change", "KL", "same top-1", "kept", "compression", "bytes held"),
    "decode": ("point", "kvfold, tokens/s", "transformers, tokens/s", "ratio", "kvfold, cache", "transformers, cache"),
}
BLOCK = r"(<!-- results: {name} -->\n).*?(<!-- end -->)"


def markdown(sheet: Sheet, heads: Sequence[str] | None = None) -> str:
    """A sheet as a Markdown table, with these columns in this order."""
    names = [column.head for column in sheet.columns]
    chosen = [names.index(head) for head in heads] if heads else range(len(names))
    lines = [[names[index] for index in chosen]]
    lines.append(["---" if sheet.columns[index].is_text else "--:" for index in chosen])
    lines += [[row[index] for index in chosen] for row in sheet.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source_line(data: dict, what: str) -> str:
    """Model, machine and command, in one line under a table."""
    env, model = data["environment"], data["model"]
    return (
        f"{what} {model['name']} ({size(4 * model['parameters'])} of weights in {env['dtype']}; instruct-tuned, dequantised from "
        f"4 bits), {env['cores']} cores of {env['cpu']}, torch {env['torch']}, transformers {env['transformers']}. "
        f"Made by `{data['command']}`."
    )


def quality_block(data: dict) -> str:
    """Text by text, the unfolded model first."""
    protocol, rows = data["protocol"], sorted(data["rows"], key=lambda row: row["text"])
    what = (
        f"{protocol['windows']} windows of {protocol['context_tokens']:,} tokens of each text, read through the cache, H2O and "
        "TOVA one token a call; change with one standard error, paired by window; KL to the unfolded model in nats; bytes of all "
        "windows together."
    )
    return f"{markdown(quality_sheet(rows), HEADS['quality'])}\n\n{source_line(data, what)}"


def passkey_block(data: dict) -> str:
    """Keys found at each length and depth."""
    table = markdown(passkey_sheet(data["passkey"], method_labels(data["rows"])))
    return f"Five-digit keys found in filler text, of the tries at each depth:\n\n{table}"


def decode_block(data: dict) -> str:
    """Both sides of one run."""
    what = f"Decoding, greedy, {data['repeats']} rounds in which both sides take turns; median (smallest to largest)."
    return f"{markdown(decode_sheet(data['rows']), HEADS['decode'])}\n\n{source_line(data, what)}"


BLOCKS: dict[str, tuple[str, Callable[[dict], str]]] = {
    "quality": ("quality.json", quality_block),
    "passkey": ("quality.json", passkey_block),
    "decode": ("decode.json", decode_block),
}


def filled(text: str, results: Path) -> str:
    """The README with every block made anew; a block whose results are missing says so."""
    for name, (file, block) in BLOCKS.items():
        path = results / file
        data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        shown = block(data) if data.get("passkey" if name == "passkey" else "rows") else "not measured"
        pattern = re.compile(BLOCK.format(name=name), re.DOTALL)
        text = pattern.sub(lambda match, shown=shown: f"{match[1]}{shown}\n{match[2]}", text)
    return text


def main() -> int:
    """0 where the README is up to date, or was brought up to date."""
    readme, results = ROOT / "README.md", ROOT / "results"
    before = readme.read_text(encoding="utf-8")
    after = filled(before, results)
    if "--check" in sys.argv:
        return int(before != after)
    readme.write_text(after, encoding="utf-8")
    save_quality_png(results / "quality.json", ROOT / "docs" / "quality.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
