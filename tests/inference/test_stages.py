"""Each stage of a run alone."""

import pytest

from pipeline.data import nvjpeg
from pipeline.inference.stages import Stages
from tests.worlds import make_world, plan_of


@pytest.mark.parametrize("decode", ["cpu", "gpu"])
def test_one_stage_after_the_other_writes_every_image(tmp_path, nvjpeg_on_cpu, decode):
    make_world(tmp_path)
    plan = plan_of(tmp_path, run_id="staged")
    stages = Stages(plan.run.model_copy(update={"decode": decode}), list(plan.pending_shards()), with_networks=True)
    for stage in (stages.fetch, stages.decode, stages.predict, stages.write):
        timed = stage()
        assert (timed.num_images, timed.images_per_s > 0) == (30, True)
    assert len(list(tmp_path.glob("tables/predictions/run_id=staged/*.parquet"))) == 4
    files = [path.read_bytes() for path in tmp_path.glob("images/**/*") if path.is_file()]
    plain = [data for data in files if nvjpeg.plain_jpeg(data, max_pixels=10**8)]
    assert set(plain) < set(files)
    assert sorted(nvjpeg_on_cpu.seen[1:]) == ([] if decode == "cpu" else sorted(plain))  # after one that tries it


@pytest.mark.parametrize("decode", ["cpu", "gpu"])
def test_tasks_need_no_networks_for_their_stages(tmp_path, nvjpeg_on_cpu, decode):
    make_world(tmp_path)
    plan = plan_of(tmp_path)
    stages = Stages(plan.run.model_copy(update={"decode": decode}), list(plan.pending_shards()), with_networks=False)
    assert stages.fetch().num_images == 30
    assert nvjpeg_on_cpu.seen == []
