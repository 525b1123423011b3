"""How a run's networks are run is decided once, for all its actors and attempts."""

from dataclasses import replace

import pytest
import torch

from pipeline.errors import AccessDeniedError, BundleError, RunError
from pipeline.inference import networks
from pipeline.inference.networks import Choice
from pipeline.inference.plan import make_plan, record_run
from pipeline.inference.run import resolve_inputs
from pipeline.models import compiler
from pipeline.models.compiled import Agreement
from tests.worlds import ONE_ACTOR, config_of, make_world, plan_of


@pytest.fixture
def world(tmp_path):
    make_world(tmp_path)
    return tmp_path


@pytest.fixture
def compiles(monkeypatch):
    """A compiler that makes nothing, and what it is found to agree by, by precision."""
    agreement = {"bfloat16": Agreement.of(8, 8, 8.0), "float32": Agreement.of(8, 8, 8.0)}
    monkeypatch.setattr(compiler, "compile_network", lambda network, preprocessing, target, pixels: target.key.encode())
    monkeypatch.setattr(compiler, "_open", lambda package, target: None)
    monkeypatch.setattr("pipeline.data.loader.sample_pixels", lambda *arguments: torch.empty(0))
    monkeypatch.setattr(compiler, "measure_agreement", lambda *arguments: agreement[arguments[3].precision])
    monkeypatch.setattr("pipeline.models.precision.has_fast_bfloat16", lambda device: True)
    return agreement


def decide(world, **compute) -> Choice:
    plan = plan_of(world, run_id="run", compute=compute)
    return networks.decide(plan.run, plan.manifest)["tiny/1"]


def test_a_small_run_is_eager_in_float32_and_needs_no_record(world):
    assert str(decide(world)) == "float32, eager"
    assert not (world / "tables").exists()


def test_a_compiled_run_computes_in_bfloat16_where_the_hardware_has_it(world, compiles):
    assert decide(world, compile="always") == Choice(precision="bfloat16", is_compiled=True)


def test_what_agrees_too_little_gives_way_to_float32(world, compiles):
    compiles["bfloat16"] = Agreement.of(8, 4, 8.0)
    choice = decide(world, compile="always")
    assert (choice.precision, choice.is_compiled) == ("float32", True)
    assert "bfloat16, compiled: expected a top-1 agreement" in choice.refused[0]


def test_a_network_that_must_be_compiled_and_cannot_be_stops_the_run(world, compiles):
    compiles |= {"bfloat16": Agreement.of(8, 4, 8.0), "float32": Agreement.of(8, 4, 8.0)}
    with pytest.raises(BundleError, match=r"must be compiled .* and cannot be: bfloat16.*; float32"):
        decide(world, compile="always")


def refuse_write(uri, data, **options):
    raise AccessDeniedError(f"the credentials in the environment do not allow {uri!r}")


def test_where_nothing_can_be_kept_one_compilation_is_tried_and_the_run_told(world, compiles, monkeypatch, caplog):
    tried = []
    plan = plan_of(world, run_id="run", compute={"precision": "auto"})
    monkeypatch.setattr(compiler, "compile_network", lambda *arguments: tried.append(arguments[2].precision) or b"code")
    monkeypatch.setattr(compiler.storage, "write", refuse_write)
    large = plan.run.model_copy(update={"compile": "auto", "num_images": 5000})
    choice = networks._choose(large, plan.manifest, large.models[0])
    assert (str(choice), tried) == ("float32, eager", ["bfloat16"])
    assert choice.refused[1] == "float32, compiled: not compiled yet"
    assert "not to be kept: the credentials" in choice.refused[0]
    assert "tiny/1: compiled, but not to be kept" in caplog.text


def test_where_nothing_can_be_kept_what_others_have_compiled_is_used(world, compiles, monkeypatch):
    plan = plan_of(world, run_id="run", compute={"precision": "auto", "compile": "always"})
    networks.record_of(plan.run, plan.manifest, plan.run.models[0], "float32")

    monkeypatch.setattr(compiler.storage, "write", refuse_write)
    choice = networks._choose(plan.run, plan.manifest, plan.run.models[0])
    assert str(choice) == "float32, compiled"


def test_what_the_first_decided_stays_whatever_could_be_had_later(world, compiles):
    compiles |= {"bfloat16": Agreement.of(8, 4, 8.0)}
    first = decide(world, compile="always")
    compiles |= {"bfloat16": Agreement.of(8, 8, 8.0)}
    assert decide(world, compile="always") == first


def test_a_node_that_cannot_do_what_was_decided_stops_the_run(world, compiles, monkeypatch):
    plan = plan_of(world, run_id="run", compute={"compile": "always"})
    choice = networks.decide(plan.run, plan.manifest)["tiny/1"]
    monkeypatch.setattr(compiler, "_kind_of", lambda device: {"cpu_name": "another"})
    compiles |= {"bfloat16": Agreement.of(8, 4, 8.0)}
    with pytest.raises(RunError, match="the run began with bfloat16, compiled, and this node cannot"):
        networks.compiled_as_decided(plan.run, plan.manifest, plan.run.models[0], choice)


def test_a_run_compiles_first_only_where_nothing_is_there_yet(world, compiles):
    plan = plan_of(world, run_id="run", compute={"compile": "always"})
    assert networks.should_compile_first(plan.run)
    networks.decide(plan.run, plan.manifest)
    assert not networks.should_compile_first(plan.run)
    assert not networks.should_compile_first(plan_of(world, run_id="next", compute={"compile": "always"}).run)
    assert not networks.should_compile_first(plan_of(world, run_id="small").run)


def test_a_small_run_is_compiled_where_its_networks_have_been(world, compiles):
    assert plan_of(world, run_id="before").run.compile == "never"
    decide(world, compile="always")
    assert plan_of(world, run_id="after").run.compile == "auto"
    assert plan_of(world, run_id="other", compute={"batch_size": 5}).run.compile == "never"
    assert plan_of(world, run_id="none", compute={"compile": "never"}).run.compile == "never"
    assert plan_of(world, run_id="both", bundles=["tiny", "other"]).run.compile == "never"
    by_uri = {"registry": str(world / "elsewhere"), "bundles": [str(world / "registry" / "tiny" / "1")]}
    assert plan_of(world, run_id="untrusted", **by_uri).run.compile == "never"


def test_a_small_run_compiles_nothing_even_where_another_precision_has_been(world, compiles):
    assert decide(world, compile="always", precision="float32").is_compiled
    plan = plan_of(world, run_id="small")
    assert not networks.should_compile_first(plan.run)
    assert networks.decide(plan.run, plan.manifest)["tiny/1"].refused == ("bfloat16, compiled: not compiled yet",)


@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_a_run_that_began_eager_stays_so_when_its_networks_are_compiled_meanwhile(world, compiles, precision):
    fields = {"run_id": "begun", "compute": {"precision": precision}}
    record_run(plan_of(world, **fields), config_of(world, **fields))
    decide(world, compile="always", precision=precision)
    assert plan_of(world, **fields).run.compile == "never"


def test_networks_compiled_for_other_threads_are_told_of_where_they_are_not_used(world, compiles, caplog):
    decide(world, compile="always")
    config = config_of(world, run_id="wider")
    wider = make_plan(config, *resolve_inputs(config), replace(ONE_ACTOR, cpus_per_actor=3))
    assert wider.run.compile == "never"
    assert "compiled for 2 threads, and the run's actors have 3" in caplog.text
