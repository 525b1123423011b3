"""Configs: one YAML file first, then command-line fields over it, parsed into one frozen model.

    python -m jobs.predict --config configs/classify.yaml --output s3://bucket/tables --tables.top_k 3

A config is a subclass of `JobConfig` with fields and nested `Section`s, each with a `description` that `--help` prints.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from pipeline.errors import ConfigError

Config = TypeVar("Config", bound="JobConfig")

_OF_LISTS = (
    "lists are given as a,b or by repeating the field; values which contain commas, or begin or end with white space, "
    'as JSON: \'["tench, Tinca tinca", "goldfish"]\''
)


class Section(BaseModel):
    """A named group of config fields; frozen, and strict about unknown ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ClusterConfig(Section):
    """What is waited for before the work begins on all nodes that are up by then."""

    cpus: int = Field(0, ge=0)
    """CPUs that must be free before the work begins, on all nodes that are up by then; an autoscaler is asked for what
    is missing, and waited for, for ever if need be."""
    gpus: int = Field(0, ge=0)
    """GPUs, likewise."""


class JobConfig(BaseSettings):
    """The whole config of one job; frozen, and strict about unknown fields. The environment is not read."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_parse_none_str="null",  # as in YAML
    )
    resumes: ClassVar[bool] = False
    """Whether the same command goes on from what a stopped one has done."""

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)

    def to_yaml(self) -> str:
        """The whole config as `--config` reads it."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load(config_type: type[Config], argv: list[str]) -> Config:
    """Parse `[--config FILE.yaml] [--section.field value …]` into a `config_type`.

    `--help` prints every field with its meaning and default, then exits. Raises ConfigError naming each wrong field,
    what was expected and what came.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    own.add_argument("--config", metavar="FILE", help="YAML file with the fields; those given here go over it")
    try:
        known, rest = own.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(f"command line: {error}") from error
    from_yaml = _read_yaml(known.config) if known.config is not None else {}
    try:
        source: Any = CliSettingsSource(
            config_type,
            cli_prog_name=f"python -m {_job(config_type)} [--config FILE]",
            cli_exit_on_error=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110),
        )
        source.root_parser.epilog = _OF_LISTS
        return config_type(**_merge(from_yaml, source(parsed_args=_parse(source, rest))()))
    except SettingsError as error:
        raise ConfigError(f"command line: {error}; --help lists every field") from error
    except ValidationError as error:
        raise ConfigError(describe(error)) from error


def _parse(source: Any, argv: list[str]) -> argparse.Namespace:
    """What `source` finds in `argv`. Raises ConfigError where a list would be cut at commas that may be its values'."""
    given: argparse.Namespace = source.root_parser.parse_args(argv)
    for name, values in vars(given).items():
        if isinstance(values, list):
            for text in values:
                _refuse_blanks(name, text)
            is_escaped = len(values) == 1 and values[0].startswith("[") and "\\" in values[0]
            if is_escaped or values == ["null"]:  # in a list, pydantic-settings takes either for text
                setattr(given, name, values[0])
    return given


def _refuse_blanks(name: str, text: str) -> None:
    is_json = text.startswith(("[", "{", '"'))
    if not is_json and any(part != part.strip() for part in text.split(",")):
        raise ConfigError(f"--{name}: expected values with no white space around them, got {text!r}; {_OF_LISTS}")


def _job(config_type: type[JobConfig]) -> str:
    """The module that is being run, which need not be the config's."""
    spec = sys.modules["__main__"].__spec__
    return config_type.__module__ if spec is None else spec.name


def describe(error: ValidationError) -> str:
    """A validation error as one line per field: its path, what was expected, what came."""
    lines = []
    for problem in error.errors(include_url=False):
        path = ".".join(str(part) for part in problem["loc"]) or "config"
        if problem["type"] == "extra_forbidden":
            lines.append(f"{path}: unknown field; --help lists those there are")
        elif problem["type"] == "missing":
            lines.append(f"{path}: required, but not given")
        else:
            lines.append(f"{path}: {problem['msg']}, got {problem['input']!r}")
    return "\n".join(lines)


def refuse_change(before: dict[str, Any], after: dict[str, Any], remedy: str) -> None:
    """Raises ConfigError with a line for each field that is another `after` than it was `before`, under `remedy`."""
    changed = [name for name in before | after if before.get(name) != after.get(name)]
    if changed:
        lines = "\n".join(f"{name}: began with {before.get(name)!r}, now {after.get(name)!r}" for name in changed)
        raise ConfigError(f"{remedy}:\n{lines}")


def _read_yaml(path: str) -> dict[str, Any]:
    if not os.path.isfile(path):
        raise ConfigError(f"--config: expected a YAML file, found none at {path!r}")
    try:
        fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not readable as YAML: {error}") from error
    except OSError as error:
        raise ConfigError(f"--config {path}: expected a file that may be read, got {error}") from error
    if fields is not None and not isinstance(fields, dict):
        raise ConfigError(f"--config {path}: expected a mapping of fields, got a {type(fields).__name__}")
    if strange := [name for name in fields or () if not isinstance(name, str)]:
        raise ConfigError(f"--config {path}: expected names of fields, got {strange[0]!r}")
    return fields or {}


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, field by field; a list is replaced whole."""
    merged = dict(below)
    for name, value in above.items():
        both_sections = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value) if both_sections else value
    return merged
