"""The card of a model from scratch, README.md: its shape, how it was trained, what it reached. No torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvfold.train.pretrain_settings import PretrainSettings


def pretrain_card(settings: PretrainSettings, facts: Mapping[str, Any], out: Path) -> str:
    """The text of the card. `facts`: see `pretrain.py`, which gathers them."""
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
        f"| tokens | {facts['tokens']:,}, in sequences of {settings.sequence_tokens:,}, {settings.batch_sequences} a step |",
        f"| learning rate | {settings.learning_rate:g} at its highest, warm-up {100 * settings.warmup_share:g} % of the steps, "
        f"cosine to {100 * settings.final_learning_rate:g} % |",
        f"| optimizer | AdamW ({settings.beta1:g}, {settings.beta2:g}), weight decay {settings.weight_decay:g}, "
        f"clip {settings.clip:g}, new weights N(0, {settings.init_std:g}²) |",
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
