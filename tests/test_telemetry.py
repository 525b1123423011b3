import json
import time

from pipeline.telemetry import EvaluationProgress, RunProgress


def progress_lines(captured: str) -> list[dict]:
    return [json.loads(line)["progress"] for line in captured.splitlines()]


def test_a_run_that_stands_still_still_says_so(capsys):
    with RunProgress(num_images=10, num_done=4, interval_s=0.05):
        time.sleep(0.2)
    lines = progress_lines(capsys.readouterr().err)
    assert len(lines) >= 2
    assert (lines[-1]["images"], lines[-1]["of"], lines[-1]["eta_s"]) == (4, 10, None)


def test_progress_counts_images_errors_and_seconds(capsys):
    with RunProgress(num_images=10, num_done=0, interval_s=60) as progress:
        progress.update(num_images=3, num_errors=1, seconds={"decode": 1.5})
        progress.update(num_images=3, num_errors=0, seconds={"decode": 0.5, "write": 1.0})
    [last] = progress_lines(capsys.readouterr().err)
    assert (last["images"], last["errors"]) == (6, 1)
    assert last["seconds_by_stage"] == {"decode": 2.0, "write": 1.0}
    assert last["images_per_s"] > 0


def test_rates_leave_out_what_was_done_before():
    progress = RunProgress(num_images=1000, num_done=990, interval_s=60)
    time.sleep(0.05)
    assert progress.status()["images_per_s"] == 0.0


def test_an_evaluation_adds_up_what_its_ranks_have_done_even_after_a_new_start(capsys):
    with EvaluationProgress(num_images=100, interval_s=60) as progress:
        for rank, images in [(0, 10), (1, 20), (0, 30)]:
            progress.update({"rank": rank, "images": images})
        assert progress.status()["images"] == 50
        progress.update({"rank": 1, "images": 5})
    [last] = progress_lines(capsys.readouterr().err)
    assert (last["images"], last["of"]) == (35, 100)
    assert last["images_per_s"] > 0
