"""KVLayout, who keeps what: which layers own keys and values, how many heads, what each owner keeps, how it is stored.

The noun that every other package turns on. It moves no bytes and knows no model family; it is frozen, checked, and writes
itself into a checkpoint's config.json. Owner maps by name live in patterns.py, other projects' grammars in hf_config.py.
Texts may give single owners something else than the rest, `h2o:64+64; 0-3,7=full`: the first part holds for all owners and may
be missing; each further part names layers, ranges included, and what the owners among them get.
"""

import re
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

from kvfold.errors import UserError
from kvfold.layout.patterns import check_owners, owner_map, pattern_text
from kvfold.methods.base import Budget, Method
from kvfold.methods.bits import BitsSpec
from kvfold.methods.registry import parse_time
from kvfold.methods.window import Full, Window


def join_per_owner(rest: str, given: Sequence[str], wanted: Sequence[str], owners: Sequence[int]) -> str:
    """`rest`, then the owners whose wanted text is not the given one, in runs of neighbouring owners."""
    runs: list[list] = []
    for index, owner in enumerate(owners):
        if wanted[index] == given[index]:
            continue
        if runs and runs[-1][2] == index - 1 and runs[-1][3] == wanted[index]:
            runs[-1][1:3] = [owner, index]
        else:
            runs.append([owner, owner, index, wanted[index]])
    spans = [f"{first if first == last else f'{first}-{last}'}={text}" for first, last, _, text in runs]
    return "; ".join([rest, *spans])


def most_common(texts: Sequence[str]) -> str | None:
    """The text that stands most often, the first of equals; None of none."""
    return max(texts, key=list(texts).count, default=None)


def split_per_owner(text: str) -> tuple[str | None, list[tuple[range, str]]]:
    """What stands for all layers (None: nothing does), then the layers named and what stands for them, in order."""
    rest, named = None, []
    for part in (part.strip() for part in text.split(";")):
        layers, equals, value = (piece.strip() for piece in part.partition("="))
        if not part or (equals and not (layers and value)):
            raise UserError(f"'{text}': a part is empty: write e.g. 'h2o:64+64; 0-3=full'")
        if equals:
            named += [(_layer_range(piece.strip(), text), value) for piece in layers.split(",")]
        elif rest is None and not named:
            rest = part
        else:
            raise UserError(f"'{text}': only the first part may hold for all: give '{part}' layers, e.g. '0-3={part}'")
    return rest, named


def _layer_range(piece: str, text: str) -> range:
    match = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", piece, re.ASCII)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if first > last:
        raise UserError(f"'{text}': '{piece}' is no layer or range of layers: write e.g. '3=full' or '0-3,7=full'")
    return range(first, last + 1)


FORMAT = 1
"""Version of the JSON form."""

FULL, MODEL_BITS = Full(), BitsSpec()
ROPE, NO_ROPE = "default", "none"
"""Rotary positions as most layers have them, and none."""

Spec = TypeVar("Spec", Method, BitsSpec)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerKV:
    """The keys and values that one decoder layer attends to."""

    owner: int
    """Index of the layer that computes and stores them; the layer's own index if it does so itself."""
    num_kv_heads: int
    """KV heads."""
    head_dim: int
    """Channels of one head."""
    window: int | None = None
    """The architecture's own sliding window: query t sees key k iff t - k < window. None = full attention."""
    rope: str = ROPE
    """Which rotary positions keys and queries have, where a model has more than one kind; `none` = not any."""

    def __post_init__(self) -> None:
        for name, least in (("owner", 0), ("num_kv_heads", 1), ("head_dim", 1), ("window", 1)):
            value = getattr(self, name)
            if value is None and name == "window":
                continue
            if type(value) is not int or value < least:
                raise UserError(f"{name} {value!r}: a layer's {name} is a whole number of {least} or more: correct it")
        if type(self.rope) is not str:
            raise UserError(f"rope {self.rope!r}: it names a kind of rotary positions, such as '{ROPE}': correct it")

    @property
    def kind(self) -> tuple[int | None, int, int, str]:
        """What must agree within a group: window, number of KV heads, head dim, rotary positions."""
        return self.window, self.num_kv_heads, self.head_dim, self.rope

    def to_json(self) -> dict[str, Any]:
        """Plain values; rotary positions only where they are not the default."""
        plain = {name: getattr(self, name) for name in ("owner", "num_kv_heads", "head_dim", "window")}
        return plain if self.rope == ROPE else plain | {"rope": self.rope}


