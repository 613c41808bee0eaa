"""The configuration: strict in its keys and values, literal in its strings, the same after a round trip."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from oat_dist.config import Config, describe_keys, load_config, to_yaml
from oat_dist.config_checks import check_floor
from oat_dist.errors import ConfigError

ROOT = Path(__file__).parent.parent
MINIMAL = "output_dir: runs/x\ndata:\n  path: packed/x\n"


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


def refusal(path: Path, *overrides: str) -> str:
    """The one line that a refused configuration gives."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def from_text(folder: Path, text: str) -> Config:
    path = folder / "config.yaml"
    path.write_text(text)
    return load_config(path)


def test_defaults_are_the_papers(minimal: Path) -> None:
    config = load_config(minimal)
    assert config == Config(output_dir="runs/x", data=dataclasses.replace(Config().data, path="packed/x"))
    assert (config.batch_size, config.epochs, config.pretrain_epochs) == (32, 100, 10)
    assert (config.optim.name, config.optim.lr, config.optim.momentum) == ("sgd", 0.001, 0.9)
    assert (config.anchor.center, config.anchor.grad, config.anchor.floor) == ("probabilities", None, None)


# Keys.


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batchsize=3", "unknown key 'batchsize'; did you mean batch_size?"),
        ("optim.learning=3", "unknown key 'optim.learning'; did you mean optim."),
        ("optim.momentun=3", "unknown key 'optim.momentun'; did you mean optim.momentum?"),
        ("center=logits", "unknown key 'center'; did you mean anchor.center?"),
        ("lr=3", "unknown key 'lr'; did you mean optim.lr?"),
        ("zzzzqqqq=3", "unknown key 'zzzzqqqq'; see --help for every key"),
        ("a..b=1", "unknown key 'a'"),
        ("optim.lr.x=1", "optim.lr is a single value, not a list or a section"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest_name(minimal: Path, override: str, message: str) -> None:
    text = refusal(minimal, override)
    assert message in text
    assert text.startswith(f"override {override!r}: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3\n", "unknown key 'epoch'; did you mean epochs?"),
        ("optim:\n  momentun: 3\n", "unknown key 'optim.momentun'; did you mean optim.momentum?"),
        ("1: 2\n", "unknown key '1'"),
        ("~: 2\n", "unknown key 'None'"),
    ],
)
def test_unknown_key_in_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "typo.yaml"
    path.write_text(MINIMAL + text)
    refused = refusal(path)
    assert message in refused
    assert refused.startswith(f"{path}: ")


def test_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("optim:\n  lr: 1\nseed: 1\noptim:\n  momentum: 0.5\n")
    assert "key 'optim' is given twice" in refusal(path)
    path.write_text("optim:\n  lr: 1\n  lr: 2\n")
    assert "key 'lr' is given twice" in refusal(path)
    assert "line 3" in refusal(path)


def test_sections_and_single_values_are_not_exchanged(tmp_path: Path, minimal: Path) -> None:
    for override in ("model=resnet18", "model=null", "model=[1]", "data="):
        assert "is a section with keys of its own, not a single value" in refusal(minimal, override)
    for override in ("epochs={a: 1}", "epochs=[1]", "output_dir=[a]", "output_dir=a: b"):
        assert "is a single value, not a list or a section" in refusal(minimal, override)
    path = tmp_path / "scalar.yaml"
    path.write_text("optim: 3\n")
    assert "optim is a section" in refusal(path)


def test_overrides_win_in_order(minimal: Path) -> None:
    minimal.write_text(MINIMAL + "optim:\n  lr: 0.5\n  momentum: 0.8\n")
    assert load_config(minimal).optim.lr == 0.5
    config = load_config(minimal, ["optim.lr=0.1", "optim.lr=0.2", "data.path=elsewhere"])
    assert (config.optim.lr, config.optim.momentum, config.data.path) == (0.2, 0.8, "elsewhere")
    for bad in ("optim.lr", "=3", ""):
        assert "an override has the form key=value" in refusal(minimal, bad)


