"""YAML without surprises, for every file of settings.

Scalars stay text until the type of their key reads them, so that ``no``, ``1e-3`` or a date mean what they say; only
null (and ``<<``) is special. A key given twice is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from oat_dist.errors import ConfigError

__all__ = ["parse_yaml", "read_yaml"]


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str) -> Any:
    """Mappings, lists, texts and None.

    Raises:
        yaml.YAMLError: not YAML, or a key given twice.
    """
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read_yaml(path: Path, what: str) -> dict[Any, Any]:
    """The mapping in a file; `what` is what errors call such a file.

    Raises:
        ConfigError: file missing, not YAML, or something else than a mapping.
    """
    try:
        values = parse_yaml(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such {what} file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a {what} is a mapping of keys to values")
    return values
