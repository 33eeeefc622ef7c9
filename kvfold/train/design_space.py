"""The models of the CLA paper as one table, from which every recipe's settings are made, and the same rows in miniature,
for a processor. No torch.

Source: arXiv 2405.12981, tables 1 to 4 and section 3.1.
Differs: the miniature family and the controls at equal bytes are ours; so is everything that `PretrainSettings` says is.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from kvfold.errors import unknown_name
from kvfold.train.pretrain_settings import PretrainSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One published model."""

    name: str
    """As in the paper, in small letters: `h128-mqa-cla2`."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """KV heads."""
    head_dim: int
    """Channels of a head."""
    layers: str = "full"
    """Who stores keys and values."""
    kv_bytes: int
    """Published bytes of keys and values a token, at 16 bit."""
    perplexity: float | None
    """Published validation perplexity at a learning rate of 3e-4."""


def _row(
    name: str, heads: int, kv_heads: int, head_dim: int, layers: str, kv_bytes: int, perplexity: float | None
) -> Row:
    return Row(
        name=name, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, layers=layers, kv_bytes=kv_bytes,
        perplexity=perplexity,
    )  # fmt: skip


DESIGN_SPACE = (
    _row("h128-mha", 16, 16, 128, "full", 163840, 13.15),
    _row("h128-gqa4", 16, 4, 128, "full", 40960, 13.36),
    _row("h128-gqa2", 16, 2, 128, "full", 20480, 13.52),
    _row("h128-mqa", 16, 1, 128, "full", 10240, 13.54),
    _row("h64-mqa", 32, 1, 64, "full", 5120, 13.81),
    _row("h46-mqa", 45, 1, 46, "full", 3680, 13.96),
    _row("h32-mqa", 64, 1, 32, "full", 2560, 14.37),
    _row("h512-mqa-cla2", 4, 1, 512, "cla2", 20480, 13.49),
    _row("h256-mqa-cla2", 8, 1, 256, "cla2", 10240, 13.51),
    _row("h128-mqa-cla2", 16, 1, 128, "cla2", 5120, 13.60),
    _row("h90-mqa-cla2", 22, 1, 90, "cla2", 3600, 13.73),
    _row("h64-mqa-cla2", 32, 1, 64, "cla2", 2560, 13.89),
    _row("h256-gqa4-cla2", 8, 4, 256, "cla2", 40960, 13.38),
    _row("h128-gqa4-cla2", 16, 4, 128, "cla2", 20480, 13.48),
    _row("h128-gqa2-cla2", 16, 2, 128, "cla2", 10240, 13.59),
    _row("h128-mqa-cla3", 16, 1, 128, "cla3", 3584, 13.77),
    _row("h128-mqa-cla4", 16, 1, 128, "cla4", 2560, 13.95),
    _row("h128-mqa-cla2-keep-ends", 16, 1, 128, "cla2-keep-ends", 5632, 13.62),
    _row("h128-mqa-cla2-dense-front", 16, 1, 128, "cla2-dense-front", 5632, 13.75),
    _row("h128-mqa-cla2-dense-back", 16, 1, 128, "cla2-dense-back", 5632, 14.03),
)
"""The 1B design space."""

TUNED_1B = {"h128-mqa": 1.5e-3, "h128-mqa-cla2": 2.25e-3, "h64-mqa": 2.25e-3}
"""Learning rates at which the authors' search ended, at 1B."""
TUNED_PERPLEXITIES = {"h128-mqa": 12.39, "h128-mqa-cla2": 12.43, "h64-mqa": 12.74}
"""Published perplexities there."""
ROWS_3B = {"h128-mqa": 6.75e-4, "h128-mqa-cla2": 2.25e-3, "h64-mqa": 1e-3, "h64-mqa-cla2": 3e-4, "h32-mqa": 3e-4}
"""The 3B models and their learning rates: of the first three where the search ended, of the other two where one starts."""
_BYTES_3B = {"h128-mqa": 16384, "h128-mqa-cla2": 8192, "h64-mqa": 8192, "h64-mqa-cla2": 4096, "h32-mqa": 4096}

SLIMPAJAMA = {"data": ("cerebras/SlimPajama-627B",), "valid": ("cerebras/SlimPajama-627B:validation",)}
SHAPE_1B = {
    "num_layers": 20, "hidden_size": 2048, "intermediate_size": 5472, "vocabulary": 50_304, "tokens": 30_000_000_000,
    "tokenizer": "EleutherAI/gpt-neox-20b", **SLIMPAJAMA,
}  # fmt: skip
SHAPE_3B = {**SHAPE_1B, "num_layers": 32, "hidden_size": 3072, "intermediate_size": 8192, "tokens": 100_000_000_000}
SHAPE_TINYLLAMA = {
    "num_layers": 22, "hidden_size": 2048, "intermediate_size": 5632, "vocabulary": 32_000, "num_heads": 32,
    "num_kv_heads": 4, "head_dim": 64, "tokens": 105_000_000_000, "global_batch_size": 1024, "learning_rate": 4e-4,
    "tokenizer": "TinyLlama/TinyLlama_v1.1", **SLIMPAJAMA,
}  # fmt: skip
SHAPE_MINI = {
    "num_layers": 8, "hidden_size": 192, "intermediate_size": 512, "vocabulary": 4096, "tokens": 1_000_000,
    "seq_len": 512, "global_batch_size": 8, "micro_batch_size": 4, "save_steps": 40, "validate_steps": 100,
    "validation_tokens": 65_536, "learning_rate": 2e-3, "init_std": 0.0417,
}  # fmt: skip
"""New weights as wide as the published, which are 1 / sqrt(3 x width) at 1B."""

