"""Checkpoints are absent or complete, damaged ones are passed over, and nothing is ever lost for a failed save."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from oat_dist.checkpoint import (
    Checkpoint,
    CheckpointStore,
    find_checkpoint,
    verify,
)
from oat_dist.config_keys import JobConfig
from oat_dist.distributed import World
from oat_dist.errors import CheckpointError
from oat_dist.files import FolderBusyError
from oat_dist.optim import build_optimizer
from oat_dist.optimizer_state import load_optimizer, optimizer_tensors
from oat_dist.randomness import random_state, set_random_state
from oat_dist.run_folder import RunFolder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


def save(store: CheckpointStore, step: int, best: bool = False) -> Path:
    shared: dict[str, dict[str, Tensor] | str] = {
        "model.safetensors": {"weight": torch.full((3, 2), float(step))},
        "state.json": json.dumps({"step": step}) + "\n",
    }
    return store.save(step, shared, {"rng": torch.arange(step)}, best)


def visible(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_round_trip(root: Path) -> None:
    store = CheckpointStore(root, World(), keep=2)
    tensors = {
        "f32": torch.randn(5, 3),
        "f64": torch.randn(2, dtype=torch.float64),
        "bf16": torch.randn(4).bfloat16(),
        "int": torch.tensor([2**62, -1]),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "transposed": torch.randn(3, 4).T,
        "bool": torch.tensor([True, False]),
    }
    folder = store.save(
        7, {"model.safetensors": tensors, "state.json": '{"a": [1, "ü"]}'}, {"own": torch.ones(1)}, True
    )
    assert folder == root / "step-7"
    checkpoint = find_checkpoint(root.parent)
    assert (checkpoint.folder, checkpoint.step) == (folder, 7)
    loaded = checkpoint.tensors("model.safetensors")
    assert loaded.keys() == tensors.keys()
    for key, value in tensors.items():
        assert loaded[key].dtype == value.dtype
        assert torch.equal(loaded[key], value)
    assert checkpoint.json("state.json") == {"a": [1, "ü"]}
    assert torch.equal(checkpoint.tensors("rank-00000.safetensors")["own"], torch.ones(1))
    assert visible(folder) == ["manifest.json", "model.safetensors", "rank-00000.safetensors", "state.json"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["world_size"] == 1
    assert set(manifest["files"]) == {"model.safetensors", "rank-00000.safetensors", "state.json"}
    assert store.newest() == (checkpoint, [])
    for name in ("model.safetensors", "anchor.json"):
        with pytest.raises(CheckpointError, match=re.escape(f"{folder / name}: cannot be loaded")):
            checkpoint.json(name)
    for name in ("state.json", "anchor.safetensors"):
        with pytest.raises(CheckpointError, match=re.escape(f"{folder / name}: cannot be loaded")):
            checkpoint.tensors(name)


# Damage.


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"garbage")


def clear(path: Path) -> None:
    path.write_bytes(b"")


def scramble(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x80" * 40)


def into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (name, damage)
        for name in ("model.safetensors", "state.json", "rank-00000.safetensors", "manifest.json")
        for damage in (flip, cut, grow, clear, scramble, Path.unlink, into_folder)
        # A flipped byte may leave a manifest that means the same: see the next test.
        if (name, damage) != ("manifest.json", flip)
    ],
)
def test_damage_is_passed_over(root: Path, name: str, damage: Callable[[Path], None]) -> None:
    store = CheckpointStore(root, World(), keep=3)
    for step in (5, 10, 20):
        save(store, step)
    damage(root / "step-20" / name)
    where = str(root / "step-20" / name)
    assert find_checkpoint(root.parent).step == 10
    refused = refusal(root / "step-20")
    newest, problems = store.newest()
    assert newest == Checkpoint(root / "step-10")
    assert len(problems) == 1
    assert problems[0].startswith(where)
    assert refused == f"{root / 'step-20'}: {problems[0]}"
    assert find_checkpoint(root / "step-10").step == 10
    damage(root / "step-10" / name)
    assert find_checkpoint(root.parent).step == 5
    damage(root / "step-5" / name)
    assert (
        refusal(root.parent)
        == f"{root.parent}: no valid checkpoint in this run folder; {problems[0].replace('step-20', 'step-10')}"
    )
    save(store, 30)  # the run goes on nevertheless
    assert find_checkpoint(root.parent).step == 30


def test_no_flipped_byte_of_a_manifest_is_fatal(root: Path) -> None:
    """Whatever bit rots, the answer is this checkpoint whole or the one before, never a crash."""
    store = CheckpointStore(root, World(), keep=2)
    save(store, 1)
    save(store, 2)
    path = root / "step-2" / "manifest.json"
    whole = path.read_bytes()
    found = set()
    for position in range(0, len(whole), 3):
        for mask in (0x01, 0x80):
            data = bytearray(whole)
            data[position] ^= mask
            path.write_bytes(data)
            found.add(find_checkpoint(root.parent).step)
    assert found == {1, 2}


@pytest.mark.parametrize(
    "manifest",
    [
        "null",
        "[]",
        "3",
        "{}",
        '{"files": null}',
        '{"files": []}',
        '{"files": ["model.safetensors"]}',
        '{"files": {"model.safetensors": null}}',
        '{"files": {"model.safetensors": {"size": 1}}}',
        '{"files": {"model.safetensors": {"size": "1", "sha256": 3}}}',
        '{"files": {"": {"size": 1, "sha256": ""}}}',
        '{"files": {"\\u0000": {"size": 1, "sha256": ""}}}',
    ],
)
def test_a_manifest_of_another_shape_is_damage(root: Path, manifest: str) -> None:
    store = CheckpointStore(root, World(), keep=2)
    save(store, 1)
    save(store, 2)
    (root / "step-2" / "manifest.json").write_text(manifest)
    assert find_checkpoint(root.parent).step == 1
    assert str(root / "step-2") in refusal(root / "step-2")


@pytest.mark.parametrize("name", ["../step-1/state.json", "/etc/hostname", "a/b", "..", "."])
def test_names_that_are_paths_are_refused(root: Path, name: str) -> None:
    store = CheckpointStore(root, World(), keep=2)
    save(store, 1)
    folder = save(store, 2)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = json.loads((root / "step-1" / "manifest.json").read_text())["files"]["state.json"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert verify(folder) is not None
    assert find_checkpoint(root.parent).step == 1


# Names and folders.


def test_latest_and_best(root: Path) -> None:
    store = CheckpointStore(root, World(), keep=2)
    assert store.best() is None
    assert store.newest() == (None, [])
    save(store, 1, best=True)
    assert ((root / "latest").read_text(), (root / "best").read_text()) == ("step-1\n", "step-1\n")
    save(store, 2)
    assert ((root / "latest").read_text(), (root / "best").read_text()) == ("step-2\n", "step-1\n")


def test_a_kill_before_latest_and_best_were_written_is_mended(root: Path) -> None:
    """They are written after the rename; a resumed run knows from the checkpoint what they must say."""
    store = CheckpointStore(root, World(), keep=2)
    for step in (1, 2):
        save(store, step)
    (root / "latest").write_text("step-1\n")
    newest, _ = store.newest()
    assert newest is not None
    store.point(newest, 2)
    assert ((root / "latest").read_text(), (root / "best").read_text()) == ("step-2\n", "step-2\n")
    store.point(newest, 77)  # gone
    assert store.best() is None


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_anew(root: Path) -> None:
    store = CheckpointStore(root, World(), keep=2)
    for step in (1, 2):
        save(store, step)
        grow(root / f"step-{step}" / "state.json")
    with pytest.raises(
        CheckpointError, match=r"every checkpoint is damaged: .*restore one, or choose another output_dir"
    ):
        store.newest()
    assert {"step-1", "step-2"} <= set(visible(root))


def test_a_file_system_that_fails_is_not_taken_for_damage(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(CheckpointStore(root, World(), keep=2), 1)
    target = root / "step-1" / "model.safetensors"
    target.unlink()
    target.symlink_to(target.name)  # a loop: ELOOP, an error that is neither absence nor content
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read .*mend that and start again"):
        find_checkpoint(root.parent)


def test_retention_never_takes_the_best_or_the_newest(root: Path) -> None:
    store = CheckpointStore(root, World(), keep=2)
    kept = []
    for step in range(1, 8):
        save(store, step, best=step in (2, 5))
        kept.append(sorted(name for name in visible(root) if name.startswith("step-")))
    assert kept == [
        ["step-1"],
        ["step-1", "step-2"],
        ["step-2", "step-3"],
        ["step-2", "step-3", "step-4"],
        ["step-4", "step-5"],
        ["step-5", "step-6"],
        ["step-5", "step-6", "step-7"],
    ]
    alone = CheckpointStore(root, World(), keep=1)
    save(alone, 100)  # 100 sorts before 7 as text
    assert [name for name in visible(root) if name.startswith("step-")] == ["step-100", "step-5"]


def test_folders_of_the_user_are_left_alone(root: Path) -> None:
    store = CheckpointStore(root, World(), keep=1)
    save(store, 5)
    for name in ("step-5-backup", "step-007", "step-", "step-x", "old"):
        shutil.copytree(root / "step-5", root / name)
    save(store, 6)
    assert visible(root) == ["attempt", "latest", "old", "step-", "step-007", "step-5-backup", "step-6", "step-x"]
    assert find_checkpoint(root.parent).step == 6


def test_a_run_folder_may_be_called_like_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("step-by-step", "step-3"):
        save(CheckpointStore(tmp_path / name / "checkpoints", World(), keep=1), 8)
        assert find_checkpoint(tmp_path / name).step == 8
    monkeypatch.chdir(tmp_path / "step-by-step" / "checkpoints" / "step-8")
    assert find_checkpoint(Path()).folder.absolute() == Path.cwd()
    assert find_checkpoint(Path("../..")).step == 8


def test_leftovers_of_a_killed_save_are_removed(root: Path) -> None:
    store = CheckpointStore(root, World(), keep=2)
    save(store, 1)
    torn = root / ".tmp-0123"
    shutil.copytree(root / "step-1", torn)
    (torn / "manifest.json").unlink()
    assert find_checkpoint(root.parent).step == 1
    CheckpointStore(root, World(), keep=2)
    assert visible(root) == ["attempt", "latest", "step-1"]


def test_a_damaged_future_is_set_aside(root: Path) -> None:
    """A run that resumed before a damaged checkpoint comes to the same step again; nothing is deleted for it."""
    store = CheckpointStore(root, World(), keep=2)
    for step in (1, 2, 3):
        save(store, step)
    clear(root / "step-3" / "model.safetensors")
    newest, problems = store.newest()
    assert newest == Checkpoint(root / "step-2")
    assert len(problems) == 1
    assert visible(root) == ["aside-step-3", "attempt", "latest", "step-2"]
    save(store, 3)
    assert find_checkpoint(root.parent).step == 3
    assert visible(root) == ["aside-step-3", "attempt", "latest", "step-2", "step-3"]


def test_a_newer_attempt_fences_off_an_older_one(root: Path) -> None:
    older = CheckpointStore(root, World(), keep=1)
    save(older, 1)
    newer = CheckpointStore(root, World(), keep=1)
    save(newer, 2)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError) as caught:
        save(older, 3, best=True)
    assert str(caught.value) == f"{root}: a newer start of this run has taken over; this process must stop"
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    assert visible(root) == ["attempt", "latest", "step-2"]
    save(newer, 3)
    assert find_checkpoint(root.parent).step == 3


def test_a_zombie_that_wakes_in_the_midst_of_a_save_publishes_nothing(root: Path, tmp_path: Path) -> None:
    """Real processes: the older one stops itself just before the rename, and is woken when the newer one has saved."""
    script = (
        "import os, pathlib, signal, sys\n"
        "import torch\n"
        "from oat_dist.checkpoint import CheckpointStore\n"
        "from oat_dist.distributed import World\n"
        "from oat_dist.errors import CheckpointError\n"
        "from oat_dist.fence import Fence\n"
        "store = CheckpointStore(pathlib.Path(sys.argv[1]), World(), keep=1)\n"
        "check = Fence.check\n"
        "calls = []\n"
        "def stops_itself(self):\n"
        "    check(self)\n"
        "    calls.append(1)\n"
        "    if len(calls) == 2:  # it has found that it may publish\n"
        "        os.kill(os.getpid(), signal.SIGSTOP)\n"
        "Fence.check = stops_itself\n"
        "try:\n"
        "    store.save(5, {'model.safetensors': {'weight': torch.zeros(9)}}, {}, True)\n"
        "except CheckpointError as error:\n"
        "    print(error)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(root)], stdout=subprocess.PIPE, text=True) as zombie:
        try:
            os.waitid(os.P_PID, zombie.pid, os.WSTOPPED)
            newer = CheckpointStore(root, World(), keep=1)
            save(newer, 5, best=True)
            before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
            zombie.send_signal(signal.SIGCONT)
            assert zombie.stdout is not None
            said = zombie.stdout.read()
        finally:
            zombie.kill()
    assert "could not be saved" in said and "older ones are kept" in said
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    assert find_checkpoint(root.parent).step == 5


def test_a_newer_start_of_a_run_takes_over(tmp_path: Path) -> None:
    """The folder is held: without job.take_over that is refused, with it the holder may write nothing more."""
    run, held = tmp_path / "run", RunFolder(tmp_path / "run", World())
    with held.locked():
        held.log(step=1)
        newer = RunFolder(run, World())
        with pytest.raises(FolderBusyError, match=rf"{socket.gethostname()}, process {os.getpid()}.*take_over=true"):
            newer.locked().__enter__()
        held.log(step=2)
        with newer.locked(JobConfig(take_over=True, check_seconds=0.01)):
            assert "fenced off" in newer.notes[0]
            newer.log(step=3)
            for write in (lambda: held.log(step=4), lambda: held.write_json("evaluation.json", {})):
                with pytest.raises(CheckpointError, match="a newer start of this run has taken over"):
                    write()
            newer.log(step=5)
    lines = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 5]
    assert not (run / "evaluation.json").exists()


# A full disk.

_FULL = """
import pathlib, resource, sys
import torch
from oat_dist.checkpoint import CheckpointStore, find_checkpoint
from oat_dist.distributed import World
from oat_dist.errors import CheckpointError