@dataclass(frozen=True, kw_only=True, slots=True)
class KVLayout:
    """The KV cache of one model: one `LayerKV` per layer; one method along time and one storage per owner."""

    layers: tuple[LayerKV, ...]
    """One per decoder layer, from the bottom up."""
    time: tuple[Method, ...]
    """One per owner, owners ascending: what was asked for. What is in force stands in `time_of`."""
    bits: tuple[BitsSpec, ...]
    """One per owner, owners ascending."""
    owners: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """Layers that store keys and values, ascending. Derived from `layers`."""
    _place: dict[int, int] = field(init=False, repr=False, compare=False)
    _readers: dict[int, tuple[int, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.layers:
            raise UserError("a layout of 0 layers: a model has 1 layer or more: name them")
        check_owners([layer.owner for layer in self.layers])
        readers: dict[int, list[int]] = {}
        for index, layer in enumerate(self.layers):
            readers.setdefault(layer.owner, []).append(index)
            if layer.kind != self.layers[layer.owner].kind:
                raise UserError(
                    f"layer {index} reads layer {layer.owner} but has (window, kv heads, head dim, rotary positions) "
                    f"{layer.kind} where that has {self.layers[layer.owner].kind}: a group has one of each: share between "
                    "equal layers"
                )
        for name in ("time", "bits"):
            if len(getattr(self, name)) != len(readers):
                raise UserError(f"{len(getattr(self, name))} {name} entries for {len(readers)} owners: give one each")
        for owner, method in zip(sorted(readers), self.time, strict=True):
            if not method.allows_window and self.layers[owner].window is not None:
                raise UserError(
                    f"time '{method.format()}' in layer {owner}: it has a sliding window of {self.layers[owner].window}, and "
                    f"{method.name} is for full attention: leave it out of layer {owner}"
                )
        # A frozen dataclass is written through object: these are asked for once per layer and token.
        object.__setattr__(self, "owners", tuple(sorted(readers)))
        object.__setattr__(self, "_place", {owner: place for place, owner in enumerate(self.owners)})
        object.__setattr__(self, "_readers", {owner: tuple(group) for owner, group in readers.items()})

    @classmethod
    def plain(
        cls, num_layers: int, num_kv_heads: int, head_dim: int, windows: Sequence[int | None] | None = None
    ) -> Self:
        """Every layer an owner, nothing evicted or quantised; `windows` = the architecture's own, one per layer."""
        windows = [None] * num_layers if windows is None else windows
        return cls(
            layers=tuple(
                LayerKV(owner=index, num_kv_heads=num_kv_heads, head_dim=head_dim, window=window)
                for index, window in zip(range(num_layers), windows, strict=True)
            ),
            time=(FULL,) * num_layers,
            bits=(MODEL_BITS,) * num_layers,
        )

    @property
    def num_layers(self) -> int:
        """Decoder layers, owners and readers."""
        return len(self.layers)

    def owner_of(self, layer: int) -> int:
        """The layer whose keys and values `layer` attends to."""
        return self.layers[layer].owner

    def is_owner(self, layer: int) -> bool:
        """Whether `layer` computes and stores keys and values."""
        return layer in self._readers

    def readers_of(self, owner: int) -> tuple[int, ...]:
        """All layers of the owner's group, ascending, the owner itself first."""
        return self._readers[owner]

    def last_reader(self, owner: int) -> int:
        """The last layer of the group: after it has attended, what the step evicts may go."""
        return self._readers[owner][-1]

    def index_of(self, owner: int) -> int:
        """The owner's place among the owners."""
        return self._place[owner]

    def time_of(self, owner: int) -> Method:
        """The method in force: of a sliding owner under `full`, its own window without sinks."""
        method, window = self.time[self._place[owner]], self.layers[owner].window
        return method if window is None or method != FULL else Window(recent=Budget(fixed=window), sinks=0)

    def bits_of(self, owner: int) -> BitsSpec:
        """How the owner's entries are stored."""
        return self.bits[self._place[owner]]

    def base(self) -> Self:
        """The same owners and heads with nothing evicted and nothing quantised."""
        return self._with(time=(FULL,) * len(self.owners), bits=(MODEL_BITS,) * len(self.owners))

    @classmethod
    def parse(cls, text: str, base: Self) -> Self:
        """A `--layers` text applied to `base`, see `with_owners`."""
        slides = [layer.window is not None for layer in base.layers]
        return base.with_owners(owner_map(text, [layer.kind for layer in base.layers], slides))

    def with_owners(self, owners: Sequence[int]) -> Self:
        """The same model with other owners, one per layer: heads, windows and each remaining owner's method and storage stay."""
        if len(owners) != self.num_layers:
            raise UserError(f"{len(owners)} owners for {self.num_layers} layers: give one per layer")
        kept = sorted(set(owners))
        for owner in kept:
            if 0 <= owner < self.num_layers and not self.is_owner(owner):
                raise UserError(
                    f"layer {owner} would own keys and values, but in this model it reads layer {self.owner_of(owner)} "
                    f"and has none: choose owners among {', '.join(map(str, self.owners))}"
                )
        check_owners(owners)
        places = [self._place[owner] for owner in kept]
        return replace(
            self,
            layers=tuple(replace(layer, owner=owner) for layer, owner in zip(self.layers, owners, strict=True)),
            time=tuple(self.time[place] for place in places),
            bits=tuple(self.bits[place] for place in places),
        )

    def with_heads(self, num_kv_heads: int) -> Self:
        """The same with fewer KV heads: `num_kv_heads` divides each layer's, as heads merge in equal groups."""
        for index, layer in enumerate(self.layers):
            if num_kv_heads < 1 or layer.num_kv_heads % num_kv_heads:
                raise UserError(
                    f"heads {num_kv_heads}: layer {index} has {layer.num_kv_heads} KV heads, merged in equal groups: "
                    f"use {', '.join(str(n) for n in range(1, layer.num_kv_heads + 1) if layer.num_kv_heads % n == 0)}"
                )
        return replace(self, layers=tuple(replace(layer, num_kv_heads=num_kv_heads) for layer in self.layers))

    def with_rope(self, rope: Sequence[str]) -> Self:
        """The same with these kinds of rotary positions, one per layer."""
        kinds = zip(self.layers, rope, strict=True)
        layers = tuple(layer if layer.rope == kind else replace(layer, rope=kind) for layer, kind in kinds)
        return self if layers == self.layers else replace(self, layers=layers)

    def with_time(self, text: str) -> Self:
        """A `--time` text applied: what holds for all goes to full-attention owners, sliding ones must be named."""
        if ";" not in text and "=" not in text:
            return self._with(time=self._for_full_attention(parse_time(text)))
        rest, named = self._per_owner(text, parse_time)
        time = self.time if rest is None else self._for_full_attention(rest)
        return replace(self, time=tuple(named.get(owner, old) for owner, old in zip(self.owners, time, strict=True)))

    def with_bits(self, text: str) -> Self:
        """A `--bits` text applied; what holds for all holds for sliding owners too."""
        rest, named = self._per_owner(text, BitsSpec.parse)
        bits = self.bits if rest is None else [rest] * len(self.owners)
        return self._with(bits=tuple(named.get(owner, old) for owner, old in zip(self.owners, bits, strict=True)))

    def folded(self, time: str | None, bits: str | None) -> Self:
        """`with_time` and `with_bits` of what is given."""
        layout = self if time is None else self.with_time(time)
        return layout if bits is None else layout.with_bits(bits)

    def layers_text(self) -> str:
        """The owner map as a `--layers` text: a pattern's name where one fits."""
        parts = [(layer.owner, layer.kind, layer.window is not None) for layer in self.layers]
        return pattern_text(*zip(*parts, strict=True))

    def time_text(self) -> str:
        """What was asked for along time as a `--time` text: `with_time` of it gives this layout again."""
        full_owners = [i for i, owner in enumerate(self.owners) if self.layers[owner].window is None]
        texts = [method.format() for method in self.time]
        rest = most_common([texts[i] for i in full_owners]) or FULL.format()
        given = [rest if i in full_owners else FULL.format() for i in range(len(texts))]
        return join_per_owner(rest, given, texts, self.owners)

    def bits_text(self) -> str:
        """The storage as a `--bits` text: `with_bits` of it gives this layout again."""
        texts = [storage.format() for storage in self.bits]
        rest = most_common(texts) or MODEL_BITS.format()
        return join_per_owner(rest, [rest] * len(texts), texts, self.owners)

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values, as it stands in a checkpoint's config.json."""
        return {
            "format": FORMAT,
            "layers": [one.to_json() for one in self.layers],
            "time": [method.format() for method in self.time],
            "bits": [storage.format() for storage in self.bits],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The layout that `to_json` wrote. Raises `UserError` for another format or a missing or foreign key."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            newer = isinstance(found, int) and found > FORMAT
            raise UserError(
                f"layout format {found!r}: this kvfold reads format {FORMAT}: "
                f"{'update kvfold' if newer else 'write the layout again'}"
            )
        try:
            return cls(
                layers=tuple(LayerKV(**layer) for layer in data["layers"]),
                time=tuple(parse_time(text) for text in data["time"]),
                bits=tuple(BitsSpec.parse(text) for text in data["bits"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"layout with a missing or unknown part ({error}): it has layers, time, bits: write it again"
            ) from error

    def _with(self, **parts: tuple[Method, ...] | tuple[BitsSpec, ...]) -> Self:
        """The same owners, which were checked when this layout was made, with other methods or storage that fit them."""
        twin = copy(self)
        for name, value in parts.items():
            object.__setattr__(twin, name, value)
        return twin

    def _for_full_attention(self, method: Method) -> tuple[Method, ...]:
        """What a method that is given to all means for each owner."""
        return tuple(method if self.layers[owner].window is None else FULL for owner in self.owners)

    def _per_owner(self, text: str, parse: Callable[[str], Spec]) -> tuple[Spec | None, dict[int, Spec]]:
        """What a text gives to all (None: nothing) and to single owners; where two parts name one, the last wins."""
        rest, parts = split_per_owner(text)
        named: dict[int, Spec] = {}
        for layers, value in parts:
            if layers[-1] >= self.num_layers:
                raise UserError(f"'{text}': no layer {layers[-1]}: the model has layers 0 to {self.num_layers - 1}")
            owners = [owner for owner in self.owners if owner in layers]
            if not owners:
                raise UserError(
                    f"'{text}': layer {layers[0]} stores nothing, it reads layer {self.owner_of(layers[0])}: "
                    f"name an owner: {', '.join(map(str, self.owners))}"
                )
            named |= dict.fromkeys(owners, parse(value))
        return None if rest is None else parse(rest), named
