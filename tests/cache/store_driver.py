"""Driving a cache without a model: random q, k, v fed layer by layer, in calls cut anywhere, and its books checked."""

import gc
import types
from collections import Counter
from dataclasses import dataclass, replace

import torch

from kvfold.cache.hf import FoldCache
from kvfold.layout.kvlayout import KVLayout
from kvfold.ops.rotation import Rotation
from slow_cache import Method, SlowCache

SCALE = 0.6
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
TIMES = ["full", "window:6+2", "h2o:4+4", "tova:8"]
"""One setting of each method, small enough to drop a lot."""
PATTERNS = [
    "cla2", "cla3", "cla4", "cla2-keep-ends", "cla2-dense-front", "cla2-dense-back", "yoco", "trailing:3", "0_1_0_1_4_4_0"
]  # fmt: skip
"""Ways to share the K and V of seven layers."""


def shared(owners, kv_heads=2, head_dim=8, windows=None) -> KVLayout:
    """A layout with this owner map."""
    return KVLayout.plain(len(owners), kv_heads, head_dim, windows).with_owners(owners)


def new_cache(layout, rows=1, *, kind=FoldCache, **options) -> FoldCache:
    """An fp32 cache whose fresh and freed pages are NaN."""
    return kind(layout, rows=rows, **({"dtype": torch.float32, "page_slots": 4, "poison": True} | options))


@dataclass
class Draw:
    """What a model would hand over for B texts of T columns: one tensor a layer, [B, T, heads, D]."""

    q: list
    k: list
    v: list
    real: torch.Tensor | None = None
    """bool [B, T]; None = no padding."""
    rotation: Rotation | None = None

    @property
    def rows(self):
        return self.q[0].shape[0]

    @property
    def columns(self):
        return self.q[0].shape[1]

    def part(self, columns=slice(None), rows=slice(None)):
        """Some columns of some rows."""
        turned = self.rotation and Rotation(
            cos_BTR=self.rotation.cos_BTR[:, columns], sin_BTR=self.rotation.sin_BTR[:, columns]
        )
        return Draw(*([x[rows, columns] for x in group] for group in (self.q, self.k, self.v)),
                    None if self.real is None else self.real[rows, columns], turned)  # fmt: skip


def draw(layout, columns, *, rows=1, group=2, seed=0, pads=None) -> Draw:
    """`group` query heads a kv head; `pads`: columns of padding at the left of each row."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (
        [torch.randn(rows, columns, layer.num_kv_heads * heads, layer.head_dim, generator=g) for layer in layout.layers]
        for heads in (group, 1, 1)
    )
    real = None if pads is None else torch.arange(columns) >= torch.tensor(pads)[:, None]
    return Draw(q, k, v, real)


def feed(cache, text: Draw, *, scale=SCALE, softcap=None):
    """One call; the outputs, one a layer. A reader's k and v stay with the driver, as a model has none."""
    layout = cache.layout
    with cache.call(text.real, num_rows=text.rows, num_tokens=text.columns, scale=scale, softcap=softcap) as view:
        return [
            view.attend(
                layer, text.q[layer], *((text.k[layer], text.v[layer]) if layout.is_owner(layer) else (None, None)),
                text.rotation,
            )
            for layer in range(layout.num_layers)
        ]  # fmt: skip


def pieces(text: Draw, cuts):
    """The text in calls of so many columns each; the last cut is repeated until the end."""
    start, cuts = 0, list(cuts)
    while start < text.columns:
        size = cuts.pop(0) if len(cuts) > 1 else cuts[0]
        yield text.part(slice(start, min(start + size, text.columns)))
        start += size


def feed_cut(cache, text: Draw, cuts, *, check=True, **options):
    """The whole text in several calls; outputs joined, one a layer."""
    outs = []
    for piece in pieces(text, cuts):
        outs.append(feed(cache, piece, **options))
        if check:
            check_books(cache.store)
    return [torch.cat(layer, dim=1) for layer in zip(*outs, strict=True)]


class Face(FoldCache):
    """A face that owns no rows: they stay when it goes, and the store may be told to free them."""

    def __del__(self):
        pass


