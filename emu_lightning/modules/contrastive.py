"""Trains a CLIP: what says which picture and which caption belong together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from open_clip.loss import ClipLoss
from safetensors.torch import save
from torch import Tensor

from emu_lightning.data.batch import Batch
from emu_lightning.files import write_whole
from emu_lightning.modules.autoencoder import images_of
from emu_lightning.optimizers import AdamW
from emu_lightning.parallel import mean_where_logged

LARGEST_SCALE = 4.6052  # ln 100, as Radford et al. 2021 clip it


class ContrastiveModule(LightningModule):
    """open_clip's `CLIP` with its own loss (Radford et al. 2021), for pictures of a kind that none knows.

    Curation scores pictures by a CLIP. Public ones know photographs; for the synthetic world, microscopy or
    drawings one of your own is small and soon trained.

    The folder that training leaves is one that open_clip loads by `local-dir:FOLDER`.

    Args:
        config: open_clip's `model_cfg`: embed_dim, vision_cfg, text_cfg.
        optimizer, lr_scheduler: the schedule is stepped once an optimizer step.
    """

    def __init__(
        self,
        config: dict[str, Any],
        optimizer: OptimizerCallable = AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.clip = open_clip.CLIP(**config)
        self.tokenizer = open_clip.SimpleTokenizer(context_length=self.clip.context_length)
        self.contrast = ClipLoss()
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler

    def _step(self, batch: Batch, stage: str) -> Tensor:
        tokens = self.tokenizer(batch.texts).to(self.device)
        images, texts, scale = self.clip(images_of(batch), tokens)
        loss: Tensor = self.contrast(images, texts, scale)
        is_trained = stage == "train"
        matched = (images @ texts.T).argmax(1) == torch.arange(len(images), device=self.device)
        for name, value in {"loss": loss, "matched": matched.float().mean()}.items():
            logged = mean_where_logged(self.trainer, value) if is_trained else value
            self.log(
                f"{stage}/{name}", logged, prog_bar=True, batch_size=len(images), sync_dist=not is_trained
            )
        return loss

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._step(batch, "val")

    def on_train_batch_end(self, *args: Any) -> None:
        with torch.no_grad():
            self.clip.logit_scale.clamp_(max=LARGEST_SCALE)

    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer(self.clip.parameters())
        if self._lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._lr_scheduler(optimizer), "interval": "step"},
        }

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float16) -> Path:
        """Writes the folder for open_clip: its configuration and weights, in half precision by default."""
        folder = Path(folder)
        state = {name: value.to("cpu", dtype).contiguous() for name, value in self.clip.state_dict().items()}
        write_whole(folder / "open_clip_model.safetensors", save(state))
        preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}  # images are in [-1, 1]
        config = {"model_cfg": self.config, "preprocess_cfg": preprocess}
        write_whole(folder / "open_clip_config.json", json.dumps(config, indent=1) + "\n")
        return folder
