"""`emu cache`: what it makes for a training, and what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from emu_lightning import cli
from tests.letters import Letters
from tests.tiny import tiny_autoencoder

pytestmark = pytest.mark.smoke

NETWORK = {
    "in_channels": 4,
    "sample_size": 16,
    "block_channels": [8],
    "transformer_layers": [1],
    "head_dim": 8,
    "sequence_dim": 8,
    "pooled_dim": 8,
    "norm_groups": 4,
}
CONFIG = {
    "run_dir": "run",
    "model": {
        "class_path": "emu_lightning.modules.DiffusionModule",
        "init_args": {
            "denoiser": {"class_path": "emu_lightning.models.UNet", "init_args": NETWORK},
            "text_encoder": {"class_path": "tests.letters.Letters"},
            "autoencoder": {
                "class_path": "emu_lightning.models.load_autoencoder",
                "init_args": {"folder": "autoencoder"},
            },
            "process": {"class_path": "emu_lightning.processes.Diffusion"},
        },
    },
    "data": {
        "class_path": "emu_lightning.data.FolderData",
        "init_args": {
            "path": "photographs",
            "resolution": 32,
            "batch_size": 2,
            "num_workers": 0,
            "val_fraction": 0.34,
            "latents_from": "autoencoder",
            "cache_text": True,
            "cache_dir": "cache",
        },
    },
    "trainer": {
        "max_steps": 2,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [{"class_path": "emu_lightning.callbacks.SampleGrid", "init_args": {"prompts": ["a"]}}],
    },
}


@pytest.fixture
def workplace(in_tmp_path: Path) -> Path:
    tiny_autoencoder().save(in_tmp_path / "autoencoder")
    Path("photographs").mkdir()
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"photographs/{index}.jpg")
        Path(f"photographs/{index}.txt").write_text(f"a photograph, number {index}")
    Path("fit.yaml").write_text(yaml.safe_dump(CONFIG))
    return in_tmp_path


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["cache", "--config", "fit.yaml", *argv])
    assert exit_.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_two_processes_fill_the_caches_and_training_finds_them(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["cache", "--config", "fit.yaml", "--num_processes", "2"])
    first = capsys.readouterr().out
    for what in ("latents of train", "latents of val", "embeddings of captions"):
        assert f"{what}: complete, 0.0 MB in cache/" in first
    assert not Path("run").exists()
    files = {path: path.stat().st_mtime_ns for path in Path("cache").rglob("*") if path.is_file()}
    assert len(files) == 3

    Letters.embedded.clear()
    cli.main(["cache", "--config", "fit.yaml"])
    again = capsys.readouterr()
    assert again.out == first and "encoding" not in again.err and not Letters.embedded

    cli.main(["fit", "--config", "fit.yaml"])
    assert Path("run/finished.json").is_file()
    assert {path: path.stat().st_mtime_ns for path in Path("cache").rglob("*") if path.is_file()} == files
    assert set(Letters.embedded) <= {"a", ""}  # for the grid of samples


def test_what_cannot_be_cached_is_said(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nothing = ["--data.latents_from", "null", "--data.cache_text", "false"]
    assert "nothing is to be cached: set --data.latents_from" in refusal(capsys, *nothing)
    trained = "emu_lightning.models.SmallTextEncoder"
    message = refusal(capsys, "--model.text_encoder", trained, "--data.latents_from", "null")
    assert "data.cache_text needs a frozen text encoder" in message
    assert "nowhere is not an autoencoder" in refusal(capsys, "--data.latents_from", "nowhere")
    assert "'data.cache_txt' is not an option" in refusal(capsys, "--data.cache_txt", "true")


def test_a_damaged_cache_is_named(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["cache", "--config", "fit.yaml"])
    for file in Path("cache").rglob("*.safetensors"):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        assert f"{file} is damaged" in refusal(capsys)
        file.write_bytes(content)
