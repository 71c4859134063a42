"""The pages of one group of layers: free, held by rows, or kept for later rows with the same prefix."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence


class PagePool:
    """Counts the holders of every page. A page with a key may have several, and is kept when the last one leaves.

    Kept pages are evicted, least recently used first, when a row needs pages or more than `max_kept` are kept. A held
    page is never evicted. `wipe`: zero these pages, whose contents are no longer needed.
    """

    def __init__(self, num_pages: int, max_kept: int, wipe: Callable[[Sequence[int]], None]) -> None:
        self._max_kept, self._wipe = max_kept, wipe
        self._free = list(reversed(range(num_pages)))  # a stack, so that new rows get adjacent pages
        self._num_holders = [0] * num_pages
        self._kept: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, tuple[bytes, Collection[str]]] = {}  # page -> key, and the weights that computed it
        self.num_evicted = 0  # since the start

    @property
    def num_available(self) -> int:
        """Return the number of pages that `take` can give."""
        return len(self._free) + len(self._kept)

    @property
    def num_cached(self) -> int:
        """Return the number of pages with a key, held or kept."""
        return len(self._key_of)

    def find(self, key: bytes) -> int | None:
        return self._page_of.get(key)

    def is_kept(self, page: int) -> bool:
        """Return whether no row holds the cached page."""
        return page in self._kept

    def take(self, num_pages: int) -> list[int] | None:
        """Return zeroed pages with one holder, evicting kept ones if needed. None, and no change, if too few exist."""
        if num_pages > self.num_available:
            return None
        self._evict(num_pages - len(self._free))
        taken = [self._free.pop() for _ in range(num_pages)]
        for page in taken:
            self._num_holders[page] = 1
        return taken

    def hold(self, page: int) -> None:
        """Add a holder to a cached page."""
        self._num_holders[page] += 1
        self._kept.pop(page, None)

    def release(self, pages: Sequence[int]) -> None:
        """Drop one holder of each page, given in token order. The last holder's pages are kept or wiped."""
        gone = []
        for page in reversed(pages):  # later blocks are evicted first: they are useless without the earlier ones
            self._num_holders[page] -= 1
            if self._num_holders[page] == 0:
                if page in self._key_of:
                    self._kept[page] = None
                else:
                    gone.append(page)
        self._discard(gone)
        self._evict(len(self._kept) - self._max_kept)

    def register(self, page: int, key: bytes, weights_digests: Collection[str]) -> int:
        """Give the held page this key, so that other rows may hold it too.

        If another page has the key, hold that one instead and release `page`. Return the page that has the key.
        """
        found = self._page_of.setdefault(key, page)
        if found == page:
            self._key_of[page] = key, weights_digests
        else:
            self.hold(found)
            self.release([page])
        return found

    def unregister(self, pages: Sequence[int]) -> None:
        """Take the keys from these pages, so that no other row will hold them."""
        gone = []
        for page in pages:
            if page in self._key_of:
                del self._page_of[self._key_of.pop(page)[0]]
                if page in self._kept:
                    del self._kept[page]
                    gone.append(page)
        self._discard(gone)

    def forget(self, digests: frozenset[str] | None) -> None:
        """Take the keys from all pages that these weights computed; None: from all pages."""
        self.unregister(
            [page for page, (_, of) in self._key_of.items() if digests is None or not digests.isdisjoint(of)]
        )

    def _evict(self, num_pages: int) -> None:
        """Unregister the least recently used kept pages."""
        if num_pages > 0:
            oldest = [page for page, _ in zip(self._kept, range(num_pages), strict=False)]
            self.num_evicted += len(oldest)
            self.unregister(oldest)

    def _discard(self, pages: Sequence[int]) -> None:
        """Wipe pages that nothing needs, and free them."""
        if pages:
            self._wipe(pages)
            self._free += pages
