"""Weights & Biases as a mirror of the run folder, which never stands in the way of training."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from numpy.typing import NDArray

from emu_lightning.files import write_whole

SECONDS_TO_BEGIN = 60  # waiting for the server, before a run goes offline
SECONDS_TO_END = 600  # waiting for what is not uploaded yet; it stays on disk


class WandbRun(WandbLogger):
    """One W&B run for a run folder, through all its starts and processes.

    Lightning's `WandbLogger` draws a new run id at every start, asks for a key on the terminal, ends training
    when the server cannot be reached, and goes on with the run of an earlier training of the same process.
    This one keeps the id and the files in ``<run>/wandb``. It is offline where there is no key, no server, or
    WANDB_MODE says so; `wandb sync <run>/wandb/offline-run-*` uploads all starts as one run. Under a sweep,
    W&B's agent or `emu sweep` name the run. One that is told to end is marked as preempted, so that the agent
    begins it again.

    Args:
        project: W&B's; a sweep, or WANDB_PROJECT, has its own.
        entity: user or team; the key's own when left out.
        name: shown for the run; W&B makes one up when left out.
        group: of runs that belong together.
        tags: words to find it by.
    """

    run_dir: str | Path  # set by `emu fit`

    def __init__(
        self,
        project: str = "emu_lightning",
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
    ) -> None:
        super().__init__(name=name, save_dir=None, group=group, tags=tags)  # type: ignore[arg-type]
        del self._wandb_init["anonymous"]  # W&B knows it no longer, and says so
        is_named = "WANDB_SWEEP_ID" in os.environ or "WANDB_PROJECT" in os.environ
        self._wandb_init |= {"project": None if is_named else project, "entity": entity}
        self.run_dir = "."
        self._sets_data_dir = False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """W&B's run, begun when it is first asked for."""
        if self._experiment is None:
            import wandb

            # Pictures of tables wait for their upload in the home folder, unless this is set.
            self._sets_data_dir = "WANDB_DATA_DIR" not in os.environ
            if self._sets_data_dir:
                os.environ["WANDB_DATA_DIR"] = str(Path(self.run_dir, "wandb").resolve())
            limits = wandb.Settings(init_timeout=SECONDS_TO_BEGIN, finish_timeout=SECONDS_TO_END)
            self._wandb_init |= {"dir": self.run_dir, "id": self._run_id(), "settings": limits}
            try:
                # Where there is no key, W&B would ask for one.
                is_free = "WANDB_MODE" in os.environ or wandb.login(prompt=False, verify=False)
                self._wandb_init["mode"] = None if is_free else "offline"
                return super().experiment
            except wandb.errors.Error as error:
                rank_zero_warn(
                    f"no W&B server ({' '.join(str(error).split())}): this run is logged offline, and "
                    f"`wandb sync {self.run_dir}/wandb/offline-run-*` uploads it"
                )
                wandb.teardown()  # else the id is in use
                self._wandb_init |= {"mode": "offline", "settings": None}
        return super().experiment

    def _run_id(self) -> str | None:
        """The folder's own; None where a sweep gives one."""
        path = Path(self.run_dir) / "wandb" / "run_id"
        path.parent.mkdir(parents=True, exist_ok=True)
        if "WANDB_RUN_ID" in os.environ:
            return None
        if not path.is_file():
            write_whole(path, uuid4().hex[:8])
        return path.read_text()

    @rank_zero_only
    def log_pictures(
        self,
        name: str,
        prompts: Sequence[str],
        seeds: Sequence[int],
        pictures: Mapping[str, NDArray[np.uint8]],
        step: int,
    ) -> None:
        """A table of a row a prompt: prompt, seed, and a column for each of ``pictures`` (N, H, W, 3)."""
        import wandb

        rows = [
            [prompt, seed, *(wandb.Image(column[i]) for column in pictures.values())]
            for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        table: Any = wandb.Table(columns=["prompt", "seed", *pictures], data=rows)
        self.log_metrics({name: table}, step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Ends W&B's run, so that another training of this process begins one of its own."""
        super().finalize(status)
        if self._experiment is None:
            return
        if isinstance(sys.exc_info()[1], (SIGTERMException, KeyboardInterrupt)):
            self._experiment.mark_preempting()
        self._experiment.finish(exit_code=0 if status == "success" else 1)
        self._experiment = None
        if self._sets_data_dir:
            del os.environ["WANDB_DATA_DIR"]