def face_of(cache, rows) -> Face:
    """Another face of the same store, over these rows of it: what an engine does that batches rows anew in each call."""
    face = object.__new__(Face)
    face.__dict__.update(cache.__dict__ | {"rows": list(rows)})
    return face


def slow_twin(layout, text_time=None, *, rows, softcap=None) -> SlowCache:
    """The slow cache of this layout: a sliding owner that was asked for nothing keeps its window."""
    methods, windows = {}, {}
    for owner, spec in zip(layout.owners, layout.time, strict=True):
        methods[owner], windows[owner] = Method(spec.format()), layout.layers[owner].window
        if methods[owner].name == "full" and windows[owner] is not None:
            methods[owner] = Method(f"window:{windows[owner]}+0")
    return SlowCache(
        [layer.owner for layer in layout.layers], methods, windows,
        [layer.num_kv_heads for layer in layout.layers], rows, SCALE, softcap,
    )  # fmt: skip


def flags(text: Draw):
    """`real` as plain lists."""
    return [[True] * text.columns] * text.rows if text.real is None else text.real.tolist()


def assert_real_close(ours, theirs, real, **bounds):
    """Outputs agree wherever a token is real, and are numbers everywhere."""
    for one, other in zip(ours, theirs, strict=True):
        assert not one.isnan().any(), "poison or an empty softmax reached an output"
        chosen = slice(None) if real is None else real
        torch.testing.assert_close(one[chosen].double(), other[chosen].double(), **(CLOSE | bounds))


def check_books(store):
    """Every page is free or held, as often as its reference count says, and no stream of a freed sequence holds any."""
    for pool in store.pools:
        held = Counter()
        for group in store.groups:
            if group.pool is pool and group.length.numel():
                held.update(group.page_ids(group.ids(torch.arange(group.length.shape[1])))[2].tolist())
        free = pool.free_list[: pool.book.exact_free()].tolist()
        assert len(set(free)) == len(free), "a page stands twice among the free ones"
        assert not set(free) & set(held), "a free page is held"
        assert len(free) + len(held) == pool.book.capacity, "a page was lost"
        assert pool.references.tolist() == [held[page] for page in range(pool.book.capacity)], (
            "reference counts are off"
        )
        assert {array.shape[0] for array in pool.arrays.values()} == {pool.book.capacity}
    for group in store.groups:
        assert not store._free or not group.length[:, store._free].any(), "a freed sequence holds entries"
        for owner in range(len(group.owners)):
            for row in set(range(len(store._seen))) - store._in_call:
                most = group.method.max_kept(store._seen[row])
                assert int(group.length[owner, row].max()) <= most, (
                    f"{group.method.format()} keeps more than its budget"
                )


def page_of(group, row, index=0):
    """The page that the first owner's first head holds at a place of its table."""
    return group.tables.flat[group.starts(group.ids(torch.tensor([row]))[0, 0, 0]) + index]


def shared_page_bytes(store):
    """Bytes saved because lanes share pages."""
    sizes = store._page_bytes.values()
    return sum(
        int((pool.references.clamp(min=1) - 1).sum()) * size for pool, size in zip(store.pools, sizes, strict=True)
    )


def tensor_bytes(thing):
    """Bytes of all tensors that can be reached from `thing`, each storage once."""
    seen, storages, todo = set(), {}, [thing]
    passed = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.FrameType)
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, passed):
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            storage = one.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        todo.extend(gc.get_referents(one))
    return sum(storages.values())


def plain_time(layout, *times) -> KVLayout:
    """The layout with one spec an owner, in the order of the owners."""
    for owner, time in zip(layout.owners, times, strict=True):
        layout = layout.with_time(f"{owner}={time}")
    return layout


def with_sizes(layout, sizes) -> KVLayout:
    """Other (kv heads, head dim) a layer."""
    layers = zip(layout.layers, sizes, strict=True)
    return replace(layout, layers=tuple(replace(one, num_kv_heads=heads, head_dim=dim) for one, (heads, dim) in layers))
