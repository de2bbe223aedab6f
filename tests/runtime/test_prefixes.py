"""The tree of prefixes against a plain search, and what it gives up first."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm5.runtime.cache import PagePool, Sequence
from glm5.runtime.prefixes import PrefixTree
from tests.model_fixture import tiny_config

SIZE = 3
texts = st.lists(st.integers(0, 2), min_size=1, max_size=14)


def tree_of(pages: int = 200) -> PrefixTree:
    pool = PagePool(tiny_config(num_hidden_layers=1), pages, dtype=torch.float32, page_tokens=SIZE)
    return PrefixTree(pool)


def added(tree: PrefixTree, tokens: list[int], salt: str | None = None) -> list[int]:
    """As the engine adds: what is known is shared, the rest is written and let go of."""
    sequence = Sequence(tree.pool)
    pages, count = tree.find(tokens, salt)
    for page in pages:
        sequence.append(tree.pool.share(page))
    sequence.length = count
    sequence.reserve(len(tokens))
    found = list(sequence.pages)
    tree.add(tokens, found, salt)
    sequence.release()
    return found


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(texts, st.sampled_from([None, "a"])), max_size=12), texts)
def test_the_longest_known_beginning_is_found(
    known: list[tuple[list[int], str | None]], asked: list[int]
) -> None:
    tree = tree_of()
    for text, salt in known:
        added(tree, text, salt)
    for salt in (None, "a"):
        pages, count = tree.find(asked, salt)
        best = 0
        for text, own in known:
            same = next((i for i, (a, b) in enumerate(zip(text, asked, strict=False)) if a != b), None)
            if own == salt:
                best = max(best, min(len(text), len(asked)) if same is None else same)
        assert count == best
        assert len(pages) == -(-count // SIZE)
    assert tree.pages == tree.pool.num_pages - tree.pool.free_pages
    assert tree.reclaimable() == tree.pages
    tree.clear()
    assert (tree.pages, tree.pool.free_pages) == (0, tree.pool.num_pages)


def test_a_longer_page_takes_the_place_of_a_shorter_one() -> None:
    tree = tree_of()
    added(tree, [1, 2, 3, 4])
    added(tree, [1, 2, 3, 4, 5])
    assert tree.pages == 2
    added(tree, [1, 2, 3, 4])  # is known
    assert tree.pages == 2


def test_the_least_useful_leaf_is_given_up_first_and_a_held_page_never() -> None:
    tree = tree_of(6)
    old, found, new = ([n] * SIZE for n in range(3))
    added(tree, old)
    added(tree, found)
    for _ in range(2):
        tree.find(found)
    added(tree, new)
    assert tree.give_up(1) == 1
    assert [tree.find(text)[1] for text in (old, found, new)] == [0, SIZE, SIZE]
    held = tree.pool.share(tree.find(new)[0][0])
    assert tree.reclaimable() == 1
    assert tree.give_up(5) == 1
    assert [tree.find(text)[1] for text in (found, new)] == [0, SIZE]
    tree.pool.drop(held)
    assert tree.give_up(1) == 1


def test_a_page_goes_only_when_nothing_stands_behind_it() -> None:
    tree = tree_of()
    added(tree, [0] * 9)
    assert tree.give_up(1) == 1
    assert tree.find([0] * 9)[1] == 6