PAPER_HEAD_DIM, MINI_HEAD_DIM = 128, 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One model that comes with kvfold."""

    name: str
    """As `kvfold train` takes it."""
    settings: PretrainSettings
    """All of them."""
    paper_kv_bytes: int | None = None
    """Published bytes of keys and values a token, where this very model was published."""
    paper_perplexity: float | None = None
    """Published perplexity of the model that this is, or is the miniature of."""
    paper_tuned_perplexity: float | None = None
    """The same at the learning rate at which the authors' search ended."""


def recipes() -> dict[str, Recipe]:
    """All of them by name."""
    return {recipe.name: recipe for recipe in _all()}


def recipe_of(name: str) -> Recipe:
    """The recipe of a name. Raises `UserError` that names the nearest for one that is not there."""
    known = recipes()
    if name not in known:
        raise unknown_name("recipe", name, list(known), shown=["those that `kvfold train --list` shows"])
    return known[name]


def _all() -> Iterator[Recipe]:
    rows = {row.name: row for row in DESIGN_SPACE}
    for row in DESIGN_SPACE:
        yield _recipe(f"1b-{row.name}", SHAPE_1B, row, {}, bytes_=row.kv_bytes, perplexity=row.perplexity)
    for name, rate in TUNED_1B.items():
        yield _recipe(f"1b-{name}-tuned", SHAPE_1B, rows[name], {"learning_rate": rate}, bytes_=rows[name].kv_bytes)
    for name, rate in ROWS_3B.items():
        heads = SHAPE_3B["hidden_size"] // rows[name].head_dim
        changes = {"learning_rate": rate, "num_heads": heads}
        yield _recipe(f"3b-{name}", SHAPE_3B, rows[name], changes, bytes_=_BYTES_3B[name])
    for suffix, layers in (("", "full"), ("-cla2", "cla2")):
        yield Recipe(name=f"tinyllama{suffix}", settings=PretrainSettings(**SHAPE_TINYLLAMA, layers=layers))
    for row in DESIGN_SPACE:
        small = _miniature(row)
        if small is not None:
            yield _recipe(f"mini-{row.name}", SHAPE_MINI, small, {}, perplexity=row.perplexity)
    for name, (of, changes) in MINI_CONTROLS.items():
        yield _recipe(f"mini-{name}", SHAPE_MINI, _miniature(rows[of]), changes)


MINI_CONTROLS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "h128-gqa8": ("h128-mha", {"num_kv_heads": 8}),
    "h128-mha-cla2": ("h128-mha", {"layers": "cla2"}),
    "h128-mqa-4-layers": ("h128-mqa", {"num_layers": 4}),
    "h128-mqa-4-layers-wide": ("h128-mqa", {"num_layers": 4, "intermediate_size": 1152}),
    "h128-mqa-sandwich": ("h128-mqa", {"layers": "0_1_2_2_2_2_6_7"}),
}
"""Models that the paper lacks, to stand beside others of equal bytes: MHA-CLA2 and half the KV heads; half the layers as
they are, and with a feed-forward block that makes up for the weights that go with them; and the middle layers sharing as one
group, as in the sandwich layouts of arXiv 2410.14442, beside dense fronts and backs."""


def _recipe(
    name: str, shape: Mapping[str, Any], row: Row, changes: Mapping[str, Any], *, bytes_: int | None = None,
    perplexity: float | None = None,
) -> Recipe:  # fmt: skip
    of_row = {
        "num_heads": row.num_heads, "num_kv_heads": row.num_kv_heads, "head_dim": row.head_dim, "layers": row.layers,
    }  # fmt: skip
    settings = PretrainSettings(**{**shape, **of_row, **changes})
    tuned = TUNED_PERPLEXITIES.get(row.name) if perplexity is not None else None
    return Recipe(
        name=name, settings=settings, paper_kv_bytes=bytes_, paper_perplexity=perplexity, paper_tuned_perplexity=tuned
    )  # fmt: skip


def _miniature(row: Row) -> Row | None:
    """The row with head dims scaled 128 -> 12; None where that is no even number."""
    head_dim, rest = divmod(row.head_dim * MINI_HEAD_DIM, PAPER_HEAD_DIM)
    if rest or head_dim % 2:
        return None
    kv_heads = SHAPE_MINI["hidden_size"] // head_dim if row.num_kv_heads == row.num_heads else row.num_kv_heads
    return replace(
        row, head_dim=head_dim, num_heads=SHAPE_MINI["hidden_size"] // head_dim, num_kv_heads=kv_heads
    )  # fmt: skip
