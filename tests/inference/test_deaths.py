"""Shards that kill or hold the process they are in, on a real two-CPU Ray."""

import os
import signal
import time
from functools import partial

import pytest

from pipeline.errors import RunError
from pipeline.inference import workers
from pipeline.inference.workers import PredictFused, decode_shard
from tests.worlds import files_of, have_tasks, run_with_ray, run_without_ray

TABLES = {"names": ["predictions", "embeddings"]}


@pytest.mark.ray
@pytest.mark.slow
def test_the_shard_that_kills_its_process_is_the_one_that_is_named(world, local_ray, monkeypatch):
    class Killed(PredictFused):
        def _take(self, shard, attempt):
            if shard.shard_id == 2:
                time.sleep(0.3)  # the other shard of this process is under way
                os.kill(os.getpid(), signal.SIGKILL)
            return super()._take(shard, attempt)

    monkeypatch.setattr("pipeline.inference.flow.PredictFused", Killed)
    with pytest.raises(RunError, match="shard 2 was begun 3 times and its process died each time"):
        run_with_ray(world, run_id="killed")


@pytest.mark.ray
@pytest.mark.slow
def test_of_shards_begun_together_the_one_that_kills_their_process_is_named(world, local_ray, monkeypatch, tmp_path):
    class Killed(PredictFused):
        def __init__(self, run, attempts):
            workers._TOGETHER_S = 100  # of the actor's process
            super().__init__(run, attempts)

        def _take(self, shard, attempt):
            (tmp_path / f"{shard.shard_id}-{attempt}").touch()
            if shard.shard_id == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return super()._take(shard, attempt)

    monkeypatch.setattr("pipeline.inference.flow.PredictFused", Killed)
    have_tasks(monkeypatch, 1)
    with pytest.raises(RunError, match="shard 2 was begun 3 times and its process died each time"):
        run_with_ray(world, run_id="killed-together")
    tried = sorted(path.name for path in tmp_path.iterdir())
    assert tried == ["0-1", "1-1", "1-2", "2-1", "2-2", "2-3"]  # 0 was ended before the others were begun


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("form", ["fused", "split"])
def test_an_image_that_holds_its_decoder_is_decoded_by_itself_and_harms_no_other(
    world, local_ray, monkeypatch, caplog, form
):
    held = next((world / "images").rglob("*.jpg")).read_bytes()

    def hold() -> None:
        from pipeline.data import decoders, images

        decode = images.decode
        images.decode = lambda data, **options: time.sleep(600) if data == held else decode(data, **options)
        decoders.WatchedDecoder = partial(decoders.WatchedDecoder, timeout_s=1)

    class Holding(PredictFused):
        def __call__(self, rows):
            hold()
            return super().__call__(rows)

    def decode_holding(rows, run, attempts):
        hold()
        return decode_shard(rows, run, attempts)

    monkeypatch.setattr("pipeline.inference.flow.PredictFused", Holding)
    monkeypatch.setattr("pipeline.inference.flow.decode_shard", decode_holding)
    summary = run_with_ray(world, run_id=f"held-{form}", tables=TABLES, compute={"form": form})
    assert (summary["status"], summary["num_predicted"]) == ("done", 27)
    assert "an image takes more than 1 s to decode: its process ends" in caplog.text
    run_without_ray(world, run_id="alone", tables=TABLES)
    assert files_of(world, f"held-{form}") == files_of(world, "alone")


@pytest.mark.ray
@pytest.mark.slow
def test_images_that_crash_in_several_shards_harm_no_other_shard(world, local_ray, monkeypatch):
    class Crashing(PredictFused):
        def _load(self, shard, attempt, log, num_threads):
            if shard.shard_id in (0, 2, 3) and attempt == 1:
                time.sleep(0.1)  # the other shard of this process is under way
                os.kill(os.getpid(), signal.SIGKILL)
            return super()._load(shard, attempt, log, num_threads)

    monkeypatch.setattr("pipeline.inference.flow.PredictFused", Crashing)
    summary = run_with_ray(world, run_id="crashing")
    assert (summary["status"], summary["num_predicted"], summary["num_errors"]) == ("done", 27, 3)
