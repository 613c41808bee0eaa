"""The architecture, read from the syntax tree: who may import whom, who may talk to other processes, what is banned."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import oat_dist

ROOT = Path(__file__).parent.parent
SCRIPTS = ("launch", "shards")

# From the ground up. A module may import from its own layer and from those above it in this list, never from below.
# "x.*" is a whole package.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("oat_dist", "errors", "batch", "anchor", "measures", "pace"),
    (
        *("files", "strict_yaml", "distributed", "fence", "outcome", "stopping", "watchdog", "profiling"),
        *("optim", "optimizer_state", "ema", "randomness", "fp32", "models.*", "portable", "hub"),
    ),
    ("data.*", "report.*"),
    ("oat_loss", "metrics", "checkpoint", "engine.*", "console", "pulse"),
    ("objectives", "answers", "priors", "results", "training_state"),
    ("window_step",),
    ("evaluate", "evaluation_files"),
    ("config_keys", "config_checks", "config", "validation", "calibration", "predict", "inference.*"),
    ("export.*",),
    ("data_parts", "parts", "run_folder", "trackers"),
    ("run_validation", "run_log", "origin"),
    ("run_facts", "parallel_check.*"),
    ("trainer",),
    ("run_summary", "doctor.*"),
    ("train", "commands.*", "experiments.*"),
    ("cli",),
    ("launch.*", "shards.*"),
)

COLLECTIVES = frozenset(
    f"{kind}{variant}"
    for kind in (
        *("all_gather", "all_reduce", "all_to_all", "barrier", "broadcast", "gather", "monitored_barrier", "reduce"),
        *("reduce_scatter", "scatter", "send", "recv", "isend", "irecv", "batch_isend_irecv"),
    )
    for variant in ("", "_coalesced", "_into_tensor", "_object", "_object_list", "_single", "_tensor")
)


def modules(root: Path) -> dict[str, ast.Module]:
    """Syntax trees by dotted name: ``oat_dist.data.plan``, ``launch.train``."""
    trees = {}
    for folder in ("oat_dist", *SCRIPTS):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            trees[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return trees


def imports(name: str, tree: ast.Module, known: set[str]) -> Iterator[str]:
    """Modules that a module imports, wherever the statement stands; ``from package import module`` is the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in known else node.module


def layer(name: str) -> int | None:
    short = name.removeprefix("oat_dist.")
    for number, members in enumerate(LAYERS):
        for member in members:
            package = member.removesuffix(".*")
            if short == package or (member.endswith(".*") and short.startswith(f"{package}.")):
                return number
    return None


def layering_faults(root: Path) -> list[str]:
    """Upward imports, modules without a layer, and circles within a layer."""
    trees = modules(root)
    known, faults = set(trees), []
    edges: dict[str, set[str]] = {}
    for name, tree in trees.items():
        mine = layer(name)
        if mine is None:
            faults.append(f"{name} has no layer")
            continue
        edges[name] = set()
        # The front door names what lies behind it, for type checkers; it loads nothing.
        for other in () if name == "oat_dist" else imports(name, tree, known):
            if other.split(".")[0] not in ("oat_dist", *SCRIPTS):
                continue
            theirs = layer(other)
            if theirs is None or theirs > mine:
                faults.append(f"{name} imports {other}")
            elif other != name and not other.startswith(f"{name}."):
                edges[name].add(other)
    while edges:  # take away what imports nothing that is left
        free = [name for name, others in edges.items() if not others & edges.keys()]
        if not free:
            faults.append(f"a circle among {', '.join(sorted(edges))}")
            break
        for name in free:
            del edges[name]
    return faults


def distributed_names(tree: ast.Module) -> tuple[set[str], set[str]]:
    """Names a module has for torch.distributed itself, and for functions imported out of it."""
    packages, functions = {"torch.distributed", "torch.distributed.nn.functional"}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            packages |= {a.asname for a in node.names if a.asname and a.name.startswith("torch.distributed")}
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            packages |= {a.asname or a.name for a in node.names if a.name == "distributed"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("torch.distributed", "accelerate")):
            functions |= {a.asname or a.name for a in node.names if a.name in COLLECTIVES}
    return packages, functions


