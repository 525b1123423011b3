import subprocess
import sys

import pytest

from pipeline.inference import attempts as attempts_module
from pipeline.inference.attempts import MAX_DEATHS, ShardAttempts

HERE, LOST = "a node that lives", "a node that was lost"


@pytest.fixture(autouse=True)
def _nodes(monkeypatch):
    monkeypatch.setattr(attempts_module, "_nodes_alive", lambda: {HERE})


def test_attempts_at_a_shard_are_counted_from_one():
    attempts = ShardAttempts()
    assert [attempts.begin("decode", [7], HERE, is_alone=True) for _ in range(MAX_DEATHS)] == [[1], [2], [3]]
    assert attempts.begin("decode", [8], HERE) == attempts.begin("predict", [7], HERE) == [1]


def test_a_death_is_blamed_on_all_shards_under_way_in_that_process():
    attempts = ShardAttempts()
    assert attempts.begin("all", [7, 8, 9], HERE) == [1, 1, 1]
    attempts.end("all", [7, 8, 9])
    assert attempts.begin("all", [10, 11], HERE) == [1, 1]
    assert attempts.begin("all", [7, 8, 9, 10, 11, 12], HERE) == [1, 1, 1, 2, 2, 1]


def test_a_shard_that_was_done_is_not_to_blame_for_what_ends_its_task_but_not_for_ever():
    attempts = ShardAttempts()
    for _ in range(10):
        assert attempts.begin("all", [7], HERE) == [1]
        attempts.end("all", [7])
    assert attempts.begin("all", [7], HERE)[0] > MAX_DEATHS


def test_a_shard_is_not_to_blame_for_the_end_of_its_node_but_not_for_ever():
    attempts = ShardAttempts()
    assert [attempts.begin("all", [7], LOST) for _ in range(10)] == [[1]] * 10
    assert attempts.begin("all", [7], HERE)[0] > MAX_DEATHS


def test_the_end_of_a_node_may_become_known_late():
    attempts = ShardAttempts()
    attempts.begin("all", [7], "a node that goes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attempts_module, "_nodes_alive", lambda: {HERE, "a node that goes"})
        assert attempts.begin("all", [7], HERE) == [2]
    assert attempts.begin("all", [7], HERE, is_alone=True) == [1]


def test_who_lives_is_asked_once_for_all_shards_and_only_where_one_was_begun_before(monkeypatch):
    asked = []
    monkeypatch.setattr(attempts_module, "_nodes_alive", lambda: asked.append(1) or {HERE})
    attempts = ShardAttempts()
    assert (attempts.begin("all", [7, 8], HERE), asked) == ([1, 1], [])
    assert (attempts.begin("all", [7, 8, 9], HERE), asked) == ([2, 2, 1], [1])


def test_an_end_whose_beginning_was_forgotten_makes_no_attempt_less_than_the_first():
    attempts = ShardAttempts()
    attempts.end("all", [7])  # after the counting process has started anew
    assert [attempts.begin("all", [7], HERE) for _ in range(3)] == [[1], [1], [2]]


def test_a_shard_whose_process_died_counts_as_begun_only_when_it_is_alone():
    attempts = ShardAttempts()
    assert attempts.begin("all", [7], HERE) == [1]
    assert [attempts.begin("all", [7], HERE) for _ in range(MAX_DEATHS)] == [[2], [2], [2]]
    assert [attempts.begin("all", [7], HERE, is_alone=True) for _ in range(2)] == [[2], [3]]
    assert attempts.begin("all", [7], HERE)[0] == 4 > MAX_DEATHS


def test_the_process_that_counts_imports_neither_torch_nor_ray_data():
    code = "import sys; import pipeline.inference.attempts; print({'torch', 'ray', 'pandas'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
