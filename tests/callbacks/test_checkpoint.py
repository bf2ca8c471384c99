from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from emu_lightning.callbacks import checkpoint
from emu_lightning.callbacks.checkpoint import RunCheckpoint, last_checkpoint
from tests.tiny import TinyData, make_trainer, tiny_generator


def save(folder: Path, content: str, is_folder: bool, kept_step: int | None = None) -> Path:
    """As a strategy saves: a file, or a folder of shards. Returns `last.ckpt`."""
    last = last_checkpoint(folder)
    partial = last.with_suffix(".partial")
    (partial if is_folder else partial.parent).mkdir(parents=True, exist_ok=True)
    (partial / "shard" if is_folder else partial).write_text(content)
    checkpoint._publish(partial, last, kept_step)
    return last


def content_of(path: Path) -> str:
    return (path / "shard" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("is_folder", [False, True])
def test_the_last_and_the_kept_checkpoints_stay(is_folder: bool, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        last = save(tmp_path, f"{step}", is_folder, kept_step=2 if step == 2 else None)
    assert content_of(last) == "3" and content_of(last.with_name("step-2.ckpt")) == "2"
    links = [path for path in last.parent.iterdir() if path.is_symlink()]
    assert len(list(last.parent.iterdir())) == (4 if is_folder else 2)
    assert len(links) == (2 if is_folder else 0)
    # The same step again, as at the end of a run: the name stands for the newer one.
    save(tmp_path, "2, again", is_folder, kept_step=2)
    assert content_of(last) == content_of(last.with_name("step-2.ckpt")) == "2, again"


def test_a_run_may_change_between_one_file_and_shards(tmp_path: Path) -> None:
    for number, is_folder in enumerate([False, True, False]):
        last = save(tmp_path, str(number), is_folder)
        assert content_of(last) == str(number)
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(is_folder: bool, tmp_path: Path, monkeypatch) -> None:
    """Every operation on files is once the one that does not happen any more."""
    kills = 0
    while True:
        folder = tmp_path / str(kills)
        last = save(folder, "first", is_folder)
        left = [kills]

        def dying(function: Any, left: list[int] = left) -> Any:
            def maybe(*arguments: Any, **options: Any) -> Any:
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
                return function(*arguments, **options)

            return maybe

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying(os.replace))
            patch.setattr(shutil, "rmtree", dying(shutil.rmtree))
            patch.setattr(shutil, "copyfile", dying(shutil.copyfile))
            patch.setattr(Path, "rename", dying(Path.rename))
            patch.setattr(Path, "symlink_to", dying(Path.symlink_to))
            try:
                save(folder, "second", is_folder, kept_step=5)
            except Killed:
                kills += 1
            else:
                break
        assert content_of(last) in ("first", "second")
        partial = last.with_suffix(".partial")  # RunCheckpoint removes it before it saves again
        if partial.is_dir():
            shutil.rmtree(partial)
        assert content_of(save(folder, "third", is_folder)) == "third"
    assert kills >= 3


def test_gradients_half_accumulated_are_not_saved(tmp_path: Path) -> None:
    """SIGTERM in the middle of an optimizer step keeps the checkpoint of the step before."""
    saving = RunCheckpoint(every_n_train_steps=1)
    trainer = make_trainer(
        tmp_path, max_steps=3, accumulate_grad_batches=2, callbacks=[saving], enable_checkpointing=True
    )
    module = tiny_generator()
    batches = 0

    def end(*_: Any) -> None:
        nonlocal batches
        batches += 1
        trainer._signal_connector.received_sigterm = batches == 3

    module.on_train_batch_end = end  # type: ignore[method-assign]
    with pytest.raises(SIGTERMException):
        trainer.fit(module, TinyData())
    assert batches == 3
    saved = torch.load(last_checkpoint(tmp_path), weights_only=True)
    batches_done = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"]
    assert (saved["global_step"], batches_done) == (1, 2)


def test_the_last_validation_is_made_again_where_it_was_cut_short(tmp_path: Path) -> None:
    """Told to end in the middle of it, a run that is finished later has its final metrics."""

    def fit(is_cut_short: bool, ckpt_path: Path | None = None) -> list[int]:
        validated: list[int] = []

        def validation_step(*_: Any) -> None:
            if is_cut_short and trainer.global_step == 6:
                raise SIGTERMException
            validated.append(trainer.global_step)

        module = tiny_generator()
        module.validation_step = validation_step  # type: ignore[method-assign]
        trainer = make_trainer(
            tmp_path,
            max_steps=6,
            val_check_interval=3,
            check_val_every_n_epoch=None,
            limit_val_batches=1,
            callbacks=[RunCheckpoint(every_n_train_steps=2, keep_steps=[6])],
            enable_checkpointing=True,
        )
        trainer.fit(module, TinyData(), ckpt_path=ckpt_path, weights_only=True)
        assert trainer.global_step == 6
        return validated

    last = last_checkpoint(tmp_path)
    with pytest.raises(SIGTERMException):
        fit(is_cut_short=True)
    assert torch.load(last, weights_only=True)["global_step"] == 4
    assert fit(is_cut_short=False, ckpt_path=last) == [6]
    kept = last.with_name("step-6.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 6 and kept.is_file()
    assert fit(is_cut_short=False, ckpt_path=last) == []  # what is finished stays so
