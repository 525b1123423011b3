import json
from pathlib import Path

import pytest
from pydantic import Field, ValidationError

from pipeline.config import JobConfig, Section, load
from pipeline.errors import ConfigError


class Tables(Section):
    top_k: int = Field(5, ge=1)
    """How many classes."""
    names: list[str] = Field(["predictions"])
    """Which tables."""


class Example(JobConfig):
    """An example."""

    manifest: str
    """Where the manifest is."""
    tables: Tables = Tables()
    """Tables."""
    note: str | None = None
    """A note."""
    places: list[str] | None = None
    """Where to look."""


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> list[str]:
        (tmp_path / "config.yaml").write_text(text)
        return ["--config", str(tmp_path / "config.yaml")]

    return write


def test_fields_come_from_the_yaml_file(yaml_file):
    config = load(Example, yaml_file("manifest: m\ntables: {top_k: 3}"))
    assert (config.manifest, config.tables.top_k, config.tables.names) == ("m", 3, ["predictions"])


def test_the_command_line_goes_over_the_file_field_by_field(yaml_file):
    argv = yaml_file("manifest: m\ntables: {top_k: 3, names: [embeddings]}")
    config = load(Example, [*argv, "--tables.top_k", "9"])
    assert (config.tables.top_k, config.tables.names) == (9, ["embeddings"])


def test_a_list_is_given_by_repeating_its_field():
    config = load(Example, ["--manifest", "m", "--tables.names", "a", "--tables.names", "b"])
    assert config.tables.names == ["a", "b"]


def test_a_list_is_given_with_commas_between_its_values():
    config = load(Example, ["--manifest", "m", "--tables.names", "a,b"])
    assert config.tables.names == ["a", "b"]


@pytest.mark.parametrize("text", ["tench, Tinca tinca", "tench ,b", " tench", "a,b\n"])
def test_a_list_whose_commas_may_belong_to_its_values_is_refused_with_the_form_that_tells(text):
    with pytest.raises(ConfigError, match=r"--tables\.names: expected values with no white space .* as JSON"):
        load(Example, ["--manifest", "m", "--tables.names", "a", "--tables.names", text])


@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_values_of_any_kind_are_given_as_json(ensure_ascii):
    names = ["tench, Tinca tinca", " kätzchen", 'the "cat"', "back\\slash", "[1]", "1", "null", "a\nb"]
    text = json.dumps(names, ensure_ascii=ensure_ascii)
    assert load(Example, ["--manifest", "m", "--tables.names", text]).tables.names == names


def test_a_text_may_contain_commas():
    assert load(Example, ["--manifest", "m, n"]).manifest == "m, n"


def test_a_config_survives_its_own_yaml(yaml_file):
    config = load(Example, ["--manifest", "größe: #1", "--tables.top_k", "2"])
    assert load(Example, yaml_file(config.to_yaml())) == config


def test_null_unsets_a_field_on_the_command_line_as_it_does_in_yaml(yaml_file):
    in_yaml = yaml_file("manifest: m\nnote: something\nplaces: [here, there]")
    assert load(Example, [*in_yaml, "--note", "null"]).note is None
    assert load(Example, [*in_yaml, "--places", "null"]).places is None
    assert load(Example, [*in_yaml, "--places", '["null"]']).places == ["null"]
    assert load(Example, yaml_file("manifest: m\nnote: null")).note is None


def test_the_environment_is_not_read(monkeypatch):
    monkeypatch.setenv("NOTE", "from the environment")
    assert load(Example, ["--manifest", "m"]).note is None


def test_a_config_cannot_be_changed():
    with pytest.raises(ValidationError):
        load(Example, ["--manifest", "m"]).manifest = "other"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("manifest: m\ntables: {top_k: 0}", r"tables\.top_k: .*greater than or equal to 1, got 0"),
        ("manifest: m\ntables: {top_k: many}", r"tables\.top_k: .*valid integer.*got 'many'"),
        ("manifest: m\ntables: {depth: 1}", r"tables\.depth: unknown field"),
        ("manifest: m\ncolour: red", "colour: unknown field"),
        ("tables: {top_k: 1}", "manifest: required, but not given"),
        ("[1, 2]", "expected a mapping of fields, got a list"),
        ("manifest: m\non: 1", "expected names of fields, got True"),
        ("manifest: [unclosed", "not readable as YAML"),
        ("manifest: !!python/object/apply:os.getcwd []", "not readable as YAML"),
    ],
)
def test_a_wrong_config_says_which_field_what_was_expected_and_what_came(yaml_file, text, message):
    with pytest.raises(ConfigError, match=message):
        load(Example, yaml_file(text))


def test_every_wrong_field_is_named_at_once(yaml_file):
    with pytest.raises(ConfigError) as caught:
        load(Example, yaml_file("tables: {top_k: 0}\ncolour: red"))
    assert len(str(caught.value).splitlines()) == 3


def test_an_unknown_command_line_field_is_refused():
    with pytest.raises(ConfigError, match="--colour"):
        load(Example, ["--manifest", "m", "--colour", "red"])


def test_a_config_without_a_name_is_an_error_like_others():
    with pytest.raises(ConfigError, match="--config: expected one argument"):
        load(Example, ["--manifest", "m", "--config"])


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load(Example, ["--config", "nowhere.yaml"])
    with pytest.raises(ConfigError, match="expected a YAML file, found none at ''"):
        load(Example, ["--config", ""])  # of a variable that is not set


def test_a_file_that_may_not_be_read_is_named(yaml_file, monkeypatch):
    def refuse(path, **how):
        raise PermissionError(13, "Permission denied", str(path))

    argv = yaml_file("manifest: m")
    monkeypatch.setattr(Path, "read_text", refuse)  # root may read all
    with pytest.raises(ConfigError, match=r"config\.yaml: expected a file that may be read, got .*Permission denied"):
        load(Example, argv)


def test_help_lists_every_field_with_meaning_and_default(capsys):
    with pytest.raises(SystemExit) as exit_info:
        load(Example, ["--help"])
    told = capsys.readouterr().out
    assert exit_info.value.code == 0
    assert "--tables.top_k" in told
    assert "How many classes. (default: 5)" in told
    assert "Where the manifest is. (required)" in told
    assert "values which contain commas" in told
