"""Who holds which pages: running requests, the tree of known beginnings, the folder on disk."""

from __future__ import annotations

from collections.abc import Sequence

from glm5.runtime.cache import PagePool
from glm5.runtime.cache import Sequence as Timeline
from glm5.runtime.prefixes import PrefixTree
from glm5.runtime.request import Request
from glm5.runtime.store import PageStore


class PageMemory:
    """The pages of an engine's requests. What a request let go of stays known until the room is wanted."""

    def __init__(self, pool: PagePool, store: PageStore | None = None) -> None:
        self.pool, self.store = pool, store
        self.prefixes = PrefixTree(pool)

    def start(self, request: Request) -> None:
        """Give a request the pages that hold its beginning already; its last token is always read."""
        if self.store is not None:
            self._fetch(request, self.store)
        timeline = request.timeline = Timeline(self.pool)
        pages, count = self.prefixes.find(request.tokens, request.salt)
        count = min(count, len(request.tokens) - 1)
        if count < request.prefix - 1:  # each of its tokens sees all of them
            count = 0
        for page in pages[: -(-count // self.pool.page_tokens)]:
            timeline.append(self.pool.share(page))
        timeline.length = count
        if not request.output_ids:
            request.statistics.cached_tokens = count

    def know(self, request: Request, length: int) -> None:
        """Let others find what the request has read of its first `length` tokens."""
        assert request.timeline is not None
        size = self.pool.page_tokens
        pages = request.timeline.pages[: -(-length // size)]
        self.prefixes.add(request.tokens[:length], pages, request.salt)

    def fits(self, running: Sequence[Request], tokens: int) -> bool:
        """Is there room for so many tokens beside what runs, if all that is not in use were given up?"""
        wanted = -(-tokens // self.pool.page_tokens)
        for other in running:  # each reads the rest of its prompt, and grows
            assert other.timeline is not None
            wanted += 1 + other.timeline.pages_missing(other.timeline.length + other.pending)
        if wanted <= self.pool.free_pages:
            return True
        return wanted <= self.pool.free_pages + self.prefixes.reclaimable()

    def reserve(self, request: Request, tokens: int) -> bool:
        """Have room for more tokens of a request, giving up what is not in use; False if there is none."""
        timeline = request.timeline
        assert timeline is not None
        missing = timeline.pages_missing(timeline.length + tokens)
        if not missing:
            return True
        if missing > self.pool.free_pages:
            short = missing - self.pool.free_pages
            self.prefixes.give_up(max(short, self.pool.num_pages // 64))
        if missing > self.pool.free_pages:
            # The begun page would be copied for the tree's sake: rather let the tree forget it.
            begun = timeline.length // self.pool.page_tokens
            if begun < len(timeline.pages) and self.prefixes.forget_page(timeline.pages[begun]):
                missing = timeline.pages_missing(timeline.length + tokens)
        if missing > self.pool.free_pages:
            return False
        timeline.reserve(timeline.length + tokens)
        return True

    def let_go(self, request: Request) -> None:
        """The request holds nothing any more; what it has read stays known."""
        if request.timeline is None:
            return
        self.know(request, request.timeline.length)
        if self.store is not None:
            self._keep(request, self.store)
        request.timeline.release()
        request.timeline = None
        if not request.finished:
            request.statistics.preemptions += 1

    def forget(self) -> None:
        """Give up every page that no running request holds."""
        self.prefixes.clear()

    def _fetch(self, request: Request, store: PageStore) -> None:
        """Take what the folder has of the request's beginning into the tree, as far as there is room."""
        size, tokens = self.pool.page_tokens, request.tokens
        pages, count = self.prefixes.find(tokens, request.salt)
        pages = [self.pool.share(page) for page in pages[: count // size]]
        key = store.first_key(request.salt)
        try:
            for number in range((len(tokens) - 1) // size):
                key = store.next_key(key, tokens[number * size : (number + 1) * size])
                if number < len(pages):
                    continue
                if self.pool.free_pages < 2 and not self.prefixes.give_up(self.pool.num_pages // 64 + 1):
                    break
                page = self.pool.take()
                pages.append(page)
                if not store.load(key, self.pool, page):
                    self.pool.drop(pages.pop())
                    break
            self.prefixes.add(tokens[: len(pages) * size], pages, request.salt)
        finally:
            for page in pages:
                self.pool.drop(page)

    def _keep(self, request: Request, store: PageStore) -> None:
        """Write the request's whole pages to the folder."""
        timeline = request.timeline
        assert timeline is not None
        size, key = self.pool.page_tokens, store.first_key(request.salt)
        for number in range(timeline.length // size):
            key = store.next_key(key, request.tokens[number * size : (number + 1) * size])
            # What it had to read itself is not in the folder, or is damaged there.
            anew = number >= request.statistics.cached_tokens // size
            store.save(key, self.pool, timeline.pages[number], anew=anew)
