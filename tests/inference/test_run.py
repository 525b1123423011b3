"""What a run is, and what it keeps."""

import json
from importlib.metadata import PackageNotFoundError

import pytest

from pipeline import __version__, storage
from pipeline.errors import BundleError, ConfigError, ManifestError
from pipeline.inference import run as runs
from pipeline.inference.plan import make_plan
from pipeline.inference.run import list_run_ids, read_run, resolve_inputs
from pipeline.models import registry
from tests.worlds import ONE_ACTOR, config_of, make_bundle, make_world, plan_of, record


def test_what_was_only_estimated_is_no_run(world):
    run = plan_of(world, run_id="estimated").run
    storage.write(storage.join(run.uri, "estimate.json"), b"{}")
    record(world, run_id="begun")
    assert "begun" in list_run_ids(run.output_uri)
    assert "estimated" not in list_run_ids(run.output_uri)


def test_the_same_command_is_the_same_run_and_another_is_another(world):
    first = plan_of(world).run.run_id
    assert plan_of(world).run.run_id == first
    assert plan_of(world, tables={"top_k": 2}).run.run_id != first
    assert plan_of(world, bundles=["other"]).run.run_id != first
    assert plan_of(world, compute={"actors": 1}, images={"fetch_concurrency": 4}).run.run_id == first


@pytest.mark.parametrize(
    ("names", "idle", "counting"),
    [
        (["embeddings"], {"top_k": 2}, {"l2_normalise": True}),
        (["predictions"], {"embedding_type": "float16", "l2_normalise": True}, {"top_k": 2}),
    ],
)
def test_how_a_table_is_written_that_is_not_decides_nothing(world, names, idle, counting):
    run_id = f"idle-{names[0]}"
    record(world, run_id=run_id, tables={"names": names, **idle})
    assert plan_of(world, run_id=run_id, tables={"names": names}).num_pending == 4
    with pytest.raises(ConfigError, match="tables: began with"):
        plan_of(world, run_id=run_id, tables={"names": names, **counting})


@pytest.mark.parametrize("reference", ["tiny", "tiny@production"])
def test_a_run_goes_on_with_the_versions_that_its_names_led_to_at_its_beginning(tmp_path, reference, caplog):
    make_world(tmp_path)
    registry.set_alias(str(tmp_path / "registry"), "tiny", "production", "1")
    began = record(tmp_path, run_id="nightly", bundles=[reference])
    make_bundle(tmp_path / "registry", seed=1, version="2")
    registry.set_alias(str(tmp_path / "registry"), "tiny", "production", "2")
    assert plan_of(tmp_path, run_id="nightly", bundles=[reference]).run == began
    assert f"{reference} is another version by now; run nightly goes on with tiny/1" in caplog.text
    assert plan_of(tmp_path, run_id="next", bundles=[reference]).run.models[0].name == "tiny/2"
    storage.delete(f"file://{tmp_path}/registry/tiny/aliases/production.json")
    assert plan_of(tmp_path, run_id="nightly", bundles=[reference]).run == began
    with pytest.raises(ConfigError, match="models: began with"):
        plan_of(tmp_path, run_id="nightly", bundles=["tiny/2"])


def test_a_run_is_made_where_the_sources_are_there_without_being_installed(world, monkeypatch):
    def of_installed(package: str) -> str:
        if package == "image-batch-pipeline":
            raise PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(runs, "version", of_installed)
    assert plan_of(world, run_id="sent-along").run.software["image-batch-pipeline"] == __version__


def test_tables_are_a_set_whatever_the_order_they_are_named_in(world):
    named = {"names": ["embeddings", "predictions", "embeddings"]}
    assert plan_of(world, tables=named).run.table_names == ["predictions", "embeddings", "errors"]


def test_a_run_is_read_back_as_it_was_recorded(world):
    run = record(world, run_id="kept")
    assert read_run(run.output_uri, "kept") == run
    assert "kept" in list_run_ids(run.output_uri)
    assert storage.exists(storage.join(run.uri, "config.yaml"))


@pytest.mark.parametrize(("flag", "times"), [(False, None), (True, 2)])
def test_a_run_planned_when_reducing_was_a_flag_can_be_gone_on_with(world, flag, times):
    fields = {"run_id": f"flag-{flag}", "images": {"reduced_decode": times}}
    run = record(world, **fields)
    plan_uri = storage.join(run.uri, "plan.json")
    recorded = json.loads(storage.read(plan_uri))
    recorded["images"]["reduced_decode"] = flag
    storage.write(plan_uri, json.dumps(recorded).encode())
    assert read_run(run.output_uri, run.run_id) == run
    assert plan_of(world, **fields).run == run


def test_how_far_images_were_reduced_stands_in_the_lineage_where_they_were(world):
    whole, reduced = (plan_of(world, images={"reduced_decode": times}).run for times in (None, 4))
    assert "reduced_decode" not in whole.lineage
    assert reduced.lineage["reduced_decode"] == "4"


def test_an_unknown_run_is_told_with_those_there_are(world):
    run = record(world, run_id="known")
    with pytest.raises(ConfigError, match=r"expected run .unknown.*known"):
        read_run(run.output_uri, "unknown")


def test_a_damaged_plan_is_named(world):
    run = record(world, run_id="damaged")
    storage.write(storage.join(run.uri, "plan.json"), json.dumps({"run_id": 1}).encode())
    with pytest.raises(ConfigError, match=r"plan\.json: not a plan of this version"):
        plan_of(world, run_id="damaged")


def test_a_missing_manifest_and_a_missing_bundle_are_told_apart(world):
    with pytest.raises(ManifestError, match="expected a manifest at"):
        resolve_inputs(config_of(world, manifest=str(world / "nowhere")))
    with pytest.raises(BundleError, match="nothing"):
        resolve_inputs(config_of(world, bundles=["nothing"]))


def test_the_same_bundle_twice_is_refused(world):
    with pytest.raises(ConfigError, match="expected different ones, got tiny/1, tiny/1"):
        resolve_inputs(config_of(world, bundles=["tiny", "tiny/1"]))


def test_a_bundle_may_be_named_by_its_uri(world, tmp_path):
    uri = make_bundle(tmp_path / "elsewhere", name="far")
    config = config_of(world, bundles=[uri], registry=None)
    assert make_plan(config, *resolve_inputs(config), ONE_ACTOR).run.models[0].name == "far/1"


@pytest.mark.parametrize(("device", "fewest"), [("cpu", 5_000), ("cuda", 100_000)])
def test_a_run_compiles_by_itself_where_its_images_are_worth_the_wait(world, device, fewest):
    run = plan_of(world).run.model_copy(update={"compile": "auto", "device": device})
    assert run.model_copy(update={"num_images": fewest}).may_compile
    assert not run.model_copy(update={"num_images": fewest - 1}).may_compile


@pytest.mark.parametrize("run_id", ["", "../up", "a/b", ".hidden", "a b"])
def test_a_run_id_that_is_no_folder_name_is_refused(world, run_id):
    with pytest.raises(ValueError, match="run_id"):
        config_of(world, run_id=run_id)
