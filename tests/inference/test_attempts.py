import subprocess
import sys

import pytest

from pipeline.inference import attempts as attempts_module
from pipeline.inference.attempts import MAX_DEATHS, ShardAttempts

HERE = "a node that lives"


@pytest.fixture(autouse=True)
def _nodes(monkeypatch):
    monkeypatch.setattr(attempts_module, "_nodes_alive", lambda: {HERE})


def test_attempts_at_a_shard_are_counted_from_one():
    attempts = ShardAttempts()
    assert [attempts.begin("decode", 7, HERE, is_alone=True) for _ in range(MAX_DEATHS)] == [1, 2, 3]
    assert attempts.begin("decode", 8, HERE) == attempts.begin("predict", 7, HERE) == 1


def test_a_shard_that_was_done_is_not_to_blame_for_what_ends_its_task_but_not_for_ever():
    attempts = ShardAttempts()
    for _ in range(10):
        assert attempts.begin("all", 7, HERE) == 1
        attempts.end("all", 7)
    assert attempts.begin("all", 7, HERE) > MAX_DEATHS


def test_a_shard_is_not_to_blame_for_the_end_of_its_node_but_not_for_ever():
    attempts = ShardAttempts()
    assert [attempts.begin("all", 7, "a node that was lost") for _ in range(10)] == [1] * 10
    assert attempts.begin("all", 7, HERE) > MAX_DEATHS


def test_a_shard_whose_process_died_counts_as_begun_only_when_it_is_alone():
    attempts = ShardAttempts()
    assert attempts.begin("all", 7, HERE) == 1
    assert [attempts.begin("all", 7, HERE) for _ in range(MAX_DEATHS)] == [2, 2, 2]
    assert [attempts.begin("all", 7, HERE, is_alone=True) for _ in range(2)] == [2, 3]
    assert attempts.begin("all", 7, HERE) == 4 > MAX_DEATHS


def test_the_process_that_counts_imports_neither_torch_nor_ray_data():
    code = "import sys; import pipeline.inference.attempts; print({'torch', 'ray', 'pandas'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
