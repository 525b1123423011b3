import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.cluster import Node, choose_device
from pipeline.errors import ConfigError
from pipeline.inference.config import ComputeConfig
from pipeline.inference.layout import choose_layout

AUTO = ComputeConfig()


def test_one_cpu_is_enough_for_one_fused_actor():
    layout = choose_layout([Node(cpus=1)], AUTO, num_shards=10)
    assert (layout.form, layout.device, layout.num_actors, layout.cpus_per_actor) == ("fused", "cpu", 1, 1)


def test_every_cpu_has_an_actor_of_its_own():
    layout = choose_layout([Node(cpus=2), Node(cpus=16)], AUTO, num_shards=100)
    assert (layout.num_actors, layout.cpus_per_actor) == (18, 1)


def test_fewer_shards_than_cpus_get_larger_actors_that_fit_the_smallest_node():
    layout = choose_layout([Node(cpus=16)], AUTO, num_shards=2)
    assert (layout.num_actors, layout.cpus_per_actor) == (2, 4)
    layout = choose_layout([Node(cpus=2), Node(cpus=8)], AUTO, num_shards=3)
    assert (layout.num_actors, layout.cpus_per_actor) == (3, 2)


def test_the_split_form_leaves_a_cpu_to_decode():
    layout = choose_layout([Node(cpus=4)], ComputeConfig(form="split"), num_shards=100)
    assert layout.num_actors * layout.cpus_per_actor < 4


def test_the_split_form_on_one_cpu_is_refused_and_not_waited_for():
    with pytest.raises(ConfigError, match="do not fit this cluster"):
        choose_layout([Node(cpus=1)], ComputeConfig(form="split"), num_shards=1)


def test_more_actors_than_fit_are_refused_naming_the_nodes():
    with pytest.raises(ConfigError, match=r"8 actors of 2 CPUs.* 2 do \(nodes: 4 CPUs \+ 0 GPUs\)"):
        choose_layout([Node(cpus=4)], ComputeConfig(actors=8, cpus_per_actor=2), num_shards=100)


def test_gpus_are_taken_where_there_are_any_and_fed_by_the_cpus():
    layout = choose_layout([Node(cpus=16, gpus=2), Node(cpus=32)], AUTO, num_shards=100)
    assert (layout.form, layout.device, layout.num_actors) == ("split", "cuda", 2)
    assert (layout.cpus_per_actor, layout.gpus_per_actor) == (0, 1)


@pytest.mark.parametrize(
    ("node", "compute"),
    [
        (Node(cpus=8, gpus=1), ComputeConfig(cpus_per_actor=8)),
        (Node(cpus=0, gpus=1), ComputeConfig(form="split")),
    ],
)
def test_gpu_actors_that_leave_no_cpu_to_decode_are_refused_and_not_waited_for(node, compute):
    with pytest.raises(ConfigError, match="do not fit this cluster"):
        choose_layout([node], compute, num_shards=10)


def test_gpus_with_fewer_than_two_cpus_each_decode_for_themselves():
    few, enough = Node(cpus=3, gpus=2), Node(cpus=4, gpus=2)
    assert choose_layout([few], AUTO, num_shards=100).decode == "gpu"
    assert choose_layout([enough], AUTO, num_shards=100).decode == "cpu"
    assert choose_layout([few], ComputeConfig(decode="cpu"), num_shards=100).decode == "cpu"


@pytest.mark.parametrize(
    ("cpus", "form", "expected"), [(16, "auto", "split"), (16, "fused", "fused"), (2, "auto", "fused")]
)
def test_decoding_on_gpus_that_have_cpus_is_had_for_the_asking_and_the_cpus_fetch(cpus, form, expected):
    layout = choose_layout([Node(cpus=cpus, gpus=2)], ComputeConfig(decode="gpu", form=form), num_shards=100)
    assert (layout.form, layout.decode, layout.stages_on_gpu) == (expected, "gpu", ("decode", "predict"))


def test_actors_that_share_a_gpu_share_its_cpus_too():
    shared = ComputeConfig(form="fused", decode="gpu", actors_per_gpu=4)
    layout = choose_layout([Node(cpus=16, gpus=2)], shared, num_shards=100)
    assert (layout.num_actors, layout.cpus_per_actor, layout.gpus_per_actor) == (8, 2, 0.25)
    assert (layout.num_gpus, layout.gpu_share) == (2, 0.25)
    alone = choose_layout([Node(cpus=16, gpus=2)], shared, num_shards=1)
    assert (alone.num_actors, alone.num_gpus, alone.gpu_share) == (1, 1, 1.0)


@pytest.mark.parametrize(
    ("node", "fields", "num_shards", "expected"),
    [
        (Node(cpus=16, gpus=8), {}, 100, (16, 0.5)),  # CPUs for two actors to each
        (Node(cpus=8, gpus=8), {}, 100, (8, 1)),
        (Node(cpus=9, gpus=8), {}, 100, (8, 1)),  # nine would lie on five
        (Node(cpus=16, gpus=2), {"actors": 2}, 100, (2, 1)),
        (Node(cpus=16, gpus=2), {}, 2, (2, 1)),
        (Node(cpus=16, gpus=2), {"actors": 3}, 100, (3, 0.5)),
    ],
)
def test_gpus_are_shared_only_where_none_is_idle_for_it(node, fields, num_shards, expected):
    shared = ComputeConfig(form="fused", decode="gpu", actors_per_gpu=4, **fields)
    layout = choose_layout([node], shared, num_shards)
    assert (layout.num_actors, layout.gpus_per_actor) == expected


