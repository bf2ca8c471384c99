"""`emu cache`: fills the caches that the data of a training configuration ask for.

    emu cache --config FIT_CONFIG [overrides of `emu fit`] --num_processes 2

Training fills them too. This is for doing it once, on other machines, or with more processes.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context
from typing import Any

import torch
from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from lightning.pytorch.cli import LightningArgumentParser

from emu_lightning.data.datamodule import ImageData
from emu_lightning.data.latents import LatentCache
from emu_lightning.data.text_cache import TextCache
from emu_lightning.verbs.train import EmuCLI

Caches = dict[str, LatentCache | TextCache]


class CacheCLI(EmuCLI):
    """Reads what `emu fit` reads; makes the data, the model where its text is cached, and no Trainer."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--num_processes",
            type=PositiveInt,
            default=1,
            help="Processes that share the work of `emu cache`; with several GPUs, one for each.",
        )

    def instantiate_classes(self) -> None:
        self.datamodule = self._only("data")
        if not isinstance(self.datamodule, ImageData) or not (
            self.datamodule.latents_from or self.datamodule.cache_text
        ):
            raise ValueError(
                "nothing is to be cached: set --data.latents_from, --data.cache_text true, or both"
            )
        self.model = self._only("model") if self.datamodule.cache_text else None

    def _only(self, key: str) -> Any:
        whole = self.config[self.subcommand]
        return self._parser(self.subcommand).instantiate(Namespace({key: whole[key]}))[key]

    def after_instantiate_classes(self) -> None:
        """Does nothing: there is no run to go on with."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Does nothing: `build` is called when it is clear in which process."""

    @property
    def num_processes(self) -> int:
        return int(self._get(self.config, "num_processes"))

    def build(self, rank: int) -> Caches:
        """Does this process's share of the work, and waits for the rest."""
        torch.set_num_threads(max(1, torch.get_num_threads() // self.num_processes))
        device = torch.device("cpu")
        if torch.cuda.is_available() and self._get(self.config, "trainer").accelerator != "cpu":
            device = torch.device("cuda", rank % torch.cuda.device_count())
        return self.datamodule.build_caches(["train", "val"], self.model, device, show_progress=rank == 0)


def main(argv: list[str]) -> None:
    cli = CacheCLI(["fit", *argv])
    with ProcessPoolExecutor(cli.num_processes, get_context("spawn")) as pool:  # none is started until needed
        helpers = [pool.submit(_help, argv, rank) for rank in range(1, cli.num_processes)]
        caches = cli.build(rank=0)
        with suppress(BrokenProcessPool):  # killed, perhaps for want of memory: its share was done here
            for helper in helpers:
                helper.result()
    for what, cache in caches.items():
        cache.load()  # a damaged file is named here, not when training starts
        print(f"{what}: complete, {cache.num_bytes / 1e6:.1f} MB in {cache.folder}")


def _help(argv: list[str], rank: int) -> None:
    CacheCLI(["fit", *argv]).build(rank)
