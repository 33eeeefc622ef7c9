"""A method that kvfold does not know: the package under examples/third_party, found as an installed one is."""

import tomllib
from pathlib import Path

import pytest
import torch

from kvfold.cache.allocator import CacheFull
from kvfold.layout.kvlayout import KVLayout
from kvfold.layout.planner import layout_bytes
from kvfold.methods import registry
from kvfold.methods.registry import parse_time
from store_driver import (
    SCALE,
    assert_real_close,
    check_books,
    draw,
    feed,
    feed_cut,
    new_cache,
    shared,
)  # fmt: skip

EXAMPLE = Path(__file__).parents[2] / "examples" / "third_party"


@pytest.fixture(autouse=True)
def own_registries(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The example as pip would leave it: its package on the path, and a .dist-info that names its entry points."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    about = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    (about / "entry_points.txt").write_text(
        "\n".join(f"[{group}]\n" + "\n".join(f"{name} = {place}" for name, place in points.items())
                  for group, points in project["entry-points"].items())
    )  # fmt: skip
    (tmp_path / "kvfold_keepeven").symlink_to(EXAMPLE / "kvfold_keepeven")
    monkeypatch.syspath_prepend(str(tmp_path))


def stays(position, seen, block=4):
    """keepeven by its definition: how many of the first tokens have been thinned."""
    thinned = 0
    while seen - thinned >= 2 * block:
        thinned += block
    return position >= thinned or position % 2 == 0


def kept_of(seen, block=4):
    return [position for position in range(seen) if stays(position, seen, block)]


def expected(layout, text, block=4):
    """Every query over exactly what it may see, by a mask."""
    real = torch.ones(text.rows, text.columns, dtype=torch.bool) if text.real is None else text.real
    position = real.long().cumsum(dim=1) - 1
    seen = torch.eye(text.columns, dtype=torch.bool).repeat(text.rows, 1, 1)
    for row in range(text.rows):
        for t in range(text.columns):
            for e in range(t + 1):
                if real[row, t] and real[row, e]:
                    seen[row, t, e] = stays(int(position[row, e]), int(position[row, t]) + 1, block)
    outs = []
    for layer in range(layout.num_layers):
        owner = layout.owner_of(layer)
        q, k, v = (x.transpose(1, 2).double() for x in (text.q[layer], text.k[owner], text.v[owner]))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen[:, None], scale=SCALE, enable_gqa=True
        )
        outs.append(out.transpose(1, 2))
    return outs


def test_an_unknown_name_is_refused_while_the_package_is_not_there():
    with pytest.raises(ValueError, match="keepeven"):
        parse_time("keepeven:4")


@pytest.mark.parametrize("cuts", [[1], [30], [7, 1, 1, 9, 1]], ids=str)
@pytest.mark.parametrize("owners", [[0, 1], [0, 0, 2, 2]], ids=str)
def test_the_example_runs_as_an_installed_package(installed, cuts, owners):
    layout = shared(owners).with_time("keepeven:4")
    text = draw(layout, 30, rows=3, pads=[0, 3, 17])
    cache = new_cache(layout, 3)
    assert_real_close(feed_cut(cache, text, cuts), expected(layout, text), text.real)
    assert cache.kept_positions == [[[kept_of(seen)] * 2 for seen in (30, 27, 13)] for _ in layout.owners]
    assert cache.allocated_bytes <= layout_bytes(layout, [30, 27, 13], 4, 4)


def test_several_entries_of_a_head_go_in_one_step_and_their_pages_are_free(installed):
    layout = KVLayout.plain(2, 2, 8).with_time("keepeven:8; 1=full")
    cache, kept = new_cache(layout, page_slots=2), []
    for step in range(32):
        feed(cache, draw(layout, 1, seed=step))
        check_books(cache.store)
        kept.append(int(cache.kept_tokens[0, 0, 0]))
        assert cache.kept_positions[0][0] == [kept_of(step + 1, 8)] * 2
        assert cache.kept_positions[1][0] == [list(range(step + 1))] * 2
    assert [kept[15] - kept[14], kept[23] - kept[22], kept[31] - kept[30]] == [-3, -3, -3]


def test_the_example_within_a_budget_and_with_copies(installed):
    layout = KVLayout.plain(2, 2, 8).with_time("keepeven:4")
    memory = layout_bytes(layout, [40] * 3, 4, 4)
    text, more = draw(layout, 20), draw(layout, 14, seed=1)
    cache = new_cache(layout, 1, memory_bytes=memory)
    feed(cache, text)
    twin = cache.copy()
    outs = [feed_cut(one, more, [1]) for one in (twin, cache)]
    for ours, theirs in zip(*outs, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    assert cache.kept_positions == twin.kept_positions == [[[kept_of(34)] * 2]] * 2
    with pytest.raises(CacheFull):
        feed(cache, draw(layout, 400))
    assert_real_close(feed(cache, draw(layout, 2, seed=2)), feed(twin, draw(layout, 2, seed=2)), None)


def test_the_example_says_how_much_it_keeps(installed):
    spec = parse_time("keepeven:4")
    assert parse_time(spec.format()) == spec
    most = 0
    for seen in range(100):
        most = max(most, len(kept_of(seen)))
        assert spec.max_kept(seen) == most, seen
    for text, match in (
        ("keepeven:0", "1 token or more"),
        ("keepeven:x", "whole number"),
        ("keepeven", "whole number"),
    ):
        with pytest.raises(ValueError, match=match) as found:
            parse_time(text)
        assert "\n" not in str(found.value)


def test_the_example_is_short():
    assert len((EXAMPLE / "kvfold_keepeven" / "keepeven.py").read_text().splitlines()) < 60
