"""What a run shows while it trains and after: the live view, trackers, the profiler, warnings kept, the last words."""

from __future__ import annotations

import io
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.tracking import GeneralTracker, get_available_trackers
from live_checks import COLUMNS, STOP, lines
from ranks import run_ranks
from rich.console import Console
from safetensors import safe_open
from test_training import final_files, records
from training_checks import BASE

from oat_dist.config import load_config
from oat_dist.console import Display
from oat_dist.data.index import ShardSet
from oat_dist.distributed import World
from oat_dist.doctor.practice import practice_config
from oat_dist.engine.trackers import TRACKERS, check_installed, parse_trackers
from oat_dist.errors import ConfigError
from oat_dist.metrics import memory_in_use
from oat_dist.pace import Pace, clock_text, evaluations_left, in_words
from oat_dist.profiling import StepProfiler, parse_steps
from oat_dist.trackers import Trackers

STEPS = 20


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, digits: dict[str, ShardSet]) -> tuple[Path, list[dict[str, Any]]]:
    """Runs on two ranks, and what each rank found."""
    root = tmp_path_factory.mktemp("watched")
    return root, run_ranks(2, "live_checks:runs", str(root), str(digits["train"].folder.parent))


# What is watched is not changed.


def test_trackers_and_profiler_change_no_bit(watched: tuple[Path, list[dict[str, Any]]]) -> None:
    root, _ = watched
    bare = final_files(root / "bare")
    assert bare.keys() >= {"model.safetensors", "optimizer.safetensors", "anchor.safetensors"} and len(bare) == 5
    assert final_files(root / "watched") == bare
    assert final_files(root / "resumed") == bare
    assert records(root / "watched") == records(root / "bare")


# The log.


def test_the_log_has_time_memory_and_the_anchor_of_each_epoch(watched: tuple[Path, list[dict[str, Any]]]) -> None:
    root, _ = watched
    log = lines(root / "bare")
    training = [line for line in log if "loss" in line]
    assert len(training) == STEPS // 2
    for line in training:
        assert line["seconds"] > 0 and 0.05 < line["memory_gb"] < 50
        assert line["samples_per_s"] == pytest.approx(2 * 144 / line["seconds"], rel=0.15)
    (anchor,) = [line for line in log if "anchor" in line]  # one epoch of cross-entropy, one of OAT
    assert (anchor["step"], anchor["epoch"], anchor["phase"]) == (STEPS, 2, "oat")
    assert set(anchor) == {"step", "epoch", "phase", "anchor"}
    assert sum(anchor["anchor"]) == pytest.approx(1) and len(anchor["anchor"]) == 10
    with safe_open(root / "bare" / "checkpoints" / f"step-{STEPS}" / "anchor.safetensors", "numpy") as file:
        assert file.get_tensor("anchor").tolist() == anchor["anchor"]  # what protocol "stored" uses
    assert [line for line in lines(root / "resumed") if "anchor" in line] == [anchor]  # interrupted inside the epoch


def test_notes_are_kept_once_a_start(watched: tuple[Path, list[dict[str, Any]]]) -> None:
    root, _ = watched
    kept = [line for line in lines(root / "resumed") if line.get("event") == "warning"]
    scope = [line for line in kept if "anchor.scope=device" in line["text"]]
    assert [line["step"] for line in scope] == [0, STOP] and all(line["time"] > 0 for line in scope)
    late = [line for line in kept if "taken before this start" in line["text"]]
    assert [(line["step"], "steps 9 to 12" in line["text"]) for line in late] == [(STOP, True)]
    assert len(kept) == 3


# Trackers.


