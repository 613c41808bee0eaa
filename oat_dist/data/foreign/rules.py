"""Which member of a sample is the image, where its label is, and reading that label."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from oat_dist.errors import ConfigError

__all__ = ["Rules", "label_text"]

_LONGEST_CLASS = 200


@dataclass(frozen=True)
class Rules:
    """Which member of a sample is the image, and where its label is.

    Attributes:
        images: kinds of the image member, the first one there counts; empty: any kind of `IMAGE_KINDS`.
        label: kind of the member that holds the label.
        path: where in that member, if it is JSON: keys and list positions joined by dots; empty: the member is the
            label as text.
        first_label: the number of the first class, where labels are numbers.
    """

    images: tuple[str, ...] = ()
    label: str = "cls"
    path: str = ""
    first_label: int = 0

    @classmethod
    def parse(cls, image_key: str | None, label: str, first_label: int = 0) -> Rules:
        """From `"jpg"` or `"jpg;png"` (None: any) and `"cls"` or `"json:key.path"`.

        Raises:
            ConfigError: an empty kind, or JSON without a key.
        """
        images = tuple(part.strip().lower().lstrip(".") for part in (image_key or "").split(";"))
        kind, colon, path = label.partition(":")
        kind = kind.strip().lower().lstrip(".")
        if image_key is not None and not all(images):
            raise ConfigError(f"image key {image_key!r}: give the extension of the image, as in jpg or jpg;png")
        if not kind or (colon and not path):
            raise ConfigError(f"label {label!r}: give the extension of the label member, as in cls or json:key.path")
        if kind == "json" and not path:
            raise ConfigError(f"label {label!r}: say which value of the JSON, as in json:label or json:meta.label")
        return cls(() if image_key is None else images, kind, path, first_label)

    def __str__(self) -> str:
        return f"{self.label}:{self.path}" if self.path else self.label


def label_text(data: bytes, rules: Rules) -> str:
    """A label as text, from the bytes of its member.

    Raises:
        KeyError: there is none; with the reason.
        ValueError: it is none; with the reason.
    """
    if rules.path:
        text = _json_text(data, rules)
    else:
        try:
            text = data.decode().strip()
        except UnicodeDecodeError:
            raise ValueError(f"unreadable label (.{rules.label} is no UTF-8 text)") from None
    if not text:
        raise KeyError(f"the label in .{rules.label} is empty")
    if len(text) > _LONGEST_CLASS or not text.isprintable():
        shown = text[:40].encode("unicode_escape").decode()
        raise ValueError(f"unreadable label (.{rules.label} has {len(text):,} characters: {shown}...)")
    return text


def _json_text(data: bytes, rules: Rules) -> str:
    try:
        value: Any = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError(f"unreadable label (.{rules.label} is no JSON)") from None
    rest = rules.path
    while rest:
        step, _, after = rest.partition(".")
        if isinstance(value, dict) and rest in value:  # a key that has dots itself
            value, rest = value[rest], ""
        elif isinstance(value, dict) and step in value:
            value, rest = value[step], after
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value, rest = value[int(step)], after
        else:
            raise KeyError(f"the JSON has no {rules.path}")
    if value is None:
        raise KeyError(f"{rules.path} is null")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if not isinstance(value, (str, int)):
        raise ValueError(
            f"unreadable label ({rules.path} is {json.dumps(value)[:40]}, neither text nor a whole number)"
        )
    return str(value).strip()