# Files.


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no.yaml") == f"{tmp_path / 'no.yaml'}: no such config file"
    assert "cannot be read" in refusal(tmp_path)
    path = tmp_path / "bad.yaml"
    for text in ("a: [1", "a: b: c", "\tx: 1", "!!python/object:os.system {}", "? [a]\n: 1\n"):
        path.write_text(text)
        assert "not valid YAML" in refusal(path)
    path.write_bytes(b"\xff\xfe\x00a")
    assert "cannot be read" in refusal(path)
    for text in ("", "- a\n", "text"):
        path.write_text(text)
        assert "a config is a mapping of keys to values" in refusal(path)


# Values.


@pytest.mark.parametrize("text", ["1e-3", "0.001", "1E-3", "1.0e-3", "+1e-3", ".001"])
def test_every_way_to_write_a_float(tmp_path: Path, minimal: Path, text: str) -> None:
    assert load_config(minimal, [f"optim.lr={text}"]).optim.lr == 0.001
    assert from_text(tmp_path, MINIMAL + f"optim:\n  lr: {text}\n").optim.lr == 0.001


@pytest.mark.parametrize(
    "text", ["no", "on", "1e5", "12", "012", "2026-11-02", "1:30", "true", "${oc.env:HOME}", "a\\${b}c${d", "${", "e=f"]
)
def test_strings_stay_what_they_say(tmp_path: Path, minimal: Path, text: str) -> None:
    assert load_config(minimal, [f"output_dir={text}"]).output_dir == text
    assert from_text(tmp_path, f"output_dir: {text}\ndata: {{path: x}}\n").output_dir == text


def test_the_place_holder_of_omegaconf_is_refused(minimal: Path) -> None:
    assert "output_dir=??? is a place-holder" in refusal(minimal, "output_dir=???")


def test_precision_no_is_not_false(minimal: Path) -> None:
    assert load_config(minimal, ["engine.precision=no"]).engine.precision == "no"
    minimal.write_text(MINIMAL + "engine:\n  precision: no\n")
    assert load_config(minimal).engine.precision == "no"


def test_lists_and_booleans(tmp_path: Path, minimal: Path) -> None:
    config = load_config(minimal, ["data.mean=[0, 1e-1, 0.25]", "dry_run=true", "resume=no", "data.drop_last=1"])
    assert config.data.mean == [0.0, 0.1, 0.25]
    assert (config.dry_run, config.resume, config.data.drop_last) == (True, False, True)
    assert from_text(tmp_path, MINIMAL + "  std:\n  - 1\n  - 2\n  - 3\n").data.std == [1.0, 2.0, 3.0]


def test_null_where_there_is_an_absence(minimal: Path) -> None:
    for text in ("null", "~", ""):
        config = load_config(minimal, [f"max_steps={text}", f"data.eval_split={text}", f"anchor.grad={text}"])
        assert (config.max_steps, config.data.eval_split, config.anchor.grad) == (None, None, None)
    for key in ("epochs", "optim.lr", "optim.name", "data.mean", "dry_run"):
        assert key in refusal(minimal, f"{key}=null")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs=2.5", "epochs: Value '2.5' could not be converted to Integer"),
        ("epochs=ten", "epochs: Value 'ten' could not be converted to Integer"),
        ("epochs=true", "epochs: Value 'true' could not be converted to Integer"),
        ("optim.lr=fast", "optim.lr: Value 'fast' could not be converted to Float"),
        ("dry_run=maybe", "dry_run: Value 'maybe' is not a valid bool"),
        ("data.mean=0.5", "data.mean is a list, such as [0.5, 0.5, 0.5]"),
        ("data.mean=[a, b, c]", "data.mean[0]: Value 'a' could not be converted to Float"),
        ("epochs=null", "epochs: Incompatible value null"),
    ],
)
def test_wrong_types(minimal: Path, override: str, message: str) -> None:
    assert refusal(minimal, override).startswith(f"override {override!r}: {message}")


