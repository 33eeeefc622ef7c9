"""Owner maps by name: which layer's K and V each layer reads, for any number of layers.

An owner map is a tuple with one owner per layer. A layer's `kind` is whatever must agree within a group (attention
window, head shape, rotary positions). Sources: arXiv 2405.12981 section 2.2 and appendix (CLA, keep-ends, dense-front,
dense-back), arXiv 2405.05254 (YOCO), Gemma 3n (trailing). Differs: the non-uniform maps, published for 20 layers, are given
for any number of layers.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Sequence

from kvfold.errors import UserError, unknown_name

OwnerMap = tuple[int, ...]


def _grouped(num_layers: int, factor: int) -> OwnerMap:
    """Groups of `factor` neighbours that read their lowest layer; the short group, if there is one, comes first."""
    short = num_layers % factor
    return tuple(0 if layer < short else layer - (layer - short) % factor for layer in range(num_layers))


PATTERNS: dict[str, tuple[int, Callable[[int], Iterable[int]]]] = {
    "full": (1, range),
    "cla2": (2, lambda n: _grouped(n, 2)),
    "cla3": (3, lambda n: _grouped(n, 3)),
    "cla4": (4, lambda n: _grouped(n, 4)),
    # The first and the last layer alone, pairs between.
    "cla2-keep-ends": (4, lambda n: (0, *(1 + owner for owner in _grouped(n - 2, 2)), n - 1)),
    # The first half and the last layer own; all between read the last of the first half.
    "cla2-dense-front": (3, lambda n: (*(min(layer, n // 2 - 1) for layer in range(n - 1)), n - 1)),
    # Layers 0 and 1 and the last half own; all between read layer 1.
    "cla2-dense-back": (4, lambda n: (1 if 2 <= layer <= n // 2 else layer for layer in range(n))),
    # The lower half owns, up to layer n // 2, which all later layers read.
    "yoco": (3, lambda n: (min(layer, n // 2) for layer in range(n))),
}
"""Owner maps that depend on the number of layers alone: the fewest layers that they fit, and the map."""


def named_map(name: str, num_layers: int) -> OwnerMap:
    """The map of one of `PATTERNS`."""
    least, owners = PATTERNS[name]
    if num_layers < least:
        raise _misfit(name, num_layers, f"it needs {least} layers or more")
    return tuple(owners(num_layers))


def trailing(kinds: Sequence[Hashable], num_readers: int) -> OwnerMap:
    """Each of the last `num_readers` layers reads the nearest earlier owner of its own kind."""
    num_owners = len(kinds) - num_readers
    if num_readers < 1 or num_owners < 1:
        raise _misfit(f"trailing:{num_readers}", len(kinds), f"N is 1 to {len(kinds) - 1}")
    nearest = {kinds[layer]: layer for layer in range(num_owners)}
    for layer in range(num_owners, len(kinds)):
        if kinds[layer] not in nearest:
            rule = f"no layer below {num_owners} is of the same kind as layer {layer}"
            raise _misfit(f"trailing:{num_readers}", len(kinds), rule)
    return (*range(num_owners), *(nearest[kind] for kind in kinds[num_owners:]))


def owner_map(text: str, kinds: Sequence[Hashable], sliding: Sequence[bool]) -> OwnerMap:
    """The owner map of a `--layers` text for a model whose layers have these `kinds` and are `sliding` or not."""
    text = text.strip()
    if text in PATTERNS:
        owners = named_map(text, len(kinds))
    elif re.fullmatch(r"trailing:\d+", text, re.ASCII):
        owners = trailing(kinds, int(text.partition(":")[2]))
    elif re.fullmatch(r"\d+s?(_\d+s?)*", text, re.ASCII):
        owners = _explicit(text, sliding)
    elif best_of(text) is not None:
        raise UserError(
            f"layers '{text}': which layers these are has to be measured: `kvfold convert --layers {text}` does so and says"
        )
    else:
        raise unknown_name("layer pattern", text, [*PATTERNS, "trailing:N", "0_0_2_2..."])
    check_owners(owners)
    for layer, owner in enumerate(owners):
        if kinds[layer] != kinds[owner]:
            raise UserError(
                f"layers '{text}': layer {layer} would read layer {owner}, which differs in window, head shape or rotary "
                "positions: a group has one of each: name a map that shares within a kind, such as 'trailing:N' or '0_1_0_1...'"
            )
    return owners


def best_of(text: str | None) -> int | None:
    """How many owners `best:N` asks for: the cheapest, which no text says, since that depends on the weights. None for any
    other text.
    """
    match = re.fullmatch(r"best:(\d+)", (text or "").strip(), re.ASCII)
    return int(match[1]) if match else None


def check_owners(owners: Sequence[int]) -> None:
    """Raise `UserError` unless every owner exists, owns itself and is not above its readers."""
    for layer, owner in enumerate(owners):
        if not 0 <= owner <= layer:
            raise UserError(f"layer {layer} reads layer {owner}: an owner is never above its readers: use 0 to {layer}")
        if owners[owner] != owner:
            raise UserError(
                f"layer {layer} reads layer {owner}, which itself reads layer {owners[owner]}: an owner owns itself: "
                f"write {owners[owner]} for layer {layer}"
            )


def explicit_text(owners: Sequence[int], sliding: Sequence[bool]) -> str:
    """The map layer by layer, `s` after a sliding layer: `0_0_2s_2s`."""
    return "_".join(f"{owner}{'s' if slides else ''}" for owner, slides in zip(owners, sliding, strict=True))


def pattern_text(owners: OwnerMap, kinds: Sequence[Hashable], sliding: Sequence[bool]) -> str:
    """The shortest `--layers` text that gives this map on these layers: a name where one fits, else layer by layer."""
    for name in [*PATTERNS, *(f"trailing:{n}" for n in range(1, len(owners)))]:
        try:
            if owner_map(name, kinds, sliding) == owners:
                return name
        except ValueError:
            continue
    return explicit_text(owners, sliding)


def _explicit(text: str, sliding: Sequence[bool]) -> OwnerMap:
    parts = text.split("_")
    if len(parts) != len(sliding):
        raise _misfit(text, len(sliding), f"it names {len(parts)} layers: name each layer's owner once")
    for layer, part in enumerate(parts):
        if part.endswith("s") and not sliding[layer]:
            raise UserError(
                f"layers '{text}': 's' marks layer {layer} as sliding, but the model's is not: "
                "a map changes who shares, never the attention type: leave the 's' out"
            )
    return tuple(int(part.removesuffix("s")) for part in parts)


def _misfit(pattern: str, num_layers: int, rule: str) -> UserError:
    return UserError(f"layers '{pattern}' does not fit a model of {num_layers} layers: {rule}")
