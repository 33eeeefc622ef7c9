"""The settings of training from scratch, recipes (files of settings, those that come with kvfold by name and others by path), and
the models of the CLA paper as one table, from which the settings of its recipes are made, and the same rows in miniature, for a
processor. No torch.

Source: arXiv 2405.12981, tables 1 to 4 and section 3.1.
Differs: the miniature family and the controls at equal bytes are ours; so is everything that `PretrainSettings` says is.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from pydantic import Field, StrictBool, model_validator

from kvfold.errors import UserError, one_line, unknown_name
from kvfold.layout.kvlayout import KVLayout
from kvfold.layout.planner import token_bytes
from kvfold.train.settings import (
    AboveZero,
    Count,
    FromZero,
    Share,
    Texts,
    TrainSettings,
    Whole,
    cosine_factor,
    refuse,
)

_RECIPES = Path(__file__).parents[1] / "assets" / "recipes"


def recipe_names() -> list[str]:
    """Recipes that come with kvfold."""
    return sorted(file.stem for file in _RECIPES.glob("*.yaml"))


def read_recipe(name: str, settings: type[TrainSettings]) -> dict[str, Any]:
    """The values of a recipe, checked against the keys of `settings`. Raises `UserError`, in one line, for a recipe that
    is missing or no YAML, an unknown key (with the nearest known one), or a value of the wrong kind.
    """
    import yaml

    path = Path(name) if is_file_name(name) else _RECIPES / f"{name}.yaml"
    if not is_file_name(name) and name not in recipe_names():
        raise unknown_name("recipe", name, recipe_names())
    if not path.is_file():
        raise UserError(f"{name}: there is no such file: correct the path")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"recipe {name}: not YAML ({one_line(error)}): correct it") from error
    if not isinstance(values, dict):
        raise UserError(f"recipe {name}: it holds no keys: write e.g. 'time: dms:128'")
    return checked_values(values, settings, where=f"recipe {name}")


def is_file_name(name: str) -> bool:
    """Whether a recipe is named by its file and not one that comes with kvfold."""
    return Path(name).suffix in (".yaml", ".yml")


def parse_assignments(texts: Sequence[str], settings: type[TrainSettings]) -> dict[str, Any]:
    """The values of `--set key=value` texts, checked like a recipe's."""
    import yaml

    found = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign or not key.strip():
            raise UserError(f"--set '{text}': it is a key and a value: write e.g. --set learning_rate=3e-5")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--set '{text}': the value can't be read: write e.g. --set learning_rate=3e-5") from error
    return checked_values(found, settings, where="--set")


def checked_values(values: Mapping[str, Any], settings: type[TrainSettings], *, where: str) -> dict[str, Any]:
    """The same values, each of the kind that its key has, under the names that keys have now."""
    checked = {}
    for name, value in values.items():
        key = settings.key_of(str(name))
        if key is None:
            raise UserError(f"{where}: {unknown_name('key', str(name), settings.model_fields)}")
        try:
            checked[key] = settings.value_of(key, value)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    return checked