def collective_calls(tree: ast.Module) -> list[str]:
    """Collectives issued through torch.distributed, or through an Accelerator."""
    packages, functions = distributed_names(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in COLLECTIVES | {"gather_for_metrics", "wait_for_everyone"}:
            base = ast.unparse(node.value)
            if base in packages or base.split(".")[-1] == "accelerator":
                found.append(f"{base}.{node.attr}")
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in functions:
            found.append(node.id)
    return found


def banned(tree: ast.Module) -> list[str]:
    """What bad input could turn into running code."""
    found = []
    harmless = {  # torch.load(..., weights_only=True), spelt out
        node.func
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "torch.load"
        and any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
    }
    for node in ast.walk(tree):
        if node in harmless:
            continue
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in ("pickle", "marshal", "shelve", "dill")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("pickle", "marshal", "shelve"):
            found.append(f"from {node.module}")
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in (
            "torch.load",
            "torch.save",
            "yaml.load",
            "yaml.unsafe_load",
            "yaml.full_load",
            "np.load",
            "numpy.load",
            "os.system",
        ):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
                found.append(node.func.id)
            found += ["shell" for k in node.keywords if k.arg == "shell" and ast.unparse(k.value) != "False"]
    return found


def plant(root: Path, files: dict[str, str]) -> Path:
    """A small project with one more fault."""
    for folder in ("oat_dist", "launch", "shards"):
        (root / folder).mkdir(parents=True)
    for name, text in {
        "oat_dist/__init__.py": "",
        "oat_dist/errors.py": "",
        "oat_dist/trainer.py": "",
        **files,
    }.items():
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return root


# Imports.


def test_imports_point_downward() -> None:
    assert layering_faults(ROOT) == []


def test_every_module_has_exactly_one_layer() -> None:
    flat = [member for members in LAYERS for member in members]
    assert len(flat) == len(set(flat))
    existing = {name.removeprefix("oat_dist.") for name in modules(ROOT)}
    for member in flat:  # none that has gone
        assert any(name == member or name.startswith(member.removesuffix("*")) for name in existing), member


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({"oat_dist/errors.py": "from oat_dist.trainer import x"}, "oat_dist.errors imports oat_dist.trainer"),
        ({"oat_dist/errors.py": "import oat_dist.trainer"}, "oat_dist.errors imports oat_dist.trainer"),
        ({"oat_dist/errors.py": "from oat_dist import trainer"}, "oat_dist.errors imports oat_dist.trainer"),
        ({"oat_dist/errors.py": "def f():\n    import oat_dist.trainer"}, "oat_dist.errors imports oat_dist.trainer"),
        (
            {"oat_dist/data/__init__.py": "", "oat_dist/data/plan.py": "from oat_dist.trainer import x"},
            "oat_dist.data.plan imports oat_dist.trainer",
        ),
        ({"oat_dist/trainer.py": "from launch.train import x"}, "oat_dist.trainer imports launch.train"),
        ({"oat_dist/helpers.py": ""}, "oat_dist.helpers has no layer"),
        (
            {"oat_dist/batch.py": "import oat_dist.anchor", "oat_dist/anchor.py": "import oat_dist.batch"},
            "a circle among oat_dist.anchor, oat_dist.batch",
        ),
    ],
)
def test_the_check_of_imports_finds_a_fault(tmp_path: Path, files: dict[str, str], fault: str) -> None:
    assert layering_faults(plant(tmp_path / "good", {"oat_dist/cli.py": "from oat_dist.trainer import x"})) == []
    assert layering_faults(plant(tmp_path / "bad", files)) == [fault]


def test_only_the_engine_knows_accelerate() -> None:
    users = {
        name
        for name, tree in modules(ROOT).items()
        for other in imports(name, tree, set())
        if other.split(".")[0] in ("accelerate", "deepspeed")
    }
    assert users and all(name.startswith("oat_dist.engine.") for name in users)


def test_importing_the_package_does_not_wait_for_torch() -> None:
    script = "import sys, oat_dist, oat_dist.cli; print([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_public_name_resolves() -> None:
    for name in oat_dist.__all__:
        assert getattr(oat_dist, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'oat_dist' has no attribute 'OATLos'"):
        assert oat_dist.OATLos
    trees = modules(ROOT)
    for module, tree in trees.items():
        for node in tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__" and module != "oat_dist":
                assert set(ast.literal_eval(node.value)) <= defined(tree), module


def defined(tree: ast.Module) -> set[str]:
    names = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


# Collectives.


def test_only_distributed_issues_collectives() -> None:
    calls = {name: collective_calls(tree) for name, tree in modules(ROOT).items()}
    assert {name for name, found in calls.items() if found} == {"oat_dist.distributed"}
    assert set(calls["oat_dist.distributed"]) == {
        "dist.all_gather_object",
        "dist.all_reduce",
        "dist.broadcast",
        "dist.gather",
    }


@pytest.mark.parametrize(
    "text",
    [
        "import torch.distributed as d\nd.all_reduce(x)",
        "import torch\ntorch.distributed.barrier()",
        "from torch import distributed\nf = distributed.broadcast",
        "from torch.distributed import all_gather as g\ng(x, y)",
        "from accelerate.utils import gather\ngather(x)",
        "self.accelerator.gather(x)",
        "accelerator.wait_for_everyone()",
        "import torch.distributed.nn.functional as F\nF.all_reduce(x)",
    ],
)
def test_the_check_of_collectives_finds_one(text: str) -> None:
    assert len(collective_calls(ast.parse(text))) == 1
    assert collective_calls(ast.parse("world.all_reduce(x)\nworld.gather_objects(x)\nx.gather(1, y)")) == []


# What is banned, and sizes.


def test_nothing_banned() -> None:
    assert {name: found for name, tree in modules(ROOT).items() if (found := banned(tree))} == {}


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=trusted)",
        "torch.load(path, **{'weights_only': True})",
        "torch.load(torch.load, weights_only=True)",
        "f = torch.load",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "np.load(path)",
    ],
)
def test_the_check_of_what_is_banned_finds_it(text: str) -> None:
    assert len(banned(ast.parse(text))) == 1
    assert banned(ast.parse("model.eval()\nyaml.safe_load(text)\njson.load(file)\nrun(x, shell=False)")) == []
    assert banned(ast.parse("torch.load(path, map_location='cpu', weights_only=True)")) == []


def test_scripts_do_not_hide_other_modules() -> None:
    """A script's folder comes first on sys.path: shards/inspect.py would break dataclasses."""
    taken = set(sys.stdlib_module_names) | set(packages_distributions())
    assert {"inspect", "torch", "yaml"} <= taken
    scripts = {path.stem for folder in SCRIPTS for path in (ROOT / folder).iterdir() if path.suffix in ("", ".py")}
    assert {"train", "pack", "verify"} <= scripts
    assert scripts & taken == set()


def test_modules_stay_small() -> None:
    lines = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in (ROOT / "oat_dist").rglob("*.py")}
    assert lines[Path("oat_dist/trainer.py")] <= 310
    assert {path: count for path, count in lines.items() if count > 400} == {}
    for folder in SCRIPTS:
        for path in (ROOT / folder).glob("*.py"):
            assert len(path.read_text().splitlines()) <= 10, path
