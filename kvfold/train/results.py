"""Writing what training leaves: an adapter's folder, or a whole model's, with its card: what it is, how it was made, what it
reached. Files appear under their names when they are whole.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GenerationMixin

from kvfold.models.adapters import ABOUT, WEIGHTS, AdapterAbout, Base
from kvfold.models.decoder import FoldForCausalLM
from kvfold.train.pretrain_settings import PretrainSettings
from kvfold.train.settings import RetrofitSettings
from kvfold.train.student import GATE_MODULES, lora_layers

_LAST = {ABOUT: 1, "config.json": 1}
"""A folder is loaded by these, so they come last."""
_WHAT = {"adapter": "An adapter", "lora": "A low-rank adapter", "full": "A model"}


def write_trained(
    model: FoldForCausalLM,
    tokenizer: Any,
    settings: RetrofitSettings,
    base: Base,
    folder: Path,
    *,
    card: str | None = None,
    tokens: int | None = None,
) -> None:
    """The adapter or the whole model in `folder`, with the card where there is one; what else lies there stays. `tokens`:
    trained on, where that is known.
    """
    with staged(folder, card) as place:
        if settings.trains == "full":
            before = model.config.trained_tokens
            if tokens is not None:
                model.config.trained_tokens = (before or 0) + tokens
            _write_model(model, tokenizer, place)
            model.config.trained_tokens = before  # a snapshot is not the end
        else:
            _write_adapter(model, base, place, tokens)


def write_model(model: FoldForCausalLM, tokenizer: Any, folder: Path, *, card: str) -> None:
    """A model's folder, with its card; what else lies there stays."""
    with staged(folder, card) as place:
        _write_model(model, tokenizer, place)


@contextmanager
def staged(folder: Path, card: str | None) -> Iterator[Path]:
    """A folder to write in, whose files then take their places."""
    partial = folder / f".partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8")
        for file in sorted(partial.iterdir(), key=lambda path: (_LAST.get(path.name, 0), path.name)):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_written(folder: Path, settings: RetrofitSettings) -> bool:
    """Whether the result is there."""
    return (folder / ("config.json" if settings.trains == "full" else ABOUT)).is_file()


def _write_model(model: FoldForCausalLM | GenerationMixin, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _write_adapter(model: FoldForCausalLM, base: Base, folder: Path, tokens: int | None) -> None:
    weights = {
        name: weight for name, weight in model.named_parameters() if name.split(".")[-2] in GATE_MODULES
    }  # fmt: skip
    layers = lora_layers(model)
    scales = {layer.scaling["default"] for layer in layers.values()}
    assert len(scales) <= 1
    for name, layer in layers.items():
        weights[f"{name}.lora_A"], weights[f"{name}.lora_B"] = (
            layer.lora_A["default"].weight,
            layer.lora_B["default"].weight,
        )
    config = model.config
    learned = config.gates is not None
    about = AdapterAbout(
        base=base, time=config.layout.time_text() if learned else None, gates=config.gates,
        lora={"scale": scales.pop()} if scales else None, trained_tokens=tokens,
        kept_ratios=config.kept_ratios if learned else None,
    )  # fmt: skip
    saved = {
        name: weight.detach().to(device="cpu", dtype=torch.float32).contiguous() for name, weight in weights.items()
    }
    if not saved:
        # The format needs a tensor: gates of a frozen channel have none.
        raise RuntimeError("nothing was trained that an adapter could hold")
    save_file(saved, folder / WEIGHTS)
    (folder / ABOUT).write_text(about.to_text(), encoding="utf-8")


def write_card(settings: RetrofitSettings, facts: Mapping[str, Any], out: Path) -> str:
    """The text of the card. `facts`: see retrofit.py, which gathers them."""
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
        f"| tokens | {facts['tokens']:,}{_of_planned(facts)}, in sequences of {settings.seq_len:,} |",
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
        f"| compression asked for | {settings.compression:g} at the end of {settings.seq_len:,} tokens, window included "
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


def pretrain_card(settings: PretrainSettings, facts: Mapping[str, Any], out: Path) -> str:
    """The text of the card. `facts`: see pretrain.py, which gathers them."""
    held = ", ".join(Path(name).name for name in settings.valid) or "the first part of the data, not trained on"
    lines = [
        f"# {out.name}",
        "",
        f"A language model of {facts['parameters']:,} weights, trained from scratch by `kvfold train {facts['recipe']}`.",
        "",
        "| | |",
        "|---|---|",
        f"| layers | {settings.num_layers}, of which {len(settings.layout.owners)} store keys and values (`{settings.layers}`) |",
        f"| heads | {settings.num_heads} query heads and {settings.num_kv_heads} KV heads of {settings.head_dim} channels |",
        f"| width | {settings.hidden_size}, feed-forward {settings.intermediate_size}, vocabulary {settings.vocabulary:,} |",
        f"| KV cache | {facts['kv_bytes_per_token']:,} bytes a token at 16 bit |",
        f"| tokens | {facts['tokens']:,}, in sequences of {settings.seq_len:,}, {settings.global_batch_size} a step |",
        f"| learning rate | {settings.learning_rate:g} at its highest, warm-up {100 * settings.warmup_share:g} % of the steps, "
        f"cosine to {100 * settings.final_learning_rate:g} % |",
        f"| optimizer | AdamW ({settings.beta1:g}, {settings.beta2:g}), weight decay {settings.weight_decay:g}, "
        f"clip {settings.max_grad_norm:g}, new weights N(0, {settings.init_std:g}²) |",
        f"| seed | {settings.seed} |",
        f"| data | {', '.join(Path(name).name for name in settings.data)} |",
        f"| held-out text | {held} |",
        f"| held-out perplexity | {facts['validation_perplexity']:.2f}, on {facts['validation_tokens']:,} tokens |",
        f"| hardware | {facts['hardware']} |",
        f"| time | {facts['seconds'] / 60:.1f} minutes of training |",
        f"| kvfold | {facts['version']}, commit {facts['git_commit'] or 'not known'} |",
        "",
        f"Made by `{facts['command']}`.",
        "",
        "```python",
        "import kvfold",
        "",
        f'model, tokenizer = kvfold.load("{out.name}"), kvfold.load_tokenizer("{out.name}")',
        "```",
        "",
    ]
    return "\n".join(lines)