class PretrainSettings(TrainSettings):
    """One model from scratch; a recipe file holds these keys. The defaults are the published recipe's.

    Source: arXiv 2405.12981, section 3.1.
    Differs: whether the head is tied to the embedding and the vocabulary's padding are not published: ours are untied, and
    the next multiple of 128.
    """

    num_layers: Count
    """Decoder layers."""
    hidden_size: Count
    """Width of the residual stream."""
    intermediate_size: Count
    """Width of the feed-forward block (SwiGLU)."""
    num_heads: Count
    """Query heads."""
    num_kv_heads: Count
    """KV heads of each layer that stores keys and values: a divisor of the query heads."""
    head_dim: Count
    """Channels of a head, an even number, since rotary positions turn them in pairs."""
    vocabulary: Count
    """Rows of the embedding; a tokenizer that is trained has as many tokens."""
    layers: str = "full"
    """Who stores keys and values: `full`, `cla2`, `cla2-keep-ends`, `0_0_2_2...` and so on."""
    kv_norm: StrictBool | None = None
    """A norm gain of their own before k and v; None = where layers are shared, as published."""
    tie_embeddings: StrictBool = False
    """The head is the embedding."""
    rope_theta: AboveZero = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: FromZero = 1e-5
    """Of the RMS norms."""
    init_std: AboveZero = 0.01275
    """Standard deviation of new weights."""
    valid: Texts = ()
    """Held-out text of the same kinds as `data`; none = the first part of the data is held out."""
    tokenizer: str | None = None
    """A folder or hub name; None = byte-level BPE trained on the data."""
    tokens: Whole
    seq_len: Count = Field(2048, validation_alias="sequence_tokens")
    global_batch_size: Count = Field(2048, validation_alias="batch_sequences")
    learning_rate: AboveZero = 3e-4
    weight_decay: FromZero = 0.1
    save_steps: Count = 500
    warmup_share: Share = 0.05
    """Share of the steps in which the learning rate rises."""
    validate_steps: Count = 500
    """Steps between measurements on held-out text; the end is always measured."""
    validation_tokens: Count = 4_000_000
    """Held-out tokens, less where the text is shorter."""

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        kv_heads, dim, warmup = self.num_kv_heads, self.head_dim, self.warmup_share
        refuse(
            (self.num_heads % kv_heads, f"num_kv_heads {kv_heads}: each serves as many of the {self.num_heads} query heads: use "
             "a divisor"),
            (dim % 2, f"head_dim {dim}: rotary positions turn channels in pairs: use an even number"),
            (warmup == 1, f"warmup_share {warmup:g}: it is a share of the steps: use 0 to below 1"),
        )  # fmt: skip
        self.layout  # noqa: B018  a pattern that does not fit is refused here
        return self

    @property
    def layout(self) -> KVLayout:
        """Who keeps what."""
        return KVLayout.parse(self.layers, KVLayout.plain(self.num_layers, self.num_kv_heads, self.head_dim))

    @property
    def has_kv_norm(self) -> bool:
        """Whether owners norm the input of k and v with a gain of their own."""
        return len(self.layout.owners) < self.num_layers if self.kv_norm is None else self.kv_norm

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one token at 16 bit."""
        return token_bytes(self.layout, 2)

    @property
    def num_parameters(self) -> int:
        """Weights of the model."""
        width, q_width = self.hidden_size, self.num_heads * self.head_dim
        kv_width, owners = self.num_kv_heads * self.head_dim, len(self.layout.owners)
        layer = 2 * width * q_width + 3 * width * self.intermediate_size + 2 * width
        owner = 2 * width * kv_width + (width if self.has_kv_norm else 0)
        embeddings = self.vocabulary * width * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + owners * owner + embeddings + width

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.tokens // self.step_tokens

    def rate_factor(self, step: int) -> float:
        """What the learning rate is multiplied by at `step` (from 0): up in a line, then down a cosine."""
        warmup = round(self.warmup_share * self.total_steps)
        return cosine_factor(
            step, start=warmup, total=self.total_steps, warmup_steps=warmup, final=self.final_learning_rate
        )


@dataclass(frozen=True, slots=True)
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
    layers: str
    """Who stores keys and values."""
    kv_bytes: int
    """Published bytes of keys and values a token, at 16 bit."""
    perplexity: float
    """Published validation perplexity at a learning rate of 3e-4."""


DESIGN_SPACE = (
    Row("h128-mha", 16, 16, 128, "full", 163840, 13.15),
    Row("h128-gqa4", 16, 4, 128, "full", 40960, 13.36),
    Row("h128-gqa2", 16, 2, 128, "full", 20480, 13.52),
    Row("h128-mqa", 16, 1, 128, "full", 10240, 13.54),
    Row("h64-mqa", 32, 1, 64, "full", 5120, 13.81),
    Row("h46-mqa", 45, 1, 46, "full", 3680, 13.96),
    Row("h32-mqa", 64, 1, 32, "full", 2560, 14.37),
    Row("h512-mqa-cla2", 4, 1, 512, "cla2", 20480, 13.49),
    Row("h256-mqa-cla2", 8, 1, 256, "cla2", 10240, 13.51),
    Row("h128-mqa-cla2", 16, 1, 128, "cla2", 5120, 13.60),
    Row("h90-mqa-cla2", 22, 1, 90, "cla2", 3600, 13.73),
    Row("h64-mqa-cla2", 32, 1, 64, "cla2", 2560, 13.89),
    Row("h256-gqa4-cla2", 8, 4, 256, "cla2", 40960, 13.38),
    Row("h128-gqa4-cla2", 16, 4, 128, "cla2", 20480, 13.48),
    Row("h128-gqa2-cla2", 16, 2, 128, "cla2", 10240, 13.59),
    Row("h128-mqa-cla3", 16, 1, 128, "cla3", 3584, 13.77),
    Row("h128-mqa-cla4", 16, 1, 128, "cla4", 2560, 13.95),
    Row("h128-mqa-cla2-keep-ends", 16, 1, 128, "cla2-keep-ends", 5632, 13.62),
    Row("h128-mqa-cla2-dense-front", 16, 1, 128, "cla2-dense-front", 5632, 13.75),
    Row("h128-mqa-cla2-dense-back", 16, 1, 128, "cla2-dense-back", 5632, 14.03),
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
        changes = {"learning_rate": rate, "num_heads": SHAPE_3B["hidden_size"] // rows[name].head_dim}
        yield _recipe(f"3b-{name}", SHAPE_3B, rows[name], changes, bytes_=_BYTES_3B[name])
    for suffix, layers in (("", "full"), ("-cla2", "cla2")):
        yield Recipe(name=f"tinyllama{suffix}", settings=PretrainSettings(**SHAPE_TINYLLAMA, layers=layers))
    for row in DESIGN_SPACE:
        if small := _miniature(row):
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
    of_row = {key: getattr(row, key) for key in ("num_heads", "num_kv_heads", "head_dim", "layers")}
    return Recipe(
        name=name, settings=PretrainSettings(**{**shape, **of_row, **changes}), paper_kv_bytes=bytes_,
        paper_perplexity=perplexity,
        paper_tuned_perplexity=TUNED_PERPLEXITIES.get(row.name) if perplexity is not None else None,
    )  # fmt: skip


def _miniature(row: Row) -> Row | None:
    """The row with head dims scaled 128 -> 12; None where that is no even number."""
    head_dim, rest = divmod(row.head_dim * MINI_HEAD_DIM, PAPER_HEAD_DIM)
    if rest or head_dim % 2:
        return None
    heads = SHAPE_MINI["hidden_size"] // head_dim
    kv_heads = heads if row.num_kv_heads == row.num_heads else row.num_kv_heads
    return replace(row, head_dim=head_dim, num_heads=heads, num_kv_heads=kv_heads)
