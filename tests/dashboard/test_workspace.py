"""The views that are built for W&B: what they show exists, and they are saved where they are asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
import yaml
from lightning.pytorch.loggers import Logger

from emu_lightning import cli
from emu_lightning.callbacks import HeldOutEvaluation, SampleGrid, Throughput
from emu_lightning.dashboard.ablations import ABLATIONS, CHANNELS, SET_SIZE
from emu_lightning.dashboard.workspace import build_report, build_workspace, save_views
from emu_lightning.models import RandomFeatures
from emu_lightning.modules import QualityTuningModule
from emu_lightning.modules.autoencoder import ReconstructionMetrics
from tests.dashboard.test_wandb_project import online  # noqa: F401  # a fixture
from tests.sweeps.service import Service
from tests.sweeps.test_agent import wandb_service  # noqa: F401  # a fixture
from tests.sweeps.test_held_out import PROMPTS, MeanColour, Redness
from tests.tiny import TinyData, make_batch, make_trainer, tiny_generator

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def sections() -> dict[str, list[dict[str, Any]]]:
    """Titles and panels of the workspace, as W&B is given them."""
    return sections_of(build_workspace("us", "tests")._to_model().spec.model_dump_json(by_alias=True))


def sections_of(spec: str) -> dict[str, list[dict[str, Any]]]:
    bank = json.loads(spec)["section"]["panelBankConfig"]
    return {section["name"]: section["panels"] for section in bank["sections"]}


def of_kind(panels: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [panel["config"] for panel in panels if panel["viewType"] == kind]


def plots(panels: list[dict[str, Any]], kind: str = "Run History Line Plot") -> dict[str, str | None]:
    """Metric -> what runs are grouped by."""
    return {metric: plot["groupBy"] for plot in of_kind(panels, kind) for metric in plot["metrics"]}


def resolved(capsys: pytest.CaptureFixture[str], *configs: str) -> dict[str, Any]:
    """As RunConfig gives it to W&B."""
    with pytest.raises(SystemExit):
        cli.main(["fit", *(f"--config={ROOT / config}" for config in configs), "--print_config"])
    config: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return config


def reached(config: dict[str, Any], accessor: str) -> bool:
    """Whether W&B finds a key: of ``{"cli": {"value": config}}``."""
    node: Any = {"cli": {"value": config}}
    for part in accessor.removeprefix("config:").split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True


def test_sections_are_those_of_the_page(sections: dict[str, list[dict[str, Any]]]) -> None:
    titles = [each.title for each in ABLATIONS]
    assert list(sections) == [
        *titles, "Where should tuning stop?", "Pictures", "Runs", "Loss", "Throughput",
    ]  # fmt: skip
    channels, set_size = (sections[each.title] for each in (CHANNELS, SET_SIZE))
    for kind in ("Run History Line Plot", "Bar Chart"):
        by_channels = {"val/psnr", "val/ssim", "val/rfd_random", "val/perceptual_random"}
        assert by_channels <= plots(channels, kind).keys()
        assert set(plots(channels, kind).values()) == {"config.value"}
        by_size = {"held_out/appeal_win_minus_lose", "held_out/faithfulness_win_minus_lose"}
        assert by_size <= plots(set_size, kind).keys()
        assert set(plots(set_size, kind).values()) == {"cli.value.data.init_args.subset_size"}
    assert plots(sections["Where should tuning stop?"]) == dict.fromkeys(
        [
            "held_out/appeal_win_minus_lose",
            "held_out/faithfulness_win_minus_lose",
            "held_out/diversity",
            "train/loss",
            "val/loss",
        ]
    )
    assert set(plots(sections["Loss"])) == {"train/loss", "val/loss"}
    assert set(plots(sections["Throughput"])) == {"speed/images_per_second_per_device", "speed/mfu"}
    browser, *tables = sections["Pictures"]
    assert browser["viewType"] == "Media Browser"
    assert browser["config"]["mediaKeys"] == ["held_out/pictures", "samples"]
    assert all(
        key in json.dumps(table) for key, table in zip(("held_out/pictures", "samples"), tables, strict=True)
    )
    assert [panel["viewType"] for panel in sections["Runs"]] == ["Parallel Coordinates Plot", "Run Comparer"]


def test_curves_stand_over_optimizer_steps(sections: dict[str, list[dict[str, Any]]]) -> None:
    """W&B's own step counts rows, of which an optimizer step has several."""
    lines = [plot for panels in sections.values() for plot in of_kind(panels, "Run History Line Plot")]
    assert lines and {plot["xAxis"] for plot in lines} == {"trainer/global_step"}


class Names(Logger):
    """What a training gives its loggers: names of metrics and of pictures."""

    name, version = "names", ""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: set[str] = set()
        self.pictures: set[str] = set()

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.metrics |= metrics.keys()

    def log_pictures(self, name: str, *_: Any) -> None:
        self.pictures.add(name)


