"""Work on the next items while one is used: images are decoded while a model looks at others."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], ahead: int = 2
) -> Iterator[tuple[Item, "Future[Result]"]]:
    """Each item with ``function(item)``, which another thread computes, in the order of the items.

    What is not used yet is bounded, however many items there are.

    Args:
        ahead: results beyond the one in use that are made; as many more items are taken from ``items``.

    Yields:
        the item, and its future: ``result()`` waits, and raises what the function raised for this item alone.
    """
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read_ahead")
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > ahead:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(cancel_futures=True)
