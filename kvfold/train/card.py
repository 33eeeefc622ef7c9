"""The card of a result, README.md: what it is, how it was made, what it reached, and what stands beside it. No torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvfold.train.settings import RetrofitSettings

_WHAT = {"adapter": "An adapter", "lora": "A low-rank adapter", "full": "A model"}


def write_card(settings: RetrofitSettings, facts: Mapping[str, Any], out: Path) -> str:
    """The text of the card. `facts`: see `retrofit.py`, which gathers them."""
    method = f"`{settings.time}`" if settings.compresses else "no method (plain uptraining)"
    if settings.control:
        method = f"no method: the control of a retrofit with `{settings.time}`"
    lines = [
        f"# {out.name}",
        "",
        f"{_WHAT[settings.trains]} for {facts['base']}, written by `kvfold retrofit`.",
        "",
        "| | |",
        "|---|---|",
        f"| base | {facts['base']} |",
        f"| method | {method} |",
        *_method_rows(settings, facts),
        f"| trained weights | {facts['trained_parameters']:,} ({_trained(settings)}) |",
        f"| loss | {_loss(settings)} |",
        f"| tokens | {facts['tokens']:,}{_of_planned(facts)}, in sequences of {settings.sequence_tokens:,} |",
        f"| data | {', '.join(Path(name).name for name in settings.data)} |",
        f"| hardware | {facts['hardware']} |",
        f"| time | {facts['seconds'] / 60:.1f} minutes of training |",
        *_measured_rows(settings, facts),
        f"| control | {_control(settings)} |",
        f"| kvfold | {facts['version']}, commit {facts['git_commit'] or 'not known'} |",
        "",
        f"Made by `{facts['command']}`.",
        "",
        *_use(settings, out),
        "",
    ]
    return "\n".join(lines)


def _method_rows(settings: RetrofitSettings, facts: Mapping[str, Any]) -> list[str]:
    if not settings.compresses:
        return []
    rows = [
        f"| compression asked for | {settings.compression:g} at the end of {settings.sequence_tokens:,} tokens, window included "
        f"({facts['nominal']:.2f} by the gates alone) |",
        f"| decisions | from {'an adapter' if settings.gate_source == 'adapter' else 'a freed channel'}, "
        f"{_decides(settings)}, one for each {'KV head' if settings.per == 'head' else 'layer'} |",
    ]
    if facts.get("freed"):
        found = facts["freed"]
        rows.append(
            f"| freed channel | {found['channel']}, the one missed least: KL {found['kl']:.3f} without it, "
            f"{found['kl_of_last']:.3f} without the last |"
        )
    if facts.get("warm_start"):
        rows.append(
            f"| warm start | gates fitted to {facts['warm_start']['tokens']:,} tokens without back-propagation |"
        )
    if facts.get("calibration"):
        found = facts["calibration"]
        rows.append(
            f"| calibrated | all gates shifted by {found['shift']:+.3f} on held-out text: {found['before']:.2f} before, "
            f"{found['after']:.2f} after |"
        )
    return rows


def _of_planned(facts: Mapping[str, Any]) -> str:
    """What a snapshot says of the run that it was taken from."""
    return f" of {facts['planned_tokens']:,} planned" if "planned_tokens" in facts else ""


def _decides(settings: RetrofitSettings) -> str:
    if settings.gated and "next" not in settings.spec.gate_form.reads:
        return "each token's own"
    return "each token's own" if settings.reads == "own" else "the next token's"


def _trained(settings: RetrofitSettings) -> str:
    return {"adapter": "gates alone", "lora": f"rank {settings.rank} on q, k, v, o", "full": "all"}[settings.trains]


def _loss(settings: RetrofitSettings) -> str:
    if settings.distils == "none":
        return "next token"
    towards = "student from teacher" if settings.distils == "reverse" else "teacher from student"
    return f"KL of {towards}" + (
        f", teacher {Path(settings.teacher).name}" if settings.teacher else ", teacher the original"
    )


def _measured_rows(settings: RetrofitSettings, facts: Mapping[str, Any]) -> list[str]:
    before, after = facts["before"], facts["after"]
    # With a teacher of its own, what is trained was converted first.
    start = "the original" if settings.teacher is None else f"{facts['base']} before training"
    rows = [
        f"| held-out perplexity of {start} | {before['perplexity']:.2f} |",
        f"| held-out perplexity of the result | {after['perplexity']:.2f} "
        f"({100 * (after['perplexity'] / before['perplexity'] - 1):+.1f} %), on {after['tokens']:,} tokens in windows of "
        f"{after['context_tokens']:,} |",
    ]
    if after.get("compression"):
        rows.insert(0, f"| compression reached on held-out text | {after['compression']:.2f}, window included |")
    return rows


def _control(settings: RetrofitSettings) -> str:
    if settings.control:
        return "this is one"
    if settings.trains == "adapter":
        return "the original: its weights are frozen"
    return "not in this folder: the same command with `--control` makes it" if settings.compresses else "the original"


def _use(settings: RetrofitSettings, out: Path) -> list[str]:
    if settings.trains == "full":
        return ["```python", "import kvfold", "", f'model = kvfold.load("{out.name}")', "```"]
    return ["```python", "import kvfold", "", f'model = kvfold.load(base, adapter="{out.name}")', "```"]
