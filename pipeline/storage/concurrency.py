"""Many requests at once, in order and a bounded way ahead of whoever takes their results."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_END = object()
_ITEMS_AHEAD = 4  # of each source


def map_concurrently(
    function: Callable[[T], R],
    items: Iterable[T],
    concurrency: int = 32,
    *,
    pool: Executor | None = None,
    size_of: Callable[[T], int] = lambda item: 0,
    max_size: int = 1,
) -> Iterator[R]:
    """`function` over `items` in `concurrency` threads, results in order, at most twice that many items ahead.

    For requests that wait on a store, and for work that lets go of the interpreter; with `pool`, in its threads, which
    outlive the iterator. The items ahead have a total `size_of` of at most `max_size`, but for one that is larger
    alone. An exception is raised at its item's turn.
    """
    threads = pool or ThreadPoolExecutor(concurrency, thread_name_prefix="storage")
    pending: deque[Future[R]] = deque()
    sizes: deque[int] = deque()
    try:
        for item in items:
            sizes.append(size_of(item))
            while pending and sum(sizes) > max_size:
                sizes.popleft()
                yield pending.popleft().result()
            pending.append(threads.submit(function, item))
            if len(pending) >= 2 * concurrency:
                sizes.popleft()
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        if pool is None:
            threads.shutdown(wait=False)


def chain_ahead(sources: Iterable[Callable[[], Iterator[T]]], concurrency: int) -> Iterator[T]:
    """The items of all `sources` in order, `concurrency` of the sources a few items ahead of the reader.

    An exception is raised at its item's turn. No thread outlives the iterator.
    """
    stop = threading.Event()
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="listing")
    started: deque[queue.Queue[Any]] = deque()
    waiting = iter(sources)

    def start_next(count: int) -> None:
        for source in islice(waiting, count):
            started.append(queue.Queue(maxsize=_ITEMS_AHEAD))
            pool.submit(_drain, source, started[-1], stop)

    try:
        start_next(concurrency)
        while started:  # each has a thread of its own, so a full queue elsewhere cannot block the reader
            yield from _taken(started.popleft())
            start_next(1)
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def run_ahead(source: Iterable[T], num_items: int) -> Generator[T, None, None]:
    """The items of `source`, made in a thread of its own, at most `num_items` ahead of the reader.

    An exception is raised at its item's turn. The thread does not outlive the iterator.
    """
    stop = threading.Event()
    items: queue.Queue[Any] = queue.Queue(maxsize=num_items)
    thread = threading.Thread(target=_drain, args=(lambda: iter(source), items, stop), name="ahead", daemon=True)
    thread.start()
    try:
        yield from _taken(items)
    finally:
        stop.set()
        with suppress(queue.Empty):
            items.get_nowait()  # so that a thread that waits for room ends now
        thread.join()


def _drain(source: Callable[[], Iterator[T]], into: "queue.Queue[Any]", stop: threading.Event) -> None:
    """Put the source's items into the queue, then `_END` or the exception it ended with; give up at `stop`."""

    def items() -> Iterator[Any]:
        try:
            yield from source()
            yield _END
        except GeneratorExit:
            raise
        except BaseException as error:  # the reader waits for an end, whatever it is
            yield error

    for item in items():
        while not stop.is_set() and not _put(into, item):
            pass
        if stop.is_set():
            return


def _put(into: "queue.Queue[Any]", item: Any) -> bool:
    with suppress(queue.Full):
        into.put(item, timeout=0.2)
        return True
    return False


def _taken(items: "queue.Queue[Any]") -> Iterator[Any]:
    while (item := items.get()) is not _END:
        if isinstance(item, BaseException):
            raise item
        yield item
