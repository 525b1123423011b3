"""The loop does what a plain PyTorch loop does, alone or with others, disturbed or not."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pipeline import storage
from pipeline.data import train_loader
from pipeline.data.decoders import IsolatedDecoder, WatchedDecoder
from pipeline.data.training_set import TrainingSet
from pipeline.errors import ConfigError, PipelineError, RunError
from pipeline.training import checkpoint, evaluate
from pipeline.training.augment import BatchAugment
from pipeline.training.feed import batches_of, make_loader
from pipeline.training.loop import Trainee, make_network, refuse_impossible
from pipeline.training.run import TrainingRun, make_run
from pipeline.training.worker import Notice, Worker
from tests.training_worlds import make_sets, make_square_sets, train_config, train_here, train_together
from tests.worlds import list_images, make_bundle

AUGMENTED = {
    "augment": {"crop": "pad", "size": 32, "policy": "trivial_augment", "random_erasing": 0.5, "mixup": 0.2},
    "loss": {"label_smoothing": 0.1},
    "ema": {"decay": 0.9},
    "optimizer": {"nesterov": True, "clip_norm": 1.0, "accumulation_steps": 2},
}


# Other sums in other orders: without batch statistics differences stay rounding errors, until one turns a ReLU's input
# from a little below zero to a little above. Small steps keep what that changes below the bounds here; the weights move
# by a thousand times as much.
GENTLE: dict[str, Any] = {"start": {"freeze": "norms"}, "optimizer": {"learning_rate": 0.002}}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("sets")
    make_sets(folder)
    return folder


def last_state(run: TrainingRun) -> dict[str, Any]:
    state = checkpoint.read_last(run.uri)
    assert state is not None
    return state


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max((left[name].double() - right[name].double()).abs().max().item() for name in left)


def stopping_at(step: int) -> Worker:
    """A worker whose `step`-th look comes with a wish to stop."""
    looks = iter(range(1, 10_000))
    return Worker(notice=lambda: Notice(should_stop=next(looks) == step))


def test_a_few_hundred_steps_equal_a_plain_loop(root):
    fields = {
        "augment": {"crop": "center", "size": 16},
        "optimizer": {"learning_rate": 0.01, "decay_norm_and_bias": True},
        "schedule": {"kind": "constant"},
    }
    run = train_here(train_config(root, run_id="plain", epochs=None, steps=200, **fields))

    images = TrainingSet.open(run.config.train)
    network = make_network(run).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    loader = make_loader(run, Worker(), images)
    for batch in loader.batches(range(200), rank=0, world_size=1, size_at=lambda _: 16):
        flipped = torch.where((batch.draws[:, 3] < 0.5).view(-1, 1, 1, 1), batch.pixels.flip(-1), batch.pixels)
        pixels = run.preprocessing.normalise(flipped)
        loss = F.cross_entropy(network(pixels.to(memory_format=torch.channels_last))[0], batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert largest_difference(last_state(run)["network"], network.state_dict()) < 1e-4


@pytest.mark.parametrize("stop_at", [1, 7])
def test_a_run_that_was_stopped_ends_with_the_weights_of_an_undisturbed_one(root, stop_at):
    undisturbed = train_here(train_config(root, run_id=f"undisturbed-{stop_at}", **AUGMENTED))
    config = train_config(root, run_id=f"stopped-{stop_at}", **AUGMENTED)
    stopped = train_here(config, stopping_at(stop_at))
    assert last_state(stopped)["step"] == stop_at
    train_here(config)
    there, here = last_state(undisturbed), last_state(stopped)
    assert largest_difference(there["network"], here["network"]) == 0
    assert largest_difference(there["ema"], here["ema"]) == 0
    assert [entry["top1"] for entry in there["evaluations"]] == [entry["top1"] for entry in here["evaluations"]]


@pytest.mark.slow
def test_a_run_decoded_by_processes_ends_with_the_weights_of_one_that_is_not(root):
    runs = [
        train_here(train_config(root, run_id=f"processes-{number}", data={"decode_processes": number}, **AUGMENTED))
        for number in (1, 2)
    ]
    assert largest_difference(*(last_state(run)["network"] for run in runs)) == 0


def test_a_cached_run_sees_what_an_uncached_one_sees(tmp_path):
    make_square_sets(tmp_path)
    fields = {"augment": {"crop": "pad", "size": 32}}
    runs = [
        train_here(train_config(tmp_path, run_id=f"cache-{cache}", data={"cache": cache}, **fields))
        for cache in ("none", "memory", "device")
    ]
    first, *others = (last_state(run)["network"] for run in runs)
    assert all(largest_difference(first, other) == 0 for other in others)


def test_the_mixing_knows_which_images_could_not_be_had(tmp_path, monkeypatch):
    make_sets(tmp_path, num_train=24, num_evaluation=12, num_broken=3)
    mix, weights = BatchAugment.__call__, []

    def watched(self, pixels, labels, draws, seed, of_images):
        weights.append(of_images)
        return mix(self, pixels, labels, draws, seed, of_images)

    monkeypatch.setattr(BatchAugment, "__call__", watched)
    train_here(train_config(tmp_path, epochs=1, data={"max_error_rate": 0.25}, augment={"mixup": 0.2, "size": 32}))
    assert (torch.cat(weights) == 0).sum() == 3


def test_a_size_that_cached_images_are_too_small_for_is_refused_at_the_beginning(tmp_path):
    make_square_sets(tmp_path)
    fields = {"augment": {"crop": "pad", "size": 32, "progressive": [(0.5, 512)]}, "data": {"cache": "memory"}}
    steps = []
    with pytest.raises(ConfigError, match=r"augment\.size, progressive: expected at most .*, got 512"):
        train_here(train_config(tmp_path, **fields), Worker(observe=steps.append))
    assert steps == []


def test_accumulation_does_not_change_the_gradient_where_norms_keep_their_statistics(root):
    runs = [
        train_here(
            train_config(
                root,
                run_id=f"parts-{parts}",
                start={"freeze": "norms"},
                optimizer={**GENTLE["optimizer"], "accumulation_steps": parts},
            )
        )
        for parts in (1, 3)
    ]
    assert largest_difference(*(last_state(run)["network"] for run in runs)) < 1e-5


def test_more_parts_than_images_are_as_many_as_images(root):
    runs = [
        train_here(train_config(root, run_id=f"many-{parts}", batch_size=4, optimizer={"accumulation_steps": parts}))
        for parts in (4, 16)
    ]
    assert largest_difference(*(last_state(run)["network"] for run in runs)) == 0


def test_a_rank_without_images_moves_no_statistics(root):
    run = make_run(train_config(root, run_id="idle", optimizer={"weight_decay": 0}))
    images = TrainingSet.open(run.config.train)
    trainee = Trainee(run, Worker(), images)
    batch = next(batches_of(run, Worker(), make_loader(run, Worker(), images), 0))
    none = {name: getattr(batch, name)[:0] for name in ("uris", "pixels", "labels", "weights", "draws")}
    before = {name: tensor.clone() for name, tensor in trainee.state()["network"].items()}
    assert trainee.train_step(replace(batch, **none), 0.1).tolist() == [0, 0, 0]
    assert largest_difference(before, trainee.state()["network"]) == 0
    trainee.train_step(batch, 0.1)
    assert largest_difference(before, trainee.state()["network"]) > 0


def test_a_checkpoint_knows_the_images_that_failed_before_it(tmp_path):
    make_sets(tmp_path, num_train=24, num_evaluation=12, num_broken=3)
    config = train_config(tmp_path, data={"max_error_rate": 0.25})
    run = train_here(config, stopping_at(3))
    assert last_state(run)["evaluations"] == []
    assert len(last_state(run)["errors"]) == last_state(run)["num_failed"] > 0


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_step_is_launched_without_waiting_for_its_work(root):
    augment = {**AUGMENTED["augment"], "policy": "none"}
    run = make_run(train_config(root, run_id="launched", **{**AUGMENTED, "augment": augment}))
    worker, images = Worker(device=torch.device("cuda")), TrainingSet.open(run.config.train)
    trainee = Trainee(run, worker, images)
    batches = batches_of(run, worker, make_loader(run, worker, images), 0)
    trainee.train_step(next(batches), 0.01)  # makes what is kept
    second = next(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainee.train_step(second, 0.01)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_network_that_meets_no_number_stops_with_step_rate_and_images(root):
    config = train_config(root, run_id="diverges", optimizer={"learning_rate": 1e30}, schedule={"kind": "constant"})
    with pytest.raises(RunError, match=r"step \d+: expected a finite loss, got none at learning rate 1e\+30") as caught:
        train_here(config)
    assert len(caught.value.details["images"]) == 8
    assert all(uri.startswith("file://") for uri in caught.value.details["images"])


def test_a_linear_probe_changes_its_head_alone(root):
    run = train_here(train_config(root, run_id="probe", start={"freeze": "trunk"}))
    before, after = make_network(run).state_dict(), last_state(run)["network"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"fc.weight", "fc.bias"}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_several_ranks_equal_one_at_the_same_global_batch(root, world_size):
    fields = {**GENTLE, "augment": {"crop": "pad", "size": 32, "random_erasing": 0.5}}
    alone = train_here(train_config(root, run_id=f"alone-{world_size}", **fields))
    together = make_run(train_config(root, run_id=f"together-{world_size}", **fields))
    train_together(together, world_size)
    assert largest_difference(last_state(alone)["network"], last_state(together)["network"]) < 1e-5
    assert largest_difference(last_state(alone)["network"], make_network(alone).state_dict()) > 1e-3
    counted = [[entry["num_images"] for entry in last_state(run)["evaluations"]] for run in (alone, together)]
    assert counted == [[20, 20], [20, 20]]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"architecture": {"name": "resnet5"}}, "resnet5"),
        ({"architecture": {"name": "cifar_resnet8", "arguments": {"depth": 3}}}, "depth"),
        ({"augment": {"crop": "scale", "sides": (64, 48)}}, r"augment\.sides"),
        ({"augment": {"crop": "pad", "size": 4, "padding": 4}}, r"augment\.padding"),
        ({"compute": {"sync_batch_norm": True}}, r"compute\.sync_batch_norm: expected GPUs"),
        ({"architecture": {"name": "vit_b_16"}}, "expected a network that takes images of 32 by 32 pixels"),
        (
            {"architecture": {"name": "alexnet"}, "augment": {"size": 224, "progressive": [(0.5, 16)]}},
            "takes images of 16 by 16 pixels",
        ),
        ({"architecture": {"name": "mobilenet_v2"}, "start": {"zero_init_last_norm": True}}, "zero_init_last_norm"),
    ],
)
def test_what_no_worker_could_begin_is_refused_before_its_name_is_taken(root, fields, told):
    run = make_run(train_config(root, run_id="impossible", **fields)).model_copy(update={"device": "cpu"})
    with pytest.raises(PipelineError, match=told):
        refuse_impossible(run, TrainingSet.open(run.config.train))


@pytest.mark.parametrize(
    "fields",
    [
        {"ema": {"decay": 0.9}},
        {"start": {"bundle": "tiny", "freeze": "trunk"}, "architecture": None, "evaluation": {}},
        {"loss": {"class_weights": "balanced"}},
        {"augment": {"crop": "pad", "size": 32, "policy": "trivial_augment", "mixup": 0.2, "cutmix": 1.0}},
        {"architecture": {"name": "regnet_y_400mf"}},
        {"compute": {"compile": True}},
    ],
)
def test_a_possible_run_is_not_refused(root, fields):
    make_bundle(root / "registry")
    run = make_run(train_config(root, run_id="possible", **fields))
    refuse_impossible(run.model_copy(update={"device": "cpu"}), TrainingSet.open(run.config.train))


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks_at_the_very_next_sample(root):
    fields = GENTLE
    undisturbed = train_here(train_config(root, run_id="one-rank", **fields))
    run = train_here(train_config(root, run_id="one-then-two", **fields), stopping_at(4))
    assert last_state(run)["step"] == 4
    train_together(run, 2)
    assert largest_difference(last_state(undisturbed)["network"], last_state(run)["network"]) < 1e-5


@pytest.mark.slow
def test_three_ranks_that_go_on_from_a_checkpoint_end_with_the_very_weights_of_undisturbed_ones(root):
    fields = {"augment": {"crop": "pad", "size": 32}, "checkpoint": {"every_steps": 2, "keep_last": 9}}
    run = make_run(train_config(root, run_id="three-ranks", batch_size=12, **fields))
    train_together(run, 3)
    undisturbed = last_state(run)
    for step in checkpoint.list_steps(run.uri)[1:]:
        storage.delete(checkpoint.checkpoint_uri(run.uri, step))
    assert checkpoint.list_steps(run.uri) == [2]
    train_together(run, 3)
    assert last_state(run)["step"] == undisturbed["step"] == 8
    assert largest_difference(last_state(run)["network"], undisturbed["network"]) == 0


CRASHES = b"CRASHES the decoder"


@pytest.fixture
def crashing_isolated(monkeypatch, tmp_path):
    """Decoders die of `CRASHES` where they are isolated; elsewhere they refuse it as of no known format."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, os\n"
        "from PIL import Image, PpmImagePlugin\n"
        "if 'pipeline.data.decoders' in ' '.join(sys.orig_argv):\n"
        f"    Image.register_open('PPM', lambda *_: os.abort(), lambda prefix: prefix.startswith({CRASHES[:7]!r}))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.fixture
