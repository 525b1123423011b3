import threading
import time
from collections.abc import Iterator
from functools import partial
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.storage.concurrency import chain_ahead, run_ahead


def test_mapping_concurrently_keeps_order_and_stays_a_bounded_way_ahead() -> None:
    started: list[int] = []

    def square(number: int) -> int:
        started.append(number)
        time.sleep(0.001 * (number % 3))
        return number * number

    results = storage.map_concurrently(square, range(1000), concurrency=4)
    assert [next(results) for _ in range(10)] == [number * number for number in range(10)]
    assert len(started) <= 10 + 2 * 4
    results.close()  # type: ignore[attr-defined]


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 9), max_size=30), max_size=st.integers(1, 20), concurrency=st.integers(1, 4))
def test_items_ahead_have_a_bounded_size(sizes: list[int], max_size: int, concurrency: int) -> None:
    submitted: list[int] = []

    def submit(number: int) -> int:
        submitted.append(number)
        return number

    places = range(len(sizes))
    results = storage.map_concurrently(submit, places, concurrency, size_of=lambda n: sizes[n], max_size=max_size)
    for number, result in enumerate(results):
        assert result == number
        time.sleep(0)
        ahead = [n for n in list(submitted) if n > number]
        assert len(ahead) < 2 * concurrency
        assert sum(sizes[n] for n in ahead) <= max_size or len(ahead) == 1
    assert sorted(submitted) == list(places)


def test_mapping_concurrently_raises_at_the_items_turn() -> None:
    results = storage.map_concurrently(lambda number: 1 // (2 - number), range(5), concurrency=2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 12), max_size=8), concurrency=st.integers(1, 4))
def test_chained_sources_give_every_item_once_in_order(lengths: list[int], concurrency: int) -> None:
    sources = [partial(iter, [(source, item) for item in range(length)]) for source, length in enumerate(lengths)]
    expected = [(source, item) for source, length in enumerate(lengths) for item in range(length)]
    assert list(chain_ahead(sources, concurrency)) == expected


def test_a_chained_source_that_fails_raises_at_its_items_turn() -> None:
    def failing() -> Iterator[int]:
        yield 2
        raise KeyError("gone")

    items = chain_ahead([partial(iter, [0, 1]), failing, partial(iter, [3])], concurrency=3)
    assert [next(items), next(items), next(items)] == [0, 1, 2]
    with pytest.raises(KeyError, match="gone"):
        next(items)


def test_chained_sources_stay_a_bounded_way_ahead() -> None:
    taken: list[int] = []

    def endless() -> Iterator[int]:
        for number in count():
            taken.append(number)
            yield number

    items = chain_ahead([endless] * 10, concurrency=2)
    assert next(items) == 0
    time.sleep(0.05)
    assert len(taken) <= 2 * (4 + 2)
    items.close()  # type: ignore[attr-defined]


@given(count_=st.integers(0, 40), ahead=st.integers(1, 5))
def test_running_ahead_gives_every_item_once_in_order(count_: int, ahead: int) -> None:
    assert list(run_ahead(iter(range(count_)), ahead)) == list(range(count_))


def test_running_ahead_stays_a_bounded_way_ahead_and_ends_with_its_reader() -> None:
    made: list[int] = []
    closed = threading.Event()

    def numbers() -> Iterator[int]:
        try:
            for number in count():
                made.append(number)
                yield number
        finally:
            closed.set()

    ahead = run_ahead(numbers(), 4)
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    time.sleep(0.1)
    assert len(made) <= 3 + 4 + 1
    ahead.close()  # type: ignore[attr-defined]
    assert closed.wait(1)
    assert len(made) <= 3 + 4 + 2
    assert "ahead" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("error", [ValueError("broken"), SystemExit("gone")])
def test_what_ends_a_source_that_runs_ahead_is_raised_at_its_turn(error: BaseException) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise error

    ahead = run_ahead(items(), 4)
    assert next(ahead) == 1
    with pytest.raises(type(error), match=str(error)):
        next(ahead)
