"""The views of the page in W&B, made by code: a workspace to work in, and a report to show."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from emu_lightning.dashboard.ablations import ABLATIONS
from emu_lightning.dashboard.stopping import LOSSES, MEASURES
from emu_lightning.dashboard.wandb_project import STEP, connect, one_line_errors

TITLE = "Emu: ablations"
MAX_RUNS = 100  # a sweep has more than the ten that W&B shows by itself
COLUMNS, WIDTH, HEIGHT = 3, 8, 6  # of a report's grid, which is 24 wide


@dataclass(frozen=True)
class View:
    """Curves against the step; with ``setting``, means of the runs that have the same.

    ``setting`` is a key of W&B's config: below ``cli`` is the resolved one, beside it what a sweep sets.
    """

    title: str
    metrics: tuple[str, ...]
    setting: str | None = None


HELD_OUT = tuple(f"held_out/{name}" for name in MEASURES)
ABLATION_VIEWS = (
    *(View(each.title, tuple(metric.name for metric in each.metrics), each.wandb_key) for each in ABLATIONS),
    View("Where should tuning stop?", (*HELD_OUT, *LOSSES)),
)
CURVE_VIEWS = (
    View("Loss", tuple(LOSSES)),
    View("Throughput", ("speed/images_per_second_per_device", "speed/mfu")),
)
MEDIA = ("held_out/pictures", "samples")
# What a run is described by beside its results: config keys, then last values.
COORDINATES = (
    "cli.seed_everything",
    *dict.fromkeys(each.wandb_key for each in ABLATIONS),
    "cli.data.init_args.subset_seed",
)
RESULTS = ("val/psnr", "val/rfd_random", *HELD_OUT)


def build_workspace(entity: str, project: str) -> Any:
    """A `wandb_workspaces.workspaces.Workspace` of a W&B project, not yet saved.

    Raises:
        ValueError: the library is missing.
    """
    workspaces = _library().workspaces
    sections = [workspaces.Section(name=title, panels=panels, is_open=True) for title, panels in _sections()]
    settings = workspaces.WorkspaceSettings(x_axis=STEP, max_runs=MAX_RUNS)
    return workspaces.Workspace(
        entity=entity, project=project, name=TITLE, sections=sections, settings=settings
    )


def build_report(entity: str, project: str) -> Any:
    """A `wandb_workspaces.reports.v2.Report` of a W&B project, not yet saved.

    Raises:
        ValueError: the library is missing.
    """
    reports = _library().reports.v2
    blocks = []
    for title, panels in _sections():
        for i, panel in enumerate(panels):
            x, y = i % COLUMNS * WIDTH, i // COLUMNS * HEIGHT
            panel.layout = reports.Layout(x=x, y=y, w=WIDTH, h=HEIGHT)
        runs = reports.Runset(entity=entity, project=project, name="all runs")
        blocks += [reports.H2(title), reports.PanelGrid(runsets=[runs], panels=panels)]
    return reports.Report(project=project, entity=entity, title=TITLE, blocks=blocks, width="fluid")


def save_views(path: str) -> list[str]:
    """Saves a new workspace and a new report in ENTITY/PROJECT of W&B, and returns their addresses.

    Raises:
        ValueError: the library is missing, or there is no key, no answer, or no such project.
    """
    entity, _, project = path.partition("/")
    if not (entity and project) or "/" in project:
        raise ValueError(f"{path!r} names no W&B project: write ENTITY/PROJECT")
    report, workspace = build_report(entity, project), build_workspace(entity, project)
    connect()
    with one_line_errors(f"W&B does not save views of {path}"):
        # The report asks for the project, so that nothing is saved where there is none.
        return [view.save().url for view in (report, workspace)]


def _library() -> Any:
    try:
        import wandb_workspaces
        import wandb_workspaces.reports.v2
        import wandb_workspaces.workspaces
    except ImportError as error:
        raise ValueError(
            "W&B's workspaces and reports need one more library: pip install 'emu_lightning[dashboard]'"
        ) from error
    return wandb_workspaces


def _sections() -> Iterator[tuple[str, list[Any]]]:
    """Titles and panels, in the order of the page."""
    reports = _library().reports.v2
    for view in ABLATION_VIEWS:
        yield view.title, _plots(view)
    browser = reports.MediaBrowser(title="Pictures", media_keys=list(MEDIA), num_columns=4)
    tables = [reports.WeavePanelSummaryTable(table_name=name) for name in MEDIA]
    yield "Pictures", [browser, *tables]
    axes = [*map(reports.Config, COORDINATES), *map(reports.SummaryMetric, RESULTS)]
    columns = [reports.ParallelCoordinatesPlotColumn(metric=axis) for axis in axes]
    yield "Runs", [reports.ParallelCoordinatesPlot(columns=columns), reports.RunComparer(diff_only=True)]
    for view in CURVE_VIEWS:
        yield view.title, _plots(view)


def _plots(view: View) -> list[Any]:
    """A line plot of each metric, and beside it a bar for each value of the setting."""
    reports = _library().reports.v2
    grouped: dict[str, Any] = {}
    if view.setting is not None:
        grouped = {
            "groupby": reports.Config(view.setting),
            "groupby_aggfunc": "mean",
            "groupby_rangefunc": "minmax",
        }
    panels = []
    for metric in view.metrics:
        panels.append(
            reports.LinePlot(title=metric, x=STEP, y=[metric], max_runs_to_show=MAX_RUNS, **grouped)
        )
        if grouped:
            panels.append(
                reports.BarPlot(title=f"{metric} at the end", metrics=[metric], orientation="v", **grouped)
            )
    return panels