def test_gpus_of_several_nodes_are_shared_as_those_of_one():
    shared = ComputeConfig(form="fused", decode="gpu", actors_per_gpu=2)
    for num_nodes in (1, 4):
        layout = choose_layout([Node(cpus=3, gpus=2)] * num_nodes, shared, num_shards=100)
        assert (layout.num_actors, layout.num_gpus) == (3 * num_nodes, 2 * num_nodes)


def test_more_actors_than_fit_to_gpus_however_many_share_one_are_refused():
    with pytest.raises(ConfigError, match=r"20 actors of 1/4 GPU and 2 CPUs each do not fit this cluster, 8 do"):
        choose_layout([Node(16, 2)], ComputeConfig(form="fused", actors=20, actors_per_gpu=4), num_shards=2)


@pytest.mark.parametrize("actors_per_gpu", [1, 2, 4])
@pytest.mark.parametrize(
    ("node", "decode"), [(Node(1, 1), "gpu"), (Node(3, 2), "gpu"), (Node(8, 8), "gpu"), (Node(4, 2), "cpu")]
)
def test_where_images_are_decoded_does_not_depend_on_how_many_share_a_gpu(node, decode, actors_per_gpu):
    compute = ComputeConfig(form="fused", actors_per_gpu=actors_per_gpu)
    assert choose_layout([node], compute, num_shards=100).decode == decode


def test_actors_that_tasks_decode_for_share_a_gpu_too():
    layout = choose_layout([Node(cpus=8, gpus=1)], ComputeConfig(actors_per_gpu=2), num_shards=100)
    assert (layout.form, layout.num_actors, layout.cpus_per_actor, layout.gpus_per_actor) == ("split", 2, 0, 0.5)


@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(0, 8)), min_size=1, max_size=6),
    st.integers(1, 8),
    st.sampled_from(["auto", "fused", "split"]),
    st.none() | st.integers(1, 16),
    st.integers(1, 1000),
)
def test_sharing_gpus_fits_the_cluster_and_leaves_none_idle(counts, actors_per_gpu, form, cpus_per_actor, num_shards):
    nodes = [Node(cpus, gpus) for cpus, gpus in counts]
    assume(any(node.gpus for node in nodes))
    compute = ComputeConfig(form=form, cpus_per_actor=cpus_per_actor)
    try:
        alone = choose_layout(nodes, compute, num_shards)
    except ConfigError:
        return
    layout = choose_layout(nodes, compute.model_copy(update={"actors_per_gpu": actors_per_gpu}), num_shards)
    size, sharers = layout.cpus_per_actor, round(1 / layout.gpus_per_actor)
    places = (min(gpus * sharers, cpus // size if size else gpus * sharers) for cpus, gpus in counts)
    assert sharers <= actors_per_gpu
    assert sharers * round(10_000 * layout.gpus_per_actor) <= 10_000  # as Ray rounds
    assert alone.num_actors <= layout.num_actors <= sum(places)
    assert alone.num_gpus <= layout.num_gpus <= sum(gpus for _, gpus in counts)
    assert 0 < layout.gpu_share <= 1
    assert layout.decode == alone.decode


@pytest.mark.parametrize("node", [Node(cpus=4), Node(cpus=4, gpus=1)])
def test_decoding_on_gpus_without_gpus_is_refused(node):
    with pytest.raises(ConfigError, match=r"compute\.decode: gpu needs GPUs, got device cpu"):
        choose_layout([node], ComputeConfig(decode="gpu", device="cpu" if node.gpus else "auto"), num_shards=10)


def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(ConfigError, match="no node of the cluster has a GPU"):
        choose_device([Node(cpus=4)], "cuda")


@given(st.lists(st.integers(1, 64), min_size=1, max_size=8), st.sampled_from(["auto", "fused", "split"]))
def test_a_cpu_layout_that_is_given_fits_the_cluster(cpus, form):
    nodes = [Node(cpus=count) for count in cpus]
    try:
        layout = choose_layout(nodes, ComputeConfig(form=form), num_shards=10_000)
    except ConfigError:
        assert form == "split"
        return
    reserved = 1 if layout.form == "split" else 0
    assert layout.num_actors <= sum(node.cpus // layout.cpus_per_actor for node in nodes)
    assert layout.num_actors * layout.cpus_per_actor + reserved <= sum(cpus)


def test_integers_are_for_compiled_networks_only():
    with pytest.raises(ValidationError, match="expected compile always with precision int8"):
        ComputeConfig(precision="int8")
    integers = ComputeConfig(precision="int8", compile="always")
    assert choose_layout([Node(cpus=2)], integers, num_shards=10).device == "cpu"
    with pytest.raises(ConfigError, match=r"compute\.precision: int8 is for CPUs, got GPUs"):
        choose_layout([Node(cpus=2, gpus=1)], integers, num_shards=10)
