"""`emu sweep`: a W&B sweep file on this machine, without a server."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from emu_lightning.resources import PACKAGE
from emu_lightning.sweeps.definition import read_sweep
from emu_lightning.sweeps.records import Run
from emu_lightning.sweeps.runner import LocalSweep
from emu_lightning.sweeps.tables import refuse_other_sweep, screen_table
from emu_lightning.verbs.arguments import call

TRAINING = ("fit", "validate", "test", "predict")  # the verbs that share a module
EXIT_FAILED = 1


def own_arguments(command: list[str]) -> list[str] | None:
    """What follows `emu` or this project's main.py in a command; None where neither is in it."""
    for index, part in enumerate(command):
        if Path(part).name == "emu" or Path(part).resolve() == PACKAGE.parent / "main.py":
            return command[index + 1 :]
    return None


def first_error(lines: list[list[str]], environment: dict[str, str]) -> str | None:
    """What the verbs' own parsers say of command lines; they do nothing else."""
    os.environ.update(environment)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        for verb, *arguments in lines:
            module = importlib.import_module(f"emu_lightning.verbs.{'train' if verb in TRAINING else verb}")
            try:
                module.main([*([verb] if verb in TRAINING else []), *arguments, "--print_config"])
            except SystemExit:
                continue  # it printed
            except (ValueError, OSError) as error:
                return str(error)
    return None


def refuse_wrong_options(local: LocalSweep) -> None:
    """Parses commands in which every value of a sweep occurs, in another process, for what it loads.

    Raises:
        ValueError: an option or a value is wrong; one line naming it.
    """
    lines = [own_arguments(local.sweep.command_line(example)) for example in local.sweep.examples()]
    own = [line for line in lines if line]
    if own:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            error = process.submit(first_error, own, local.environment(Run("checked", {}))).result()
        if error is not None:
            raise ValueError(f"{local.sweep.path}: {error}")


def sweep(file: str, out: str | None = None, workers: int = 1, count: int | None = None) -> None:
    """Runs what has not finished of a sweep; killed, the same command goes on.

    The programs run offline and leave W&B files that `wandb sync` uploads later. At the end there is a table,
    also in runs.csv and sweep.json. A run that fails stops no other, and is run again by the next call.

    Args:
        file: in the format of W&B sweeps.
        out: folder for logs and tables; runs/sweeps/NAME for a file NAME.yaml when left out.
        workers: runs at a time.
        count: runs in all; a search needs it, or run_cap in the file.
    """
    definition = read_sweep(file)
    folder = Path(out or f"runs/sweeps/{Path(file).stem}")
    local = LocalSweep(definition, folder, workers, count)
    if not refuse_other_sweep(definition, folder):  # it is new
        refuse_wrong_options(local)
    if "early_terminate" in definition.settings:
        print(
            "emu sweep: early_terminate is left to a server: here every run ends by itself", file=sys.stderr
        )
    runs = local.run()
    print(screen_table(definition, runs))
    failed = [run.name for run in runs if run.state != "finished"]
    print(f"{len(runs) - len(failed)} of {len(runs)} runs finished: {folder}/runs.csv, {folder}/sweep.json")
    if failed:
        print(
            f"emu sweep: see {folder}/logs; the same command tries {', '.join(failed)} again", file=sys.stderr
        )
        raise SystemExit(EXIT_FAILED)


def main(argv: list[str]) -> None:
    has_file = bool(argv) and not argv[0].startswith("-")
    call(sweep, ["--file", *argv] if has_file else argv, "emu sweep")