def test_tensorboard_has_the_curves_of_metrics_jsonl(watched: tuple[Path, list[dict[str, Any]]]) -> None:
    root, found = watched
    log = lines(root / "watched")
    curves = found[0]["scalars"]["watched"]
    for name in ("loss", "lr", "samples_per_s", "data_wait", "memory_gb", "anchor_min", "anchor_entropy"):
        expected = [(line["step"], line[name]) for line in log if "loss" in line and name in line]
        assert expected and [step for step, _ in curves[f"train/{name}"]] == [step for step, _ in expected]
        assert [value for _, value in curves[f"train/{name}"]] == pytest.approx([v for _, v in expected], rel=1e-6)
    accuracies = {
        line["protocol"]: line["accuracy"] for line in log if line.get("step") == STEPS and "protocol" in line
    }
    assert accuracies.keys() == {"batch", "single", "dataset", "stored"}
    for name, accuracy in accuracies.items():
        for curve in (curves[f"accuracy/{name}"], curves[f"final/accuracy/{name}"]):
            assert curve == [[STEPS, pytest.approx(accuracy, rel=1e-6)]]
    assert [step for step, _ in curves["accuracy/argmax"]] == [10]
    (file,) = (root / "watched" / "trackers" / "watched").glob("*/hparams.yml")
    settings = set(file.read_text().splitlines())
    assert {"optim.lr: 0.01", "anchor.scope: device", "micro_batch_size: 'null'", "world_size: 2"} <= settings


def test_only_rank_0_writes_and_a_resumed_run_goes_on_in_the_same_curves(
    watched: tuple[Path, list[dict[str, Any]]],
) -> None:
    root, found = watched
    for name, starts in (("watched", 1), ("resumed", 2)):
        assert len(list((root / name / "trackers" / "watched").glob("events.*"))) == starts
        assert len(list((root / name / "trackers" / "watched").glob("*/hparams.yml"))) == 1
    whole, resumed = found[0]["scalars"]["watched"], found[0]["scalars"]["resumed"]
    assert resumed.keys() == whole.keys()
    assert resumed["accuracy/stored"][-1] == whole["accuracy/stored"][-1]
    steps = [step for step, _ in resumed["train/loss"]]
    assert steps == sorted({*(step for step, _ in whole["train/loss"]), STOP})  # each once; the stop has a line more


def test_a_tracker_that_cannot_start_stops_every_rank_before_the_first_step(
    watched: tuple[Path, list[dict[str, Any]]],
) -> None:
    root, found = watched
    for rank in found:
        assert rank["blocked"].startswith("log.trackers=tensorboard cannot be started (")
        assert rank["blocked"].endswith("mend that, or take it out of log.trackers")
    assert list((root / "blocked" / "checkpoints").glob("step-*")) == []
    assert [line for line in lines(root / "blocked") if "loss" in line] == []


class _Fails(GeneralTracker):
    """One whose server has gone."""

    name = "gone"
    requires_logging_directory = False
    tracker = None
    calls = 0

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.calls += 1
        raise ConnectionError("the server\nhung up")

    def finish(self) -> None:
        raise AssertionError("it is told nothing more")


class _Keeps(GeneralTracker):
    """One that works."""

    name = "kept"
    requires_logging_directory = False
    tracker = None

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.seen.append((step, values))


def test_a_tracker_that_fails_is_dropped_with_one_warning() -> None:
    said: list[str] = []
    gone, kept = _Fails(), _Keeps()
    trackers = Trackers((), _Engine(), said.append)
    trackers._running = [gone, kept]
    for step in (1, 2):
        trackers.record({"step": step, "epoch": 0, "phase": "oat", "loss": 0.5, "lr": 0.1, "fingerprint": "00"})
    trackers.record({"step": 2, "epoch": 1, "phase": "oat", "anchor": [0.5, 0.5]})
    trackers.record({"event": "phase", "step": 2})
    trackers.close()
    assert gone.calls == 1
    assert kept.seen == [(step, {"train/loss": 0.5, "train/lr": 0.1}) for step in (1, 2)]
    (warning,) = said
    assert warning.startswith("warning: tracker gone failed in log (the server hung up) and is told nothing more;")


class _Engine:
    world = World()


def test_names_of_trackers() -> None:
    assert parse_trackers("none") == parse_trackers("") == ()
    assert parse_trackers("tensorboard wandb tensorboard") == ("tensorboard", "wandb")
    assert parse_trackers("all") == tuple(name for name in TRACKERS if name in set(map(str, get_available_trackers())))
    assert {"tensorboard", "wandb", "comet_ml", "mlflow", "aim"} <= set(TRACKERS)
    missing = sorted(set(TRACKERS) - set(map(str, get_available_trackers())))
    assert missing, "every tracker is installed here; the test is too weak"
    check_installed(("tensorboard",))
    with pytest.raises(ConfigError, match=f"not installed here: pip install {missing[0]}, or take it out"):
        check_installed(("tensorboard", missing[0]))
    with pytest.raises(ConfigError, match=r"log\.trackers=all, but none of them is installed"):
        check_installed(("all",))