IMPOSSIBLE = [
    ("output_dir=''", "output_dir is required; set it in the config file or give output_dir=..."),
    ("data.path=''", "data.path is required"),
    ("batch_size=0", "batch_size must be at least 1, not 0"),
    ("micro_batch_size=0", "micro_batch_size must be at least 1, not 0"),
    ("epochs=0", "epochs must be at least 1"),
    ("pretrain_epochs=-1", "pretrain_epochs must be at least 0"),
    ("pretrain_epochs=101", "use epochs=101 for cross-entropy alone, or more for OAT"),
    ("max_steps=0", "max_steps must be at least 1"),
    ("seed=-1", "seed must be at least 0"),
    ("seed=9223372036854775808", "seed must be below 2^63"),
    ("eval.seed=-1", "eval.seed must be at least 0"),
    ("data.image_size=0", "data.image_size must be at least 1"),
    ("data.workers=0", "data.workers must be at least 1"),
    ("data.prefetch=-1", "data.prefetch must be at least 0"),
    ("data.max_bad=-1", "data.max_bad must be at least 0"),
    ("data.augment=flop", "data.augment must be none, or any of flip, pad_crop, randaugment, trivialaugment, not"),
    ("data.augment=flop", "did you mean flip?"),
    ("data.augment=none flip", "none stands alone"),
    ("data.path=http://me:secret@host/set", "data.path=http://host/set is given with a user name or password, which"),
    ("data.mode=steam", "data.mode must be one of shards, stream, not 'steam'; did you mean stream?"),
    ("data.mode=stream", "data.mode=stream needs data.stream.urls, and data.stream.samples"),
    ("data.stream.urls=a.tar", "data.stream.urls is for data.mode=stream; data.mode=shards reads data.path"),
    ("data.crop=squish", "data.crop must be one of squash, random_resized_crop, center_crop, not 'squish'"),
    ("data.eval_crop=random_resized_crop", "data.eval_crop must be one of squash, center_crop, not"),
    ("data.crop_scale=[0.5, 0.1]", "data.crop_scale is two numbers above 0, at most 1, the smaller first"),
    ("data.crop_ratio=[0, 1]", "data.crop_ratio is two numbers above 0, the smaller first, not [0.0, 1.0]"),
    ("data.crop_fraction=0", "data.crop_fraction must be above 0 and at most 1, not 0.0"),
    ("data.mix=mixip", "data.mix must be one of none, mixup, cutmix, not 'mixip'; did you mean mixup?"),
    ("data.mix_alpha=5", "data.mix_alpha must be from 0.001 to 4, not 5.0"),
    ("data.decoded_cache=rom", "data.decoded_cache must be one of none, ram, disk, not 'rom'; did you mean ram?"),
    ("data.cache_gb=0", "data.cache_gb must be a positive number, not 0.0; null: no limit"),
    ("data.shuffle_shards=0", "data.shuffle_shards must be at least 1"),
    ("data.stream.shuffle=0", "data.stream.shuffle must be at least 1"),
    ("data.on_bad=ignore", "data.on_bad must be one of stop, skip, not 'ignore'"),
    ("data.mean=[1, 2]", "three numbers each"),
    ("data.std=[1, 1, 0]", "std above 0"),
    ("data.std=[1, 1, inf]", "three numbers each"),
    ("data.mean=[1, 1, nan]", "three numbers each"),
    ("optim.name=sdg", "optim.name must be one of sgd, adamw, not 'sdg'; did you mean sgd?"),
    ("optim.schedule=linear", "optim.schedule must be one of constant, cosine, step"),
    ("optim.lr=0", "optim.lr must be a positive number, not 0.0"),
    ("optim.lr=nan", "optim.lr must be a positive number, not nan"),
    ("optim.lr=inf", "optim.lr must be a positive number, not inf"),
    ("optim.momentum=1", "optim.momentum must lie in 0 <= optim.momentum < 1"),
    ("optim.beta1=-0.1", "optim.beta1 must lie in"),
    ("optim.beta2=nan", "optim.beta2 must lie in"),
    ("optim.weight_decay=-1", "optim.weight_decay must be at least 0"),
    ("optim.weight_decay=nan", "optim.weight_decay must be"),
    ("optim.warmup_epochs=-1", "optim.warmup_epochs must be at least 0"),
    ("optim.warmup_epochs=inf", "optim.warmup_epochs must be below 2^63"),
    ("optim.step_epochs=0", "optim.step_epochs must be a positive number"),
    ("optim.step_gamma=-1", "optim.step_gamma must be a positive number"),
    ("optim.final_lr=-1", "optim.final_lr must be at least 0"),
    ("optim.clip_norm=0", "null switches clipping off"),
    ("optim.clip_norm=inf", "null switches clipping off"),
    ("optim.ema=1", "optim.ema must lie in 0 < optim.ema < 1, not 1.0; null: no average"),
    ("optim.ema=0", "optim.ema must lie in 0 < optim.ema < 1"),
    (
        "anchor.center=logit",
        "one of probabilities, logits, prior, uniform, one_hot, not 'logit'; did you mean logits?",
    ),
    ("anchor.scope=world", "anchor.scope must be one of"),
    ("anchor.momentum=0.9", "use anchor.scope=global"),
    ("anchor.momentum=1", "0 <= anchor.momentum < 1"),
    ("loss.class_weights=balance", "did you mean balanced?"),
    ("loss.label_smoothing=1", "below 1, not 1.0"),
    ("loss.logit_adjustment=nan", "must be a number"),
    ("anchor.span=window", "anchor.span must be one of micro, step, not 'window'"),
    ("anchor.group_size=0", "anchor.group_size must be at least 1"),
    ("anchor.floor=-0.1", "anchor.floor must be at least 0"),
    ("anchor.floor=nan", "anchor.floor must be at least 0"),
    ("engine.name=zero4", "engine.name must be one of ddp, zero1, zero2, zero3, not 'zero4'; did you mean zero3?"),
    ("engine.precision=fp16", "must be no or bf16, not 'fp16'; use bf16, which needs no loss scaling"),
    ("engine.precision=half", "must be no or bf16, not 'half'"),
    ("engine.processes=0", "engine.processes must be at least 1"),
    ("engine.threads=0", "engine.threads must be at least 1"),
    ("engine.timeout_minutes=0", "engine.timeout_minutes must be a positive number"),
    ("checkpoint.every_epochs=-1", "checkpoint.every_epochs must be at least 0"),
    ("checkpoint.every_steps=-1", "checkpoint.every_steps must be at least 0"),
    ("checkpoint.every_minutes=-1", "checkpoint.every_minutes must be at least 0"),
    ("checkpoint.keep=0", "checkpoint.keep must be at least 1"),
    ("eval.every_epochs=-1", "eval.every_epochs must be at least 0"),
    ("eval.batch_size=0", "eval.batch_size must be at least 1"),
    ("eval.group_size=0", "eval.group_size must be at least 1"),
    (
        "eval.protocol=bach",
        "eval.protocol must be one of batch, single, dataset, stored, not 'bach'; did you mean batch?",
    ),
    ("eval.protocol=balanced", "eval.protocol=balanced needs anchor.center=prior"),
    ("log.every_steps=0", "log.every_steps must be at least 1"),
]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.mix=mixup", "pretrain_epochs=0"), "pretrain_epochs=0 leaves no cross-entropy epoch to use it in"),
        (("data.mix=cutmix", "anchor.span=step"), "keeps pairs of samples in one micro-batch, which anchor.span=step"),
        (("data.eval_split=null",), "without data.eval_split needs data.stream.classes, the number of classes"),
        (
            ("data.mix=mixup", "pretrain_epochs=1"),
            "data.mix=mixup needs data.mode=shards: a stream has no fixed samples",
        ),
        (("data.decoded_cache=ram",), "data.decoded_cache=ram needs data.mode=shards"),
        (("data.shuffle_shards=2",), "data.shuffle_shards needs data.mode=shards; a stream has data.stream.shuffle"),
    ],
)
def test_data_keys_that_do_not_go_together(minimal: Path, overrides: tuple[str, ...], message: str) -> None:
    if "span" not in message and "pretrain_epochs=0" not in message:
        overrides += ("data.mode=stream", "data.stream.urls=a.tar", "data.stream.samples=9")
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize(("override", "message"), IMPOSSIBLE)
def test_impossible_values_are_refused_with_the_remedy(minimal: Path, override: str, message: str) -> None:
    assert message in refusal(minimal, override)


