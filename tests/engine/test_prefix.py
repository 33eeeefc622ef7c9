"""The tree of prefixes against a list that is searched from end to end."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.engine.scheduler import PrefixTree

GRID = 4
texts = st.lists(st.integers(0, 1), max_size=14)


def new_tree(anywhere=True, **options):
    return PrefixTree({"a": GRID, "b": GRID}, {"a": anywhere, "b": anywhere}, **options)


@settings(deadline=None, max_examples=60)
@given(
    actions=st.lists(st.tuples(st.sampled_from(["insert", "match", "visit", "evict"]), texts), max_size=25),
    anywhere=st.booleans(),
)
def test_equals_a_list_of_prefixes(actions, anywhere):
    tree, held, number = new_tree(anywhere), {}, 0
    for action, tokens in actions:
        if action == "insert":
            number += 1
            fits = bool(tokens) and (anywhere or len(tokens) % GRID == 0) and tuple(tokens) not in held
            assert tree.insert("a", tokens, number) == fits
            if fits:
                held[tuple(tokens)] = number
        elif action == "visit":
            tree.visit("a", tokens)
        elif action == "match":
            fitting = [one for one in held if len(one) < len(tokens) and tuple(tokens[: len(one)]) == one]
            best = max(fitting, key=len, default=None)
            assert tree.match("a", tokens) == (None if best is None else (len(best), held[best]))
            if best is not None:
                held[best] = held.pop(best)
        else:
            oldest = next(iter(held), None)
            assert tree.evict() == (None if oldest is None else ("a", held.pop(oldest)))
        assert tree.snapshots == [("a", handle) for handle in held.values()]
        assert tree.match("b", [0, 1, 0]) is None


def test_a_border_is_where_a_second_prompt_parts_from_a_first():
    tree = new_tree()
    first, second, third = [1] * 8 + [2] * 8, [1] * 8 + [3] * 8, [1] * 12
    tree.visit("a", first)
    assert tree.border("a", first, 0) is None, "nobody else came this way"
    tree.visit("a", second)
    assert tree.border("a", first, 0) == tree.border("a", second, 0) == 8
    assert tree.border("a", first, 8) is None
    tree.visit("a", third)
    assert tree.border("a", third, 0) == 8 and tree.shared("a", third, first) == 8
    assert tree.insert("a", [1] * 8, 7) and tree.border("a", first, 0) is None, "a snapshot is there already"
    assert tree.match("a", third) == (8, 7)


def test_a_repeated_prompt_is_shared_up_to_its_last_token():
    tree = new_tree()
    for _ in range(2):
        tree.visit("a", [5] * 12)
    assert tree.border("a", [5] * 12, 0) == tree.shared("a", [5] * 12, [5] * 12) == 11
    tree = new_tree(anywhere=False)
    for _ in range(2):
        tree.visit("a", [5] * 12)
    assert tree.border("a", [5] * 12, 0) == tree.shared("a", [5] * 12, [5] * 12) == 8


@pytest.mark.parametrize(("anywhere", "border"), [(True, 10), (False, 8)])
def test_a_border_lies_where_most_others_part(anywhere, border):
    """Three questions about one text of 10 tokens; two of them begin alike, which saves less."""
    tree = new_tree(anywhere=anywhere)
    prompts = [[7] * 10 + question for question in ([1, 2], [1, 3], [4, 5])]
    for prompt in prompts:
        tree.visit("a", prompt)
    assert [tree.border("a", prompt, 0) for prompt in prompts] == [border] * 3
    assert tree.insert("a", [7] * border, 1) and tree.border("a", prompts[0], border) is None
    assert [tree.match("a", prompt) for prompt in prompts] == [(border, 1)] * 3


def test_remembered_blocks_are_bounded_and_snapshots_survive():
    tree = new_tree(max_blocks=20)
    assert tree.insert("a", [9] * 8, 1)
    for number in range(50):
        tree.visit("a", [number] * 9)
        assert tree._blocks <= 20
    assert tree.match("a", [9] * 9) == (8, 1)
    tree.visit("a", [49] * 9)
    assert tree.border("a", [49] * 9, 0) == 8, "the newest are remembered"


@pytest.mark.parametrize("tokens", [[1, 2, 3], [1] * 5])
def test_off_the_grid_only_where_the_cuts_do_not_matter(tokens):
    assert not new_tree(anywhere=False).insert("a", tokens, 1)
    assert new_tree().insert("a", tokens, 1)
