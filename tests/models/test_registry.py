from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.transforms import Preprocessing
from pipeline.errors import BundleError
from pipeline.models.bundle import Architecture, Bundle, load_network, pack
from pipeline.models.catalog import build
from pipeline.models.registry import _natural, list_versions, publish, resolve, set_alias


def a_bundle(version: str = "1", name: str = "tiny") -> tuple[Bundle, bytes]:
    return pack(
        build("cifar_resnet8", 2),
        name=name,
        version=version,
        architecture=Architecture(name="cifar_resnet8"),
        classes=["ant", "bee"],
        preprocessing=Preprocessing(resize_size=32, crop_size=32),
    )


def test_a_published_bundle_is_found_by_each_kind_of_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    registry = str(tmp_path / "models")
    uris = {version: publish(registry, *a_bundle(version)) for version in ("1", "2", "10")}
    assert uris["1"] == f"file://{registry}/tiny/1"
    set_alias(registry, "tiny", "production", "2")
    assert resolve(registry, "tiny") == uris["10"]
    assert resolve(registry, "tiny/1") == uris["1"]
    assert resolve(registry, "tiny@production") == uris["2"]
    assert resolve(None, uris["1"]) == uris["1"]
    assert resolve(None, f"{registry}/tiny/1") == uris["1"]
    monkeypatch.chdir(tmp_path)
    assert resolve("elsewhere", "models/tiny/2") == uris["2"]
    assert list_versions(registry, "tiny") == ["1", "2", "10"]
    set_alias(registry, "tiny", "model", "1")  # in a file named like a bundle's
    assert list_versions(registry, "tiny") == ["1", "2", "10"]


def test_an_alias_moves(tmp_path: Path):
    first, second = (publish(str(tmp_path), *a_bundle(version)) for version in ("1", "2"))
    for version, uri in (("1", first), ("2", second), ("1", first)):
        set_alias(str(tmp_path), "tiny", "production", version)
        assert resolve(str(tmp_path), "tiny@production") == uri


def test_of_writers_of_one_version_exactly_one_wins(tmp_path: Path):
    check_that_one_writer_wins(f"file://{tmp_path}")


@pytest.mark.s3
def test_of_writers_of_one_version_exactly_one_wins_on_s3(s3_uri: str):
    check_that_one_writer_wins(f"{s3_uri}/models")


def check_that_one_writer_wins(registry: str) -> None:
    candidates = [a_bundle() for _ in range(8)]

    def attempt(candidate: tuple[Bundle, bytes]) -> str:
        try:
            publish(registry, *candidate)
        except BundleError as error:
            return str(error)
        return "won"

    with ThreadPoolExecutor(len(candidates)) as pool:
        outcomes = list(pool.map(attempt, candidates))
    winner, _ = candidates[outcomes.index("won")]
    assert sum("expected a free place" in outcome for outcome in outcomes) == len(candidates) - 1
    uri = resolve(registry, "tiny/1")
    assert Bundle.load(uri).digest == winner.digest
    load_network(uri)  # its weights are the winner's


@pytest.mark.s3
def test_a_registry_lives_in_an_object_store(s3_uri: str):
    bundle, weights = a_bundle("1.9")
    publish(f"{s3_uri}/models/", bundle, weights)
    newest = publish(f"{s3_uri}/models", *a_bundle("1.10"))
    set_alias(f"{s3_uri}/models", "tiny", "production", "1.9")
    assert resolve(f"{s3_uri}/models", "tiny") == newest == f"{s3_uri}/models/tiny/1.10"
    assert Bundle.load(resolve(f"{s3_uri}/models", "tiny@production")) == bundle


def test_a_half_written_version_is_not_listed(tmp_path: Path):
    publish(str(tmp_path), *a_bundle("1"))
    (tmp_path / "tiny" / "2").mkdir()
    (tmp_path / "tiny" / "2" / "weights.safetensors").write_bytes(b"")
    assert list_versions(str(tmp_path), "tiny") == ["1"]
    with pytest.raises(BundleError, match=r"expected version '2' of 'tiny'.*found 1"):
        resolve(str(tmp_path), "tiny/2")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("absent", "found no version"),
        ("tiny/7", "expected version '7'.*found 1"),
        ("tiny@nightly", "expected an alias 'nightly'.*found none"),
        ("tiny@broken", "broken.json is damaged"),
        ("tiny@gone", "expected version '3'.*found 1"),
        ("tiny/1/2", "expected name, name/version"),
        ("", "expected name, name/version"),
        ("tiny/..", "letters, digits"),
        ("ti ny", "letters, digits"),
    ],
)
def test_a_reference_to_nothing_says_what_there_is(tmp_path: Path, reference: str, message: str):
    publish(str(tmp_path), *a_bundle())
    (tmp_path / "tiny" / "aliases").mkdir()
    (tmp_path / "tiny" / "aliases" / "broken.json").write_text('{"version": 1}')
    (tmp_path / "tiny" / "aliases" / "gone.json").write_text('{"version": "3"}')
    with pytest.raises(BundleError, match=message):
        resolve(str(tmp_path), reference)


def test_without_a_registry_a_name_means_nothing():
    with pytest.raises(BundleError, match="expected a registry for 'tiny'"):
        resolve(None, "tiny")


def test_an_alias_points_at_published_versions_only(tmp_path: Path):
    publish(str(tmp_path), *a_bundle())
    with pytest.raises(BundleError, match="expected version '2'"):
        set_alias(str(tmp_path), "tiny", "production", "2")
    with pytest.raises(BundleError, match="letters, digits"):
        set_alias(str(tmp_path), "tiny", "../production", "1")


def test_a_version_cannot_take_the_place_of_the_aliases(tmp_path: Path):
    with pytest.raises(BundleError, match="aliases"):
        publish(str(tmp_path), *a_bundle("aliases"))


def test_versions_are_ordered_by_the_value_of_their_numbers():
    ordered = ["0.9", "1", "1.0-rc1", "1.9", "1.10", "2", "v9", "v10"]
    backwards = ordered[::-1]
    assert sorted(backwards, key=_natural) == ordered


@given(st.lists(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,5}", fullmatch=True), unique=True))
def test_every_set_of_versions_has_one_order(versions: list[str]):
    backwards = versions[::-1]
    assert sorted(versions, key=_natural) == sorted(backwards, key=_natural)


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_higher_number_is_a_higher_version(a: int, b: int):
    assert (_natural(f"v1.{a}") < _natural(f"v1.{b}")) == (a < b)