def test_limits_themselves_are_allowed(minimal: Path) -> None:
    """The other side of the refusals above: they are not refusing everything."""
    allowed = [
        "pretrain_epochs=100",
        "optim.momentum=0",
        "anchor.floor=0",
        "data.max_bad=0",
        "seed=9223372036854775807",
    ]
    assert load_config(minimal, allowed).pretrain_epochs == 100


def test_floor_depends_on_the_number_of_classes(minimal: Path) -> None:
    config = load_config(minimal, ["anchor.floor=0.1"])
    check_floor(config, 9)
    with pytest.raises(ConfigError, match=re.escape("anchor.floor=0.1 with 10 classes: ")):
        check_floor(config, 10)


# What comes out.


def test_frozen() -> None:
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.epochs = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.optim.lr = 3.0


@given(
    output_dir=st.text(min_size=1).filter(lambda text: text != "???" and "\r" not in text),
    lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    seed=st.integers(0, 2**63 - 1),
    eval_split=st.none() | st.text(min_size=1).filter(lambda text: text != "???" and "\r" not in text),
    grad=st.none() | st.booleans(),
    mean=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=3, max_size=3),
)
@example(output_dir="a\x85b", lr=1.0, seed=0, eval_split="\x85", grad=None, mean=[0.0, 0.0, 0.0])
@settings(max_examples=25, deadline=None)
def test_round_trip(
    output_dir: str, lr: float, seed: int, eval_split: str | None, grad: bool | None, mean: list[float]
) -> None:
    default = Config()
    config = dataclasses.replace(
        default,
        output_dir=output_dir,
        seed=seed,
        data=dataclasses.replace(default.data, path="${a}", eval_split=eval_split, mean=mean),
        optim=dataclasses.replace(default.optim, lr=lr),
        anchor=dataclasses.replace(default.anchor, grad=grad),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(to_yaml(config), encoding="utf-8")
        assert load_config(path) == config
    assert yaml.safe_load(to_yaml(config)) == dataclasses.asdict(config)  # for any other YAML reader too


def all_keys(section: object, prefix: str = "") -> list[tuple[str, object]]:
    keys: list[tuple[str, object]] = []
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        name = f"{prefix}{item.name}"
        keys += all_keys(value, f"{name}.") if dataclasses.is_dataclass(value) else [(name, value)]
    return keys


def test_help_lists_every_key_once_with_its_default() -> None:
    expected = {
        name: yaml.safe_dump([value], default_flow_style=True).strip()[1:-1]
        if not isinstance(value, list)
        else str(value)
        for name, value in all_keys(Config())
    }
    listed = []
    for line in describe_keys().splitlines():
        match = re.fullmatch(r"  ([a-z0-9_.]+)=(\[.*?\]|\S+) +(\S.*)", line)
        assert match, line
        assert match[2] == expected[match[1]], line
        listed.append(match[1])
    assert listed == list(expected)


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in sorted((ROOT / "configs").rglob("*.yaml"))
        if not {"accelerate", "paper", "studies"} & {*path.parts}
    ],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_config_in_the_repository_loads_as_it_is(path: Path) -> None:
    config = load_config(path)
    assert config.output_dir.startswith("runs/")
    assert config.data.path.startswith("packed/")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_every_config_opens_with_a_comment(path: Path) -> None:
    assert re.match(r"# \S", path.read_text())
