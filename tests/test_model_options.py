"""Options that change how a network computes, and not what: torch.compile and channels_last, in whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import heard_ranks
from safetensors.torch import load_file
from training_checks import BASE

from oat_dist.data.index import ShardSet

STEPS = 10


def train(folder: Path, digits: dict[str, ShardSet], name: str, *overrides: str) -> tuple[int, str]:
    """The status of a run, and what it says on stderr."""
    (folder / "config.yaml").write_text(BASE)
    arguments = [
        str(folder / "config.yaml"),
        f"data.path={digits['train'].folder.parent}",
        f"output_dir={folder / name}",
    ]
    arguments += [f"max_steps={STEPS}", "pretrain_epochs=0", "data.eval_split=null", *overrides]
    return heard_ranks(1, "oat_dist.train:main", arguments)[0]


def test_compiled_and_channels_last_train_the_same_network(tmp_path: Path, digits: dict[str, ShardSet]) -> None:
    found = {}
    for name, overrides in (
        ("plain", []),
        ("compiled", ["model.compile=true"]),
        ("channels_last", ["model.channels_last=true"]),
        ("other", ["seed=1"]),  # the control
    ):
        status, said = train(tmp_path, digits, name, *overrides)
        assert status == 0, said
        found[name] = load_file(tmp_path / name / "checkpoints" / f"step-{STEPS}" / "model.safetensors")

    def apart(name: str) -> float:
        assert found[name].keys() == found["plain"].keys()
        return max(float((found[name][key] - found["plain"][key]).abs().max()) for key in found[name])

    assert apart("compiled") < 1e-4 and apart("channels_last") < 1e-4
    assert apart("other") > 1e-2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.channels_last=true", "engine.name=zero1"], "model.channels_last works with engine.name=ddp"),
        (["model.compile=true", "engine.name=zero3"], "model.compile works with ddp, zero1 and zero2"),
    ],
)
def test_what_an_engine_would_ignore_is_refused(
    tmp_path: Path, digits: dict[str, ShardSet], overrides: list[str], message: str
) -> None:
    status, said = train(tmp_path, digits, "run", *overrides)
    assert status == 2 and "Traceback" not in said
    assert message in said