# The profiler.


def test_the_trace_holds_the_chosen_steps_and_what_happens_in_them(watched: tuple[Path, list[dict[str, Any]]]) -> None:
    root, _ = watched
    names = {f"rank{rank}-steps-9-12.{kind}" for rank in range(2) for kind in ("json", "txt")}
    assert {path.name for path in (root / "watched" / "profile").iterdir()} == names
    for rank in range(2):
        trace = json.loads((root / "watched" / "profile" / f"rank{rank}-steps-9-12.json").read_text())["traceEvents"]
        ranges = [event for event in trace if event.get("ph") == "X"]
        steps = {event["name"]: event for event in ranges if event["name"].startswith("ProfilerStep#")}
        assert sorted(steps, key=lambda name: steps[name]["ts"]) == [f"ProfilerStep#{step}" for step in range(9, 13)]
        for name in ("data wait", "forward", "loss", "backward", "optimizer step"):
            inside = [event for event in ranges if event["name"] == name]
            assert len(inside) == 4
            for event, step in zip(sorted(inside, key=lambda e: e["ts"]), range(9, 13), strict=True):
                outer = steps[f"ProfilerStep#{step}"]
                assert outer["ts"] <= event["ts"] <= event["ts"] + event["dur"] <= outer["ts"] + outer["dur"]
        assert any("convolution" in event["name"] for event in ranges)
    table = (root / "watched" / "profile" / "rank0-steps-9-12.txt").read_text()
    assert "Self CPU" in table and "aten::" in table


def test_steps_that_the_run_does_not_have_are_refused(watched: tuple[Path, list[dict[str, Any]]]) -> None:
    root, found = watched
    assert {rank["beyond"] for rank in found} == {"log.profile_steps=19-21: this run has steps 1 to 20"}
    assert not (root / "beyond" / "metrics.jsonl").exists()


def test_the_steps_to_profile() -> None:
    assert parse_steps("10-15") == range(10, 16)
    assert parse_steps(" 7 ") == range(7, 8)
    for text in ("", "0", "5-4", "-3", "3-", "a", "1.5", "1-2-3"):
        with pytest.raises(ConfigError, match=r"log\.profile_steps must be the first and the last step"):
            parse_steps(text)
    with pytest.raises(ConfigError, match="are 101 steps; profile 100 at most"):
        parse_steps("1-101")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("log.trackers=tensorbord", "did you mean tensorboard?"),
        ("log.trackers=none wandb", "by spaces any of aim, .*not 'none wandb'"),
        ("log.project=../up", "log.project is a name of letters"),
        ("log.profile_all_ranks=true", "needs log.profile_steps"),
        ("log.profile_steps=9-", "such as 10-15, not '9-'"),
        ("log.tracker=wandb", "did you mean log.trackers?"),
    ],
)
def test_settings_that_cannot_work(tmp_path: Path, override: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text(BASE)
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        load_config(tmp_path / "config.yaml", [override])


def _profiled(profiler: StepProfiler, steps: range) -> None:
    for step in steps:
        profiler.begin(step)
        torch.ones(8, 8).mm(torch.ones(8, 8))
        profiler.end(step)
    profiler.close()


@pytest.mark.parametrize(
    ("taken", "name"),
    [(range(1, 9), "3-6"), (range(5, 9), "5-6"), (range(1, 5), "3-4"), (range(1, 3), ""), (range(7, 9), "")],
)
def test_what_is_taken_of_the_steps_is_traced(tmp_path: Path, taken: range, name: str) -> None:
    """The whole of them, a run that resumes or stops in their midst, and one that takes none of them."""
    said: list[str] = []
    _profiled(StepProfiler(range(3, 7), tmp_path, World(), said.append), taken)
    found = {path.name for path in tmp_path.iterdir()}
    assert found == ({f"rank0-steps-{name}.json", f"rank0-steps-{name}.txt"} if name else set())
    assert len(said) == bool(name)
    if name:
        trace = json.loads((tmp_path / f"rank0-steps-{name}.json").read_text())["traceEvents"]
        assert sum(event["name"] == "aten::mm" for event in trace) == len(set(taken) & set(range(3, 7)))


def test_a_trace_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "profile").write_text("in the way")
    _profiled(StepProfiler(range(1, 2), tmp_path / "profile", World(), said.append), range(1, 3))
    assert said == [
        f"warning: {tmp_path}/profile/rank0-steps-1-1.json: the profile cannot be written (File exists); "
        "the training goes on"
    ]


