"""Models to and from the Hugging Face hub: two files and a page about them. Nothing that is fetched is run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from oat_dist.errors import CheckpointError, OatError
from oat_dist.files import write_atomic
from oat_dist.portable import DESCRIPTION_NAME, WEIGHTS_NAME, Description

__all__ = ["check_login", "fetch", "is_hub_id", "push", "write_page"]

PAGE_NAME = "README.md"
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_HUB_ID = re.compile(f"{_NAME}/{_NAME}")
_SHOWN = 100  # classes on the page


def is_hub_id(text: Any) -> bool:
    """Whether this is ``user/name``."""
    return isinstance(text, str) and bool(_HUB_ID.fullmatch(text)) and "--" not in text and ".." not in text


def _library() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError:
        raise OatError("the hub needs the package huggingface_hub: pip install huggingface_hub") from None
    return huggingface_hub


def fetch(hub_id: str, revision: str | None = None) -> Path:
    """The folder with the files of a model on the hub: downloaded, or from the cache where it is there.

    Raises:
        CheckpointError: it cannot be had; says why.
    """
    hub = _library()
    try:
        return Path(hub.snapshot_download(hub_id, revision=revision, allow_patterns=[DESCRIPTION_NAME, WEIGHTS_NAME]))
    except Exception as error:  # of whichever HTTP client this version of the hub brings
        at = "" if revision is None else f"@{revision}"
        raise CheckpointError(
            f"{hub_id}{at}: cannot be fetched from the hub ({_words(error)}); check the name and the network, log in "
            "with `hf auth login` if the model is private, or download it elsewhere and give its folder"
        ) from error


def check_login(hub_id: str) -> None:
    """Find out early that nothing can be pushed.

    Raises:
        OatError: a name that cannot be, nobody is logged in, or the hub cannot be reached.
    """
    if not is_hub_id(hub_id):
        raise OatError(f"{hub_id}: not a name of the hub; it must be user/name, of letters, digits, '-', '_' and '.'")
    hub = _library()
    try:
        hub.HfApi().whoami()
    except hub.errors.LocalTokenNotFoundError as error:
        raise OatError(
            f"{hub_id}: cannot be pushed, nobody is logged in to the hub; run `hf auth login`, or set HF_TOKEN to a "
            "token that may write"
        ) from error
    except Exception as error:
        raise _not_pushed(hub_id, error) from error


def push(folder: Path, hub_id: str, *, private: bool = False) -> str:
    """Upload all files of a folder to a model repository, made if missing; returns its URL.

    Raises:
        OatError: says why not; what was uploaded is whole or not there.
    """
    hub = _library()
    try:
        api = hub.HfApi()
        url = str(api.create_repo(hub_id, private=private, exist_ok=True))
        api.upload_folder(repo_id=hub_id, folder_path=folder, commit_message="Upload with oat_dist")
    except Exception as error:
        raise _not_pushed(hub_id, error) from error
    return url


def _not_pushed(hub_id: str, error: Exception) -> OatError:
    return OatError(
        f"{hub_id}: cannot be pushed to the hub ({_words(error)}); check the network, and that your token may write"
    )


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def write_page(folder: Path, description: Description, hub_id: str = "USER/NAME") -> None:
    """Write README.md, the page that the hub shows."""
    card, names = description.card, description.card["classes"]
    shown = json.dumps(names[:_SHOWN], ensure_ascii=True).replace("`", "\\u0060")
    more = f"\n\nand {len(names) - _SHOWN:,} more in `{DESCRIPTION_NAME}`." if len(names) > _SHOWN else ""
    crop = card.get("crop", "squash")
    if crop == "center_crop":
        crop = f"center_crop of {card.get('crop_fraction', 0.875):g}"
    objective = "cross-entropy alone"
    if card["objective"] == "oat":
        objective = f"OAT (center {card['center']}, floor {card['floor']:g}), class prior {_plain(description.prior)}"
    calibrated = "not calibrated" if description.temperature is None else f"temperature {description.temperature:.4g}"
    source = "".join(f"| {_plain(key)} | {_plain(value)} |\n" for key, value in description.source.items())
    text = f"""\
---
library_name: oat_dist
pipeline_tag: image-classification
tags:
- image-classification
- oat
---

# Image classifier of {len(names):,} classes

Trained with [oat_dist](https://arxiv.org/abs/2406.12662), Online Anchor-based Training of image classifiers.

```python
from oat_dist import OATClassifier

classifier = OATClassifier.from_pretrained("{hub_id}")
print(classifier.top("photo.jpg"))
```

| | |
| --- | --- |
| network | {_plain(card["name"])} |
| images | {card["image_size"]} x {card["image_size"]}, {crop} |
| trained with | {objective} |
| probabilities | {calibrated} |
{source}
Each image is answered by itself. `{DESCRIPTION_NAME}` says exactly how an image is prepared and what the scores mean.

Classes, in the order of the labels:

```json
{shown}
```{more}
"""
    write_atomic(folder / PAGE_NAME, text.encode(errors="backslashreplace"))


def _plain(value: Any) -> str:
    """A text for a cell of a table, without markup."""
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^\w .,:;=+/@()%-]", "_", text, flags=re.ASCII)[:200]
