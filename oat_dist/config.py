"""Reading the configuration of a run: strict YAML, ``key=value`` overrides.

The keys are those of `oat_dist.config_keys`. An unknown key is refused with the nearest name, an impossible value with
the remedy (`oat_dist.config_checks`).
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from oat_dist.config_checks import check
from oat_dist.config_keys import Config
from oat_dist.errors import ConfigError
from oat_dist.strict_yaml import parse_yaml, read_yaml

__all__ = ["Config", "describe_keys", "load_config", "to_yaml"]


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``key=value`` overrides (dotted keys), check every value.

    Raises:
        ConfigError: file missing or not YAML, unknown key (the nearest one is named), wrong type, impossible value.
    """
    path = Path(path)
    values = read_yaml(path, "config")
    merged = _merge(copy.deepcopy(_defaults()), values, str(path))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"{override!r}: an override has the form key=value, such as batch_size=64")
        try:
            value = parse_yaml(text)
        except yaml.YAMLError:
            value = text
        nested: Any = value
        for part in reversed(key.strip().split(".")):
            nested = {part: nested}
        merged = _merge(merged, nested, f"override {override!r}")
    config = typing.cast(Config, OmegaConf.to_object(merged))
    check(config)
    return config


@functools.cache
def _defaults() -> Any:
    """Read from the dataclasses once: it takes longer than all the rest, and a table has hundreds of configurations."""
    return OmegaConf.structured(Config)


def _merge(base: Any, values: dict[Any, Any], where: str) -> Any:
    _check_keys(values, Config, "", where)
    try:
        return OmegaConf.unsafe_merge(base, _literal(values))  # the base is a copy already
    except OmegaConfBaseException as error:
        text = re.sub(" of type '[a-zA-Z]+'", "", str(error).split("\n")[0].strip()).replace("'None'", "null")
        raise ConfigError(f"{where}: {getattr(error, 'full_key', None) or 'value'}: {text}") from error


def _literal(value: Any) -> Any:
    """Escape what OmegaConf would replace: a value is what it says."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    return value


def _check_keys(values: dict[Any, Any], section: type, prefix: str, where: str) -> None:
    fields = {item.name: item for item in dataclasses.fields(section)}
    hints = typing.get_type_hints(section)
    for key, value in values.items():
        if key not in fields:
            everything = [name for name, _, _ in _walk(Config)]
            full = f"{prefix}{key}"
            close = difflib.get_close_matches(full, everything, n=1, cutoff=0.5) or [
                name for name in everything if name.split(".")[-1] == str(key)
            ]
            hint = f"did you mean {close[0]}?" if close else "see --help for every key"
            raise ConfigError(f"{where}: unknown key {full!r}; {hint}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ConfigError(f"{where}: {prefix}{key} is a section with keys of its own, not a single value")
            _check_keys(value, typing.cast(type, hints[key]), f"{prefix}{key}.", where)
        elif typing.get_origin(hints[key]) is list:
            if not isinstance(value, list):
                raise ConfigError(f"{where}: {prefix}{key} is a list, such as [0.5, 0.5, 0.5]")
        elif isinstance(value, (dict, list)):
            raise ConfigError(f"{where}: {prefix}{key} is a single value, not a list or a section")
        elif value == "???":  # OmegaConf's mark of a missing value
            raise ConfigError(f"{where}: {prefix}{key}=??? is a place-holder; give a value")


def _walk(section: type, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(dotted name, default, help) of every key."""
    hints = typing.get_type_hints(section)
    for item in dataclasses.fields(section):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from _walk(typing.cast(type, hints[item.name]), f"{prefix}{item.name}.")
        else:
            default = (
                item.default if item.default is not dataclasses.MISSING else typing.cast(Any, item).default_factory()
            )
            yield f"{prefix}{item.name}", default, item.metadata["help"]


def describe_keys() -> str:
    """Every key with its default and meaning, for ``--help``."""
    lines = []
    for name, default, text in _walk(Config):
        shown = {"None": "null", "True": "true", "False": "false", "": "''"}.get(str(default), str(default))
        lines.append(f"  {name + '=' + shown:<34} {text}")
    return "\n".join(lines)


def to_yaml(config: Config) -> str:
    """The resolved configuration; loading it again gives an equal `Config`."""
    values = dataclasses.asdict(config)
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    if "\x85" not in text:  # NEL: written as it is, YAML reads it as the end of a line
        return text
    return yaml.safe_dump(values, sort_keys=False)