def test_all_that_is_shown_is_logged(sections: dict[str, list[dict[str, Any]]], in_tmp_path: Path) -> None:
    """By a tuning with all callbacks, and by the metrics of an autoencoder."""
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    base = tiny_generator(seed=1).save_pretrained("base")
    module = QualityTuningModule(str(base), optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    names = Names()
    held_out = HeldOutEvaluation(
        "prompts.txt", Redness(), embedder=MeanColour(), num_varied=1, num_variations=2
    )
    callbacks = [held_out, SampleGrid(["a"], every_n_train_steps=1), Throughput()]
    trainer = make_trainer(
        Path("run"),
        max_steps=3,
        callbacks=callbacks,
        logger=names,
        log_every_n_steps=1,
        limit_val_batches=1,
        val_check_interval=1,
        check_val_every_n_epoch=None,
    )
    trainer.fit(module, TinyData())
    overlay = yaml.safe_load((ROOT / "sweeps/overlays/emu_channels.yaml").read_text())
    at_full_size = overlay["model"]["init_args"]["metric_features"]["init_args"]["model_name"]
    for network in (RandomFeatures.name, at_full_size):
        features = RandomFeatures(channels=(4, 8))
        features.name = network
        metrics = ReconstructionMetrics(features)
        images = make_batch(0, size=metrics.num_features + 1, side=16).images
        metrics.update(images, images * 0.9)
        names.metrics |= {f"val/{name}" for name in metrics.compute()}

    shown = {
        metric
        for panels in sections.values()
        for kind in ("Run History Line Plot", "Bar Chart")
        for metric in plots(panels, kind)
    }
    columns = [column["accessor"] for column in sections["Runs"][0]["config"]["columns"]]
    shown |= {name.removeprefix("summary:") for name in columns if name.startswith("summary:")}
    assert len(shown) > 10 and shown - names.metrics == set()
    assert set(sections["Pictures"][0]["config"]["mediaKeys"]) == names.pictures


@pytest.mark.smoke
def test_settings_are_where_a_run_has_them(
    sections: dict[str, list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    tuning = resolved(capsys, "configs/quality_tuning/miniature.yaml")
    accessors = [column["accessor"] for column in sections["Runs"][0]["config"]["columns"]]
    of_config = [accessor for accessor in accessors if accessor.startswith("config:cli.")]
    assert len(of_config) >= 3
    assert [accessor for accessor in of_config if not reached(tuning, accessor)] == []
    groups = {group for panels in sections.values() for group in plots(panels).values() if group}
    assert [group for group in groups if group.startswith("cli.") and not reached(tuning, group)] == []
    # What is beside `cli` is what the sweep of the ablation sets.
    sweep = yaml.safe_load((ROOT / "sweeps/miniature_channels.yaml").read_text())["parameters"]
    assert {group.removesuffix(".value") for group in groups if not group.startswith("cli.")} <= sweep.keys()


@pytest.mark.smoke
def test_a_report_has_the_sections_of_the_workspace(
    sections: dict[str, list[dict[str, Any]]],
    online: Service,  # noqa: F811
) -> None:
    online.runs["one"] = {"project": "tests"}
    blocks = json.loads(build_report("us", "tests")._to_model().spec.model_dump_json(by_alias=True))["blocks"]
    titles = [block["children"][0]["text"] for block in blocks if block["type"] == "heading"]
    grids = [block["metadata"] for block in blocks if block["type"] == "panel-grid"]
    assert titles == list(sections)
    for grid, panels in zip(grids, sections.values(), strict=True):
        drawn = grid["panelBankSectionConfig"]["panels"]
        assert [each["config"] for each in drawn] == [panel["config"] for panel in panels]
        assert [runs["project"]["name"] for runs in grid["runSets"]] == ["tests"]
        cells = [{(x, y) for x in columns(each) for y in rows(each)} for each in drawn]
        assert sum(map(len, cells)) == len(set().union(*cells))  # none lies over another
        assert max(x for x, _ in set().union(*cells)) < 24  # the width of a report


def columns(panel: dict[str, Any]) -> range:
    return range(panel["layout"]["x"], panel["layout"]["x"] + panel["layout"]["w"])


def rows(panel: dict[str, Any]) -> range:
    return range(panel["layout"]["y"], panel["layout"]["y"] + panel["layout"]["h"])


@pytest.mark.smoke
def test_both_are_saved_and_their_addresses_returned(online: Service) -> None:  # noqa: F811
    online.runs["one"] = {"project": "tests"}
    urls = save_views("us/tests")
    report, workspace = online.views
    assert {view["type"]: view["projectName"] for view in online.views} == {
        "runs": "tests", "project-view": "tests",
    }  # fmt: skip
    assert report["entityName"] == workspace["entityName"] == "us"
    assert list(sections_of(workspace["spec"])) == [
        block["children"][0]["text"]
        for block in json.loads(report["spec"])["blocks"]
        if block["type"] == "heading"
    ]
    name = workspace["name"].removeprefix("nw-").removesuffix("-v")
    assert urls == [
        f"{online.url}/us/tests/reports/Emu:-ablations--view1",
        f"{online.url}/us/tests?nw={name}",
    ]


@pytest.mark.smoke
def test_nothing_is_saved_where_there_is_no_such_project(online: Service) -> None:  # noqa: F811
    with pytest.raises(ValueError, match="project 'us/missing' not found"):
        save_views("us/missing")
    for path in ("us", "us/", "us/tests/sweep"):
        with pytest.raises(ValueError, match="ENTITY/PROJECT"):
            save_views(path)
    assert not online.views


@pytest.mark.smoke
def test_without_a_key_views_are_not_saved(wandb_service: Service) -> None:  # noqa: F811
    wandb.teardown()
    with pytest.raises(ValueError, match="no key for W&B: run `wandb login`"):
        save_views("us/tests")


def test_without_the_library_its_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(ValueError, match=r"pip install 'emu_lightning\[dashboard\]'"):
        build_workspace("us", "tests")
