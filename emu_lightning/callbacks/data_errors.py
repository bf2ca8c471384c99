"""Says at the end of a run which files could not be decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed
from lightning import Callback, LightningModule, Trainer

from emu_lightning.data.batch import Batch

NUM_SHOWN = 10


class BrokenFileReport(Callback):
    """Collects the names of skipped files; at the end prints one line and writes `broken_files.txt`.

    The file goes to the run folder, `trainer.default_root_dir`. Checkpoints keep the names, so that a resumed
    run reports on the whole run. Without a broken file nothing is printed or written.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.names.update(batch.broken)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.names.update(batch.broken)

    on_test_batch_end = on_validation_batch_end
    on_predict_batch_end = on_validation_batch_end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":  # inside fit the end of training reports
            self._report(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer)

    def state_dict(self) -> dict[str, list[str]]:
        return {"names": sorted(self.names)}

    def load_state_dict(self, state_dict: dict[str, list[str]]) -> None:
        self.names.update(state_dict["names"])

    def _report(self, trainer: Trainer) -> None:
        if trainer.world_size > 1:
            ranks: list[set[str]] = [set() for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(ranks, self.names)
            self.names = set().union(*ranks)
        if not self.names or not trainer.is_global_zero:
            return
        names = sorted(self.names)
        path = Path(trainer.default_root_dir) / "broken_files.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(names) + "\n", encoding="utf-8")
        shown = ", ".join(names[:NUM_SHOWN])
        if len(names) > NUM_SHOWN:
            shown += f" and {len(names) - NUM_SHOWN} more"
        files = "1 broken file was" if len(names) == 1 else f"{len(names)} broken files were"
        print(f"{files} skipped: {shown} (listed in {path})", flush=True)
