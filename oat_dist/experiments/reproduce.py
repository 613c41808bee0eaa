"""From a table to its results: trains what is missing, judges what is trained, writes the table from what there is."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from oat_dist.data_parts import open_location
from oat_dist.errors import DataError, OatError
from oat_dist.experiments import output
from oat_dist.experiments.across import across, across_files, across_page
from oat_dist.experiments.content import content_of
from oat_dist.experiments.curves import Line, figure_files, lines_of, page_figure
from oat_dist.experiments.judge import Judge, read_result, write_diverged
from oat_dist.experiments.plan import Options, Plan, PlannedRun
from oat_dist.experiments.pool import Machine, Pool, training_command
from oat_dist.experiments.progress import Progress
from oat_dist.experiments.run_state import trained_state
from oat_dist.experiments.summary import collect, rows_of, shown, times_of
from oat_dist.files import folder_lock, lock_holder
from oat_dist.report import write_report
from oat_dist.report.html import Html, join, tag
from oat_dist.stopping import StopRequests

__all__ = ["Request", "describe", "reproduce", "unfinished"]


@dataclass(frozen=True)
class Request:
    """
    Attributes:
        cells, arms: those asked for; arms None: those that each cell compares.
        command: how it was asked for, as the table says it.
    """

    plan: Plan
    options: Options
    cells: Sequence[str]
    arms: Sequence[str] | None
    machine: Machine
    command: str

    def runs(self) -> list[PlannedRun]:
        return self.plan.chosen(self.cells, self.arms)


def unfinished(request: Request) -> list[PlannedRun]:
    """Runs without a result, and what they start from where that is not trained."""
    runs = request.runs()
    parents = {run.parent.folder for run in runs if run.parent is not None}
    lacking = [run for run in runs if run.folder not in parents and read_result(run, request.plan.table) is None]
    needed = {run.parent.folder for run in lacking if run.parent is not None and trained_state(run) is None}
    return [run for run in runs if run in lacking or (run.folder in needed and trained_state(run) is None)]


def describe(request: Request) -> str:
    """What would be done, for ``--dry-run``."""
    runs = request.runs()
    left = {run.folder for run in unfinished(request)}
    lines = [
        f"{request.plan.table.title}: {len(runs)} run(s), {len(left)} of them not done, into {request.plan.folder}"
    ]
    for run in runs:
        lines.append(f"{'missing' if run.folder in left else 'done   '}  {run.name}  {run.config.epochs} epochs")
        if run.folder in left:
            lines.append(f"    {shlex.join(training_command(run, request.machine.launch))}")
    return "\n".join(lines)


def reproduce(request: Request, requests: StopRequests) -> dict[str, str]:
    """Train, judge, write the table; why which run has failed, by name.

    Raises:
        OatError: data that is not there, a folder that another process works in, or that cannot be written to.
    """
    plan, folder = request.plan, request.plan.folder
    refusal = f"{folder}: another process is reproducing this table{lock_holder(folder)}; wait for it"
    _check_data(plan, unfinished(request))  # before a folder is made
    with folder_lock(folder, refusal):
        left = unfinished(request)
        progress = Progress(left)
        judge = Judge(plan.table, 1 if request.machine.one_thread else None)
        parents = {run.parent.folder for run in request.runs() if run.parent is not None}

        def judged(run: PlannedRun, jobs: int | None) -> None:
            if run.folder not in parents:
                judge.judge(run, jobs)

        def diverged(run: PlannedRun, why: str) -> None:
            write_diverged(run, plan.table, why)

        pool = Pool(request.machine, requests, progress, judged, diverged)
        try:
            with progress.shown():
                pool.train(left)
        finally:
            judge.close()
        _write(request)
    names = {run.folder: run.name for run in request.runs()}
    failed = {where: why for where, why in pool.problems.items() if why != "diverged"}
    return {names[where]: why for where, why in failed.items()}


def _check_data(plan: Plan, runs: Sequence[PlannedRun]) -> None:
    """Before hours of training: every split that is needed can be opened."""
    seen = set()
    for run in runs:
        data = run.config.data
        for split in dict.fromkeys((data.train_split, data.eval_split, plan.table.test)):
            if split is None or (data.path, split) in seen or data.mode != "shards":
                continue
            seen.add((data.path, split))
            try:
                open_location(data.path, split, data.cache_dir, data.cache_gb)
            except DataError as error:
                hint = f"pack it (the head of {run.config_path} says how), or say where it lies: --data PLACE"
                if split == plan.table.select:
                    hint += f"; {split}, which chooses the best epoch, is held out of training: --hold-out {split}=0.1"
                raise DataError(f"{error}. For {run.name}: {hint}") from error


def _write(request: Request) -> None:
    """The files of the table, from the results that there are."""
    plan = request.plan
    results = collect(plan)
    pairs = shown(plan, results, request.cells, request.arms)
    rows, times = rows_of(plan, results, pairs), times_of(plan, results, pairs)
    content = content_of(plan, request.options, results, rows, times, request.command)
    changed = output.write_changed(plan.folder / "table.json", output.json_text(plan, content, rows, times, results))
    compared, drawn, files = [], [], {}
    for one in across(plan, rows):
        compared.append((one.title, across_page(one), one.arms, _ACROSS))
        files[one.title] = _save(request, one.name, changed, partial(across_files, one))
    for cell in plan.table.cells:
        lines = lines_of(plan, cell, [arm for where, arm in pairs if where == cell])
        if not lines:
            continue
        split, name = plan.table.select or plan.table.test, f"accuracy-{cell}"
        title = plan.table.cells[cell].title
        drawn.append(
            (title, page_figure(lines, split, name), [(one.number, one.label) for one in lines], _caption(lines, split))
        )
        files[title] = _save(request, name, changed, partial(figure_files, lines, split, name))
    links = _galleries(request, changed)
    output.write_changed(plan.folder / "table.md", output.markdown_text(content, files))
    output.write_changed(plan.folder / "table.csv", output.csv_text(plan, rows))
    output.write_changed(
        plan.folder / "table.html", output.html_text(content, {"Differences": compared, "Curves": drawn}, links)
    )


_ACROSS = "Paired by seed, with 95 % intervals; shown where one does not hold zero."


def _save(request: Request, name: str, changed: bool, draw: Callable[[], dict[str, bytes]]) -> str:
    """Draw a figure into its files if they are not there or the table has changed; the name of its SVG."""
    paths = {kind: request.plan.folder / f"{name}.{kind}" for kind in ("svg", "png")}
    if changed or not all(path.exists() for path in paths.values()):
        for kind, data in draw().items():
            output.write_changed(paths[kind], data)
    return paths["svg"].name


def _caption(lines: Sequence[Line], split: str) -> str:
    window, seeds = max(line.window for line in lines), max(len(line.seeds) for line in lines)
    smoothed = f"smoothed over {window} epochs; light: raw" if window > 1 else "as measured"
    several = f"Means of {seeds} seeds; band: lowest to highest seed." if seeds > 1 else "One seed."
    return f"Accuracy on {split}, {smoothed}. {several}"


def _galleries(request: Request, changed: bool) -> Html:
    """Of each cell asked for, the first seed's images that the arm has right and the baseline wrong, as a report."""
    plan, arm = request.plan, request.plan.table.gallery
    links = []
    for cell in request.cells if arm is not None else ():
        assert arm is not None
        runs = [plan.runs.get((cell, name, 0)) for name in (arm, plan.table.baseline)]
        if any(run is None or trained_state(run) is None for run in runs):
            continue
        run, base = (one for one in runs if one is not None)
        path, temporary = plan.folder / f"images-{cell}.html", plan.folder / f".images-{cell}.html"
        try:
            if changed or not path.exists():
                write_report(run.folder, against=base.folder, output=temporary)
                output.write_changed(path, temporary.read_bytes())
        except (OatError, OSError) as error:  # the table is whole all the same
            links.append(tag("li", f"{plan.table.cells[cell].title}: not drawn ({error})"))
            continue
        finally:
            temporary.unlink(missing_ok=True)
        text = f"{plan.table.cells[cell].title}: right with {plan.table.arms[arm].title} alone, seed 0"
        links.append(tag("li", tag("a", text, href=path.name)))
    return tag("ul", join(links)) if links else Html("")
