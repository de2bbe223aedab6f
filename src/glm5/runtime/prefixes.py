"""Which pages already hold which beginnings of text: a tree whose edges are the tokens of one page.

A path from a root spells a prefix. Roots are kept apart by a salt (one owner's text is not seen by another's;
under prefix attention the whole prompt is part of it). Inner nodes are whole pages; a leaf may hold fewer
tokens, and is copied by whoever goes on from it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

from glm5.runtime.cache import PagePool

# Being found again counts as so many uses of other pages, up to a few times.
_WORTH, _MOST = 64, 8


@dataclass(eq=False)
class Node:
    """A page and the tokens in it, behind those of its parents."""

    tokens: tuple[int, ...]
    page: int
    parent: Node | None
    used: int = 0  # the tree's clock when it was last asked for
    hits: int = 0
    children: dict[int, list[Node]] = field(default_factory=dict)  # by their first token

    def child(self, tokens: tuple[int, ...]) -> Node | None:
        """The child with exactly these tokens."""
        return next((n for n in self.children.get(tokens[0], ()) if n.tokens == tokens), None)

    def all_children(self) -> Iterator[Node]:
        for nodes in self.children.values():
            yield from nodes

    @property
    def value(self) -> int:
        """The least useful leaf goes first: long unused, and seldom found."""
        return self.used + _WORTH * min(self.hits, _MOST)


class PrefixTree:
    """Finds, adds and gives up pages. It holds one reference to each page that it knows."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self._roots: dict[Hashable, Node] = {}
        self._clock = 0
        self.pages = 0

    def find(self, tokens: Sequence[int], salt: Hashable = None) -> tuple[list[int], int]:
        """(pages, count) of the longest known beginning of `tokens`; the last page may be held in part.

        The caller shares the pages at once: the next call may give them up.
        """
        self._clock += 1
        node, size, at = self._roots.get(salt), self.pool.page_tokens, 0
        pages: list[int] = []
        while node is not None and at < len(tokens):
            chunk = tuple(tokens[at : at + size])
            best, common = None, 0
            for candidate in node.children.get(chunk[0], ()):
                same = _common(candidate.tokens, chunk)
                if same > common:
                    best, common = candidate, same
            if best is None:
                break
            best.used, best.hits = self._clock, best.hits + 1
            pages.append(best.page)
            at += common
            node = best if common == size else None
        return pages, at

    def add(self, tokens: Sequence[int], pages: Sequence[int], salt: Hashable = None) -> None:
        """Know that `pages` hold `tokens`, the last of them perhaps in part."""
        if not tokens:
            return
        self._clock += 1
        node = self._roots.setdefault(salt, Node((), -1, None))
        size = self.pool.page_tokens
        for number, page in enumerate(pages):
            chunk = tuple(tokens[number * size : (number + 1) * size])
            if not chunk:
                break
            found = node.child(chunk)
            if found is None:
                siblings = node.children.get(chunk[0], ())
                if len(chunk) < size and any(n.tokens[: len(chunk)] == chunk for n in siblings):
                    break  # a longer page has it already
                for shorter in [n for n in siblings if chunk[: len(n.tokens)] == n.tokens]:
                    self._forget(shorter)
                found = Node(chunk, self.pool.share(page), node)
                node.children.setdefault(chunk[0], []).append(found)
                self.pages += 1
            elif found.page != page and self.pool.references[found.page] == 1:
                # The same tokens twice: keep the page that somebody holds anyway.
                self.pool.drop(found.page)
                found.page = self.pool.share(page)
            found.used = self._clock
            node = found

    def give_up(self, wanted: int) -> int:
        """Forget the least useful pages until `wanted` more are free; returns how many became free.

        A page that a running sequence holds too does not become free by it, and is kept.
        """
        before = self.pool.free_pages
        while self.pool.free_pages - before < wanted:
            leaves = [n for n in self._leaves() if self.pool.references[n.page] == 1]
            if not leaves:
                break
            leaves.sort(key=lambda n: n.value)
            missing = wanted - (self.pool.free_pages - before)
            for leaf in leaves[: max(1, missing)]:
                self._forget(leaf)
        return self.pool.free_pages - before

    def forget_page(self, page: int) -> bool:
        """Forget a leaf by its page; was there one?"""
        leaf = next((n for n in self._leaves() if n.page == page), None)
        if leaf is not None:
            self._forget(leaf)
        return leaf is not None

    def clear(self) -> None:
        """Forget everything."""
        for root in self._roots.values():
            for node in list(root.all_children()):
                self._drop(node)
        self._roots.clear()

    def reclaimable(self) -> int:
        """Pages that nobody but the tree holds, and nothing held stands behind."""
        return sum(
            _free_below(child, self.pool)[0] for r in self._roots.values() for child in r.all_children()
        )

    def paths(self) -> Iterator[tuple[Hashable, list[Node]]]:
        """Every leaf's way from its root, with the root's salt."""
        for salt, root in self._roots.items():
            for leaf in _leaves_below(root):
                way: list[Node] = []
                node: Node | None = leaf
                while node is not None and node.parent is not None:
                    way.append(node)
                    node = node.parent
                if way:
                    yield salt, way[::-1]

    def _leaves(self) -> Iterator[Node]:
        for root in self._roots.values():
            yield from (n for n in _leaves_below(root) if n.parent is not None)

    def _forget(self, leaf: Node) -> None:
        assert not leaf.children and leaf.parent is not None
        siblings = leaf.parent.children[leaf.tokens[0]]
        siblings.remove(leaf)
        if not siblings:
            del leaf.parent.children[leaf.tokens[0]]
        self.pool.drop(leaf.page)
        self.pages -= 1

    def _drop(self, node: Node) -> None:
        stack = [node]
        while stack:
            each = stack.pop()
            stack += each.all_children()
            self.pool.drop(each.page)
            self.pages -= 1


def _leaves_below(node: Node) -> Iterator[Node]:
    stack = [node]
    while stack:
        each = stack.pop()
        if each.children:
            stack += each.all_children()
        else:
            yield each


def _free_below(node: Node, pool: PagePool) -> tuple[int, bool]:
    """(pages that can be given up at and below a node, whether the node is among them)."""
    # Without recursion: a path is as long as a context.
    order, stack = [], [node]
    while stack:
        each = stack.pop()
        order.append(each)
        stack += each.all_children()
    free: dict[int, bool] = {}
    total = 0
    for each in reversed(order):
        mine = pool.references[each.page] == 1 and all(free[id(c)] for c in each.all_children())
        free[id(each)] = mine
        total += mine
    return total, free[id(node)]


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens that both begin with."""
    for count, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return count
    return min(len(first), len(second))