def test_the_doctor_practises_unwatched(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(BASE)
    config = load_config(tmp_path / "config.yaml", ["log.trackers=all", "log.profile_steps=50-60"])
    practice = practice_config(config, tmp_path, SimpleNamespace(train=None))
    assert (practice.log.trackers, practice.log.profile_steps) == ("none", None)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
def test_memory_is_the_most_since_the_last_line() -> None:
    device, size = torch.device("cuda"), 64 << 20
    memory_in_use(device)
    held = torch.cuda.memory_allocated(device)
    big = torch.empty(size, dtype=torch.uint8, device=device)
    del big
    assert memory_in_use(device) == held + size
    assert memory_in_use(device) == held


@needs_gpu
def test_a_trace_of_a_gpu_holds_its_kernels(tmp_path: Path) -> None:
    said: list[str] = []
    profiler = StepProfiler(range(2, 4), tmp_path, World(device=torch.device("cuda")), said.append)
    a = torch.ones(256, 256, device="cuda")
    for step in range(1, 5):
        profiler.begin(step)
        for _ in range(step):
            a @ a
        profiler.end(step)
    profiler.close()
    assert said == [f"profile of steps 2 to 3: {tmp_path}/rank0-steps-2-3.json"]
    trace = json.loads((tmp_path / "rank0-steps-2-3.json").read_text())["traceEvents"]
    kernels = [event for event in trace if event.get("cat") == "kernel"]
    assert len(kernels) == 2 + 3
    assert "Self CUDA" in (tmp_path / "rank0-steps-2-3.txt").read_text()


# The pace.


class _Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_rest_is_judged_by_this_start_alone() -> None:
    clock = _Clock()
    pace = Pace(1000, lambda step: evaluations_left(step, 1000, 100, 1), clock)
    clock.now += 50  # loading
    pace.begin(800)
    assert pace.seconds_left(800) is None
    clock.now += 10
    assert pace.seconds_left(805) == pytest.approx(195 * 2)  # five steps in ten seconds; the 800 before count nothing
    pace.trained(20, 20.0)
    assert pace.seconds_left(820) == pytest.approx(180)
    with pace.saving():
        clock.now += 10
    assert pace.seconds_left(820) == pytest.approx(180 * (1 + 10 / 20))
    with pace.evaluating():
        clock.now += 30
        assert pace.seconds_left(900) == pytest.approx(100 * 1.1)  # none has been measured yet
    assert pace.seconds_left(900) == pytest.approx(100 * 1.1 + 30)  # one more, at the end
    with pace.evaluating():
        clock.now += 12
        assert pace.seconds_left(1000) == pytest.approx(18)
    assert pace.seconds_left(1000) == 0
    assert pace.elapsed() == pytest.approx(62)
    for _ in range(10):
        pace.trained(10, 30.0)  # steps have become slower: OAT has begun
    assert pace.seconds_left(990) == pytest.approx(10 * (3 + 10 / 190) + 21)


@pytest.mark.parametrize("every", [0, 1, 2, 3, 7])
def test_evaluations_that_are_left(every: int) -> None:
    for per_epoch, total in itertools.product((1, 3, 10), (1, 9, 10, 29, 30)):
        due = {step for step in range(1, total + 1) if every and step % (every * per_epoch) == 0} | {total}
        for step in range(total + 2):
            assert evaluations_left(step, total, per_epoch, every) == sum(other > step for other in due)


def test_durations() -> None:
    times = {0: "0 s", 0.6: "1 s", 60: "1 min", 125: "2 min 5 s", 3600: "1 h", 12_010: "3 h 20 min", 187_200: "2 d 4 h"}
    assert {seconds: in_words(seconds) for seconds in times} == times
    clocks = {0: "0:00:00", 59.6: "0:01:00", 3725: "1:02:05", 90_061: "1d 01:01:01"}
    assert {seconds: clock_text(seconds) for seconds in clocks} == clocks


# The view.


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_the_view_has_two_lines_at_any_width(columns: int) -> None:
    display, pace = Display(World()), Pace(31_260, lambda step: 2, _Clock())
    pace.trained(50, 1.0)
    display.step(16_250)
    display.numbers("loss 5.814  1,677 samples/s  data wait 8%  0.61 GB")
    display.evaluated("batch", 0.5684, 0.574)
    display.evaluating(3_200, 10_000)
    screen = Console(file=io.StringIO(), width=columns, force_terminal=True, color_system=None, highlight=False)
    screen.print(display._view(pace, lambda step: "epoch 11/20 oat"))
    assert isinstance(screen.file, io.StringIO)
    rows = screen.file.getvalue().splitlines()
    assert len(rows) == 2 and max(map(len, rows)) <= columns
    assert rows[1].startswith("evaluating 3,200/10,000  loss 5.814")
    if columns == 40:
        assert rows[0].startswith("epoch") and rows[1].rstrip().endswith("…")
    else:
        assert rows[0].split()[:3] == ["epoch", "11/20", "oat"]
        assert rows[0].split()[-4:] == ["16,250/31,260", "0:00:00", "ETA", "0:05:00"]
        assert ("batch 56.84% (best 57.40%)" in rows[1]) == (columns == 120)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, digits: dict[str, ShardSet]) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("drawn")
    (found,) = run_ranks(1, "live_checks:on_a_terminal", str(root), str(digits["train"].folder.parent))
    return found | {"root": root}


