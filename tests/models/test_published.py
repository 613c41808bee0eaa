"""`model.weights=pretrained`: caches, no network, and what the published weights want to see."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from oat_dist.errors import ConfigError, DataError
from oat_dist.models import Preprocessing, build_model, expected_preprocessing, fetch_weights

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
RESNET18 = "https://download.pytorch.org/models/resnet18-f37072fd.pth"
EMPTY = "127.0.0.1:9"  # nothing listens on the discard port: refused at once, wherever the tests run

Python = Callable[[str], str]


@pytest.fixture
def offline(tmp_path: Path) -> Python:
    """A function that runs a script in a process whose caches are empty and whose way out is closed; its output."""

    def run(script: str) -> str:
        environment = {"TORCH_HOME": str(tmp_path / "torch"), "HF_HOME": str(tmp_path / "hf")}
        environment |= {f"{kind}_proxy": f"http://{EMPTY}" for kind in ("http", "https", "all")}
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env={"PATH": "", **environment}, timeout=100
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


REPORT = """
from oat_dist.errors import OatError
from oat_dist.models import build_model
try:
    build_model({name!r}, 3, "pretrained", 32)
    print("built")
except OatError as error:
    print(f"{{type(error).__name__}}: {{error}}")
"""


def test_torchvisions_without_a_network(offline: Python, tmp_path: Path) -> None:
    place = tmp_path / "torch/hub/checkpoints/resnet18-f37072fd.pth"
    lines = offline(f"""
import torch
from pathlib import Path
from oat_dist.errors import OatError
from oat_dist.models import build_model
def build():
    try:
        return build_model("resnet18", 3, "pretrained", 32)
    except OatError as error:
        print(f"{{type(error).__name__}}: {{error}}")
build()
place = Path({str(place)!r})
print(list(place.parent.iterdir()))  # no half a file stays behind
source = build_model("resnet18", 1000)
torch.save(source.state_dict(), place)  # the remedy: the cache is used as it is
model = build()
print(torch.equal(model.conv1.weight, source.conv1.weight), model.fc.out_features)
place.write_bytes(b"nonsense")
build()
""").splitlines()
    assert lines[0].startswith(f"DataError: {RESNET18}: cannot be downloaded (")
    assert lines[0].endswith(f"); put the file at {place}, or give its place in model.weights")
    assert lines[1:3] == ["[]", "True 3"]
    assert lines[3].startswith(f"DataError: {place}: not a plain state dict (damaged")
    assert len(lines) == 4


def test_timms_without_a_network(offline: Python, tmp_path: Path) -> None:
    started = time.monotonic()
    message = offline(REPORT.format(name="timm/test_resnet"))
    assert time.monotonic() - started < 60  # the hub itself would try again for half a minute
    url = "https://huggingface.co/timm/test_resnet.r160_in1k/resolve/main/model.safetensors"
    assert message.startswith(f"DataError: {url}: cannot be downloaded (")
    assert message.endswith(
        f"), and {tmp_path / 'hf/hub'} does not hold it; download it elsewhere and give its place in model.weights\n"
    )


def test_timms_cache_is_used(offline: Python, tmp_path: Path) -> None:
    """The layout of the Hugging Face cache: a reference to a commit, and a snapshot of it."""
    from safetensors.torch import save_file

    repository = tmp_path / "hf/hub/models--timm--test_resnet.r160_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    source = build_model("timm/test_resnet", 1000)
    save_file(source.state_dict(), snapshot / "model.safetensors")
    script = """
from oat_dist.models import build_model, fetch_weights, load_weights
path = fetch_weights("timm/test_resnet", "pretrained")
print(path)
print(load_weights(build_model("timm/test_resnet", 3), "timm/test_resnet", path).head_loaded)
print(load_weights(build_model("timm/test_resnet", 1000), "timm/test_resnet", path).head_loaded)
"""
    assert offline(script).splitlines() == [str(snapshot / "model.safetensors"), "False", "True"]


def test_an_old_timm_file_comes_by_its_address(offline: Python, tmp_path: Path) -> None:
    message = offline(REPORT.format(name="timm/legacy_seresnet18"))
    assert "/releases/download/v0.1-weights/seresnet18-4bb0ce65.pth: cannot be downloaded (" in message
    assert f"put the file at {tmp_path}/torch/hub/checkpoints/seresnet18-4bb0ce65.pth, or" in message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lightweight", "none are published for model.name=lightweight; give a file"),
        ("WRN-28-10", "none are published for model.name=WRN-28-10; give a file"),
        ("timm/resnet10t.none", "model.name='timm/resnet10t.none' is unknown; did you mean resnet10t"),
        ("timm/swin_s3_tiny_224", None),
        ("timm/cait_xxs24_224", None),
        ("timm/vit_base_patch8_224.augreg_in21k", None),
        ("timm/efficientnet_b8", "timm has none for model.name=timm/efficientnet_b8 that torch reads; give a file"),
    ],
)
def test_networks_without_published_weights(name: str, message: str | None) -> None:
    if message is None:
        assert expected_preprocessing(name) is not None
        return
    with pytest.raises(ConfigError) as caught:
        fetch_weights(name, "pretrained")
    assert message in str(caught.value)


def test_a_file_is_its_own_path(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    with pytest.raises(DataError, match=r"model.pth: no such weights file \(model.weights\); give a file, or"):
        fetch_weights("resnet18", str(path))
    path.touch()
    assert fetch_weights("resnet18", str(path)) == path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lightweight", None),
        ("wrn_28_10", None),
        ("timm/efficientnet_b8", None),
        ("ResNet-18", Preprocessing(*IMAGENET, 224)),
        ("efficientnet_b1", Preprocessing(*IMAGENET, 240)),
        ("squeezenet1_1", Preprocessing(*IMAGENET, 224)),
        ("tf_efficientnet_lite0", Preprocessing((0.5,) * 3, (0.5,) * 3, 224)),
        ("timm/vit_tiny_patch16_224", Preprocessing((0.5,) * 3, (0.5,) * 3, 224)),
    ],
)
def test_what_published_weights_were_made_with(name: str, expected: Preprocessing | None) -> None:
    assert expected_preprocessing(name) == expected
