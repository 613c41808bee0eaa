"""What config, DeepSpeed file and launcher say together: one source for every number, and conflicts by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import HERE

from oat_dist.engine.launcher import agree
from oat_dist.engine.zero_config import BatchShape, complete, read_settings
from oat_dist.errors import OatError

READY = HERE.parent / "configs" / "deepspeed"


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)


def settings_file(folder: Path, **content: Any) -> Path:
    path = folder / "deepspeed.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | content))
    return path


@pytest.mark.parametrize("path", sorted(READY.glob("*.json")), ids=lambda path: path.stem)
def test_the_ready_files_are_what_their_names_say(path: Path) -> None:
    plan = agree(None, str(path), None)
    assert plan.engine == path.stem.removesuffix("-offload")
    offload = plan.settings["zero_optimization"].get("offload_optimizer", {"device": "none"})["device"]
    assert offload == ("cpu" if path.stem.endswith("-offload") else "none")


def test_batch_clipping_and_precision_come_from_us_alone(tmp_path: Path) -> None:
    path = settings_file(
        tmp_path,
        train_batch_size="auto",
        train_micro_batch_size_per_gpu="auto",
        gradient_clipping="auto",
        bf16={"enabled": "auto"},
        fp16={"enabled": False},
        zero_force_ds_cpu_optimizer=False,
        communication_data_type="fp32",
    )
    full = complete(read_settings(path), 4, BatchShape(8, 2), 1.5, "bf16")
    assert full == {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 10_000_000},
        "communication_data_type": "fp32",  # theirs is passed on
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 2,
        "train_batch_size": 64,
        "gradient_clipping": 1.5,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []},
    }
    assert complete({"zero_optimization": {"stage": 1}}, 1, BatchShape(1, 1), None, "no")["gradient_clipping"] == 0.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train_batch_size": 64}, "train_batch_size follows from batch_size; take it out of the file"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu follows from micro_batch_size"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps follows from batch_size and micro"),
        ({"gradient_clipping": 1.0}, "gradient_clipping follows from optim.clip_norm"),
        ({"optimizer": {"type": "Adam"}}, "optimizer follows from optim.name"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler follows from optim.schedule"),
        ({"fp16": {"enabled": True}}, "use bf16, which needs no loss scaling"),
        ({"bf16": {"enabled": True}}, "bf16 follows from engine.precision"),
        ({"zero_force_ds_cpu_optimizer": True}, "the optimizer is never exchanged for another"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled follows from engine.precision"),
        ({"torch_autocast": 3}, "torch_autocast is an object"),
        ({"communication_data_type": "bf16"}, "communication_data_type=bf16 would round every gradient"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "zero_quantized_gradients trains"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "offload_param.device must be cpu or none, not nvme",
        ),
        ({"zero_optimization": {"stage": 0}}, "stage must be 1, 2 or 3, not 0; for plain data parallel"),
        ({"zero_optimization": {}}, "stage must be 1, 2 or 3, not null"),
        ({"zero_optimization": {"stage": True}}, "stage must be 1, 2 or 3, not true"),
        ({"zero_optimization": 2}, "a DeepSpeed file is a JSON object"),
    ],
)
def test_what_would_disagree_is_refused(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    path = settings_file(tmp_path, **content)
    with pytest.raises(OatError) as caught:
        agree(None, str(path), None)
    assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[1]", "{", "\udcff", "null", "3"])
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "deepspeed.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(OatError, match="DeepSpeed"):
        agree(None, str(path), None)
    with pytest.raises(OatError, match="no such DeepSpeed file"):
        agree(None, str(tmp_path / "missing.json"), None)


def test_the_launcher_speaks_where_the_config_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert agree(None, None, None).engine == "ddp"
    assert agree("zero3", None, "bf16").settings == {"zero_optimization": {"stage": 3}}
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert agree(None, None, None).engine == "zero2"  # accelerate's default
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    plan = agree("zero3", None, None)
    assert plan.settings["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    path = settings_file(tmp_path)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    assert agree(None, None, None).engine == "zero2"
    assert agree(None, str(path), None).engine == "zero2"


def test_conflicts_name_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = settings_file(tmp_path)

    def refusal(engine: str | None, deepspeed: str | None = None, precision: str | None = None) -> str:
        with pytest.raises(OatError) as caught:
            agree(engine, deepspeed, precision)
        return str(caught.value)

    assert refusal("zero3", str(path)) == (
        f"engine.name=zero3 is asked for, but engine.deepspeed={path} says zero2; make them agree"
    )
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert "the launcher (zero_stage) says zero2" in refusal("ddp")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4, which follows from batch_size and micro_batch_size" in refusal(
        None
    )
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "1.0")
    assert "which follows from optim.clip_norm" in refusal(None)
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "none")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "nvme")
    assert "only cpu is supported" in refusal(None)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "many")
    assert "zero_stage is 'many'; use 1, 2 or 3" in refusal(None)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0")
    assert "must be 1, 2 or 3, not 0" in refusal(None)
    other = tmp_path / "other.json"
    other.write_text(path.read_text())
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(other))
    assert str(path) in refusal(None, str(path)) and str(other) in refusal(None, str(path))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert "use bf16" in refusal(None)