root, limit, numbers = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
store = CheckpointStore(root, World(), keep=1)
def save(step):
    shared = {"model.safetensors": {"weight": torch.full((numbers,), float(step))}, "state.json": "{}" * 4000}
    store.save(step, shared, {"rng": torch.ones(3)}, False)
save(1)
before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
    save(2)
except CheckpointError as error:
    print(error)
assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before
assert sorted(p.name for p in root.iterdir()) == ["attempt", "latest", "step-1"]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
save(3)
checkpoint = find_checkpoint(root.parent)
assert checkpoint.step == 3
assert bool((checkpoint.tensors("model.safetensors")["weight"] == 3).all())
"""


@pytest.mark.parametrize(
    ("limit", "numbers"), [(200_000, 300_000), (5_000, 10), (500, 10)], ids=["weights", "text", "manifest"]
)
def test_a_full_disk_loses_nothing(root: Path, limit: int, numbers: int) -> None:
    """For real: the kernel refuses to let files grow beyond the limit, in the middle of the save."""
    arguments = [sys.executable, "-c", _FULL, str(root), str(limit), str(numbers)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{root}: the checkpoint could not be saved: ")
    assert "File too large" in done.stdout
    assert done.stdout.endswith("; older ones are kept\n")


# Optimizer and random numbers.


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_optimizer_state_gives_the_same_next_steps(root: Path, name: str) -> None:
    model = net()
    optimizer = build_optimizer(model, name, 0.05, weight_decay=0.1)
    assert optimizer_tensors(optimizer, model) == {}
    take_steps(model, optimizer, range(3))
    state = optimizer_tensors(optimizer, model)
    kinds = {"sgd": ["momentum_buffer"], "adamw": ["step", "exp_avg", "exp_avg_sq"]}[name]
    assert set(state) == {f"{kind}/{key}" for kind in kinds for key in ("0.weight", "0.bias", "2.weight")}
    store = CheckpointStore(root, World(), keep=1)
    store.save(3, {"model.safetensors": model.state_dict(), "optimizer.safetensors": state}, {}, False)

    checkpoint = find_checkpoint(root.parent)
    resumed, fresh = net(seed=1), net(seed=1)
    optimizers = [build_optimizer(each, name, 0.05, weight_decay=0.1) for each in (resumed, fresh)]
    take_steps(resumed, optimizers[0], range(50, 52))  # state that must go
    for each in (resumed, fresh):
        each.load_state_dict(checkpoint.tensors("model.safetensors"))
    load_optimizer(optimizers[0], resumed, checkpoint.tensors("optimizer.safetensors"))
    for each, chosen in ((model, optimizer), (resumed, optimizers[0]), (fresh, optimizers[1])):
        take_steps(each, chosen, range(3, 6))
    for expected, got, without in zip(model.parameters(), resumed.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(got, expected)
        assert not torch.equal(without, expected)  # the state matters


def test_optimizer_state_of_another_network() -> None:
    model = net()
    optimizer = build_optimizer(model, "sgd", 0.1)
    message = "the checkpoint has optimizer state for '7.weight', which the network lacks"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_optimizer(optimizer, model, {"momentum_buffer/7.weight": torch.zeros(1)})


def test_random_numbers_go_on_where_they_were() -> None:
    device = torch.device("cpu")
    with torch.random.fork_rng(devices=[]):
        state = random_state(device)
        first = torch.randn(5)
        assert not torch.equal(torch.randn(5), first)
        set_random_state(state, device)
        assert torch.equal(torch.randn(5), first)