def test_a_terminal_shows_the_training_as_it_goes(drawn: dict[str, Any]) -> None:
    assert "\x1b[?25l" not in drawn["drawn"]  # the cursor is never hidden: nobody might bring it back
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", drawn["drawn"])
    rows = [row for row in re.split(r"[\r\n]+", plain) if row]
    assert max(map(len, rows)) <= COLUMNS
    views = [row for row in rows if "ETA" in row]
    assert all(re.match(r"epoch [12]/2 (cross_entropy|oat) +.* +\d+/20 \d:\d\d:\d\d ETA +[-\d]:", row) for row in views)
    assert " 0/20 " in views[0] and views[0].endswith("ETA -:--:--")
    assert " 20/20 " in views[-1] and views[-1].endswith("ETA 0:00:00")
    numbers = r"loss \S+  \S+ samples/s  data wait \d+%  \d+\.\d\d GB  batch \d+\.\d\d% \(best \d+\.\d\d%\)"
    assert re.fullmatch(numbers, rows[-1].rstrip())
    assert "step 10: cross-entropy ends, OAT begins" in rows
    assert [
        row for row in rows if re.fullmatch(r"epoch 1/2 cross_entropy loss \S+  \S+ samples/s  data wait \d+%", row)
    ]


def test_the_last_words_say_what_was_trained_and_where_to_go(drawn: dict[str, Any]) -> None:
    run = drawn["root"] / "drawn"
    judged = json.loads((run / "evaluation.json").read_text())
    first, again = drawn["printed"]
    text = first.split("\n")
    assert text[:2] == ["", "trained   lightweight, 20 steps (2 epochs) on 1 process(es)"]
    assert re.fullmatch(r" {10}1 of cross-entropy, 1 of OAT; in \d+ s; engine ddp, fp32, on cpu", text[2])
    assert text[3] == "accuracy  on test, 359 samples, last step, with 95 % intervals:"
    for name, line in zip(("batch", "single", "dataset", "stored"), text[4:8], strict=True):
        one = judged["protocols"][name]
        low, high = one["interval"]
        assert line.startswith(f"            {name:<8} {one['accuracy']:.2%}  ({100 * low:.2f} to {100 * high:.2f})")
    best = judged["best"]
    assert text[8] == f"best      step {best['step']}: {best['accuracy']:.2%} (batch, selected on test)"
    assert text[9:11] == [
        f"weights   {run}/checkpoints/step-20/model.safetensors",
        f"report    {run}/report.html",
    ]
    assert text[11].startswith(f"next      oat-dist evaluate {run}")
    # A finished run started again has trained nothing; the rest is the same.
    assert "engine ddp" in again and "in 0 s" not in again and not re.search(r"OAT; in", again)
    assert again.split("\n")[3:] == text[3:]