def met_unguarded(monkeypatch) -> list[bytes]:
    """What decoders were given that are not isolated, of training and evaluation."""
    met: list[bytes] = []

    class Recording(WatchedDecoder):
        def decode(self, data, **options):
            met.append(data)
            return super().decode(data, **options)

    for module in (train_loader, evaluate):
        monkeypatch.setattr(
            module, "guarded_decoder", lambda *, isolated: IsolatedDecoder() if isolated else Recording()
        )
    return met


@pytest.mark.parametrize("cache", ["none", pytest.param("memory", marks=pytest.mark.slow)])
def test_where_workers_begin_again_images_that_kill_decoders_are_found_and_not_decoded_again(
    tmp_path, crashing_isolated, met_unguarded, cache
):
    make_square_sets(tmp_path)
    for name in ("train", "evaluation"):
        (tmp_path / f"{name}-images/class0/kills.png").write_bytes(CRASHES + name.encode())
        shutil.rmtree(tmp_path / name)
        list_images(tmp_path / f"{name}-images", tmp_path / name, shard_size=13)
    fields = {"data": {"max_error_rate": 0.5, "cache": cache}, "augment": {"crop": "pad", "size": 32}}
    run = train_here(train_config(tmp_path, epochs=2, **fields), Worker(begin=lambda step: step == 0))
    state = last_state(run)
    assert {uri.rpartition("/")[2]: error for uri, (_, error, _) in state["errors"].items()} == {"kills.png": "crashed"}
    assert [uri.split("/")[-3] for uri in sorted(state["deadly"])] == ["evaluation-images", "train-images"]
    assert [entry["num_errors"] for entry in state["evaluations"]] == [1, 1]
    assert len(met_unguarded) == 24 * (2 if cache == "none" else 1)  # the second epoch's, and its evaluation's
    assert not any(data.startswith(CRASHES) for data in met_unguarded)


def test_images_read_ahead_when_isolation_ends_are_not_to_blame(tmp_path, met_unguarded):
    make_square_sets(tmp_path)
    fields = {"checkpoint": {"every_steps": 1}, "epochs": None, "steps": 2, "batch_size": 4}
    state = last_state(train_here(train_config(tmp_path, **fields), Worker(begin=lambda step: True)))
    assert (state["step"], state["errors"], state["deadly"]) == (2, {}, {})
    assert len(met_unguarded) > 0
