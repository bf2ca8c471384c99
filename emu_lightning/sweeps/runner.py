"""Runs a sweep on this machine: some programs at a time, through kills, none twice.

Each program is in the hands of a small shell that outlives this process. It writes down how the program
ended, and while it runs the log file is locked, because that is its standard output. So whoever starts a
sweep again after a kill knows of every run whether it ended, still runs, or has to go on.

A program is told what the `wandb agent` would tell it, in its environment: W&B files carry the sweep and the
run, and can be synced later.
"""

from __future__ import annotations

import csv
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from string import Template
from typing import Any

import yaml

from emu_lightning.files import write_whole
from emu_lightning.sweeps.definition import Sweep
from emu_lightning.sweeps.records import Records, Run
from emu_lightning.sweeps.search import propose
from emu_lightning.sweeps.tables import refuse_other_sweep, write_tables

TOLD_TO_END = (128 + signal.SIGINT, 128 + signal.SIGTERM)
ORDER = ("running", "stopped", "waiting", "failed")  # in which runs are taken up
SECONDS_BETWEEN_LOOKS = 0.1
NUM_LAST_LINES, NUM_LAST_BYTES = 10, 10_000  # of a log that are kept of a failure

# $0 is the file for the exit code. The program is in the background because a shell answers no signal before
# a program in the foreground has ended; `wait` ends early at a signal.
_SHELL = """
trap 'told=yes; kill -TERM $program' INT TERM
"$@" & program=$!
[ "$told" ] && kill -TERM $program
wait $program; code=$?
while kill -0 $program 2> /dev/null; do wait $program; code=$?; done
echo $code > "$0.partial" && mv "$0.partial" "$0"
"""


class Attempt:
    """A start of a run's program; also one that another process made and that outlived it.

    Args:
        name: of the run and the start.
        folder: for its log and its exit code.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.log, self._exit = folder / f"{name}.log", folder / f"{name}.exit"
        self._shell: subprocess.Popen[bytes] | None = None

    def start(self, command: list[str], environment: dict[str, str]) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            fcntl.flock(log, fcntl.LOCK_EX)  # the program inherits the lock with its output
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            self._shell = subprocess.Popen(
                ["/bin/sh", "-c", _SHELL, str(self._exit), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C is for this process, which tells the programs
            )

    @property
    def exit_code(self) -> int | None:
        """How the program ended; None where it runs, or was killed together with its shell."""
        return int(self._exit.read_text()) if self._exit.is_file() else None

    @property
    def is_ours(self) -> bool:
        """Whether this process started it."""
        return self._shell is not None

    @property
    def is_running(self) -> bool:
        if self._shell is not None and self._shell.poll() is None:
            return True
        return self.exit_code is None and _is_locked(self.log)

    @property
    def ended(self) -> float:
        """The last sign of life, in seconds since the epoch."""
        return max((path.stat().st_mtime for path in (self._exit, self.log) if path.is_file()), default=0.0)

    def tell_to_end(self) -> None:
        """As the agent does; training saves first."""
        if self._shell is not None and self._shell.poll() is None:
            self._shell.terminate()

    def kill(self) -> None:
        """The program with all that it started."""
        if self._shell is not None and self._shell.poll() is None:
            os.killpg(self._shell.pid, signal.SIGKILL)

    def last_lines(self) -> str:
        """The end of the log; of a line that was written over, as progress bars do, what was seen last."""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - NUM_LAST_BYTES))
            lines = log.read().decode(errors="replace").split("\n")
        seen = [line.rstrip().rpartition("\r")[2] for line in lines]
        return "\n".join([line for line in seen if line][-NUM_LAST_LINES:])


def _is_locked(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


class LocalSweep:
    """A sweep in a folder; the same again goes on with it.

    ``out`` receives `sweep.json` and `runs.csv`, up to date at any moment, `logs/<run>.<start>.log`, and the
    W&B files of programs that do not say where they want them. `runs.db` is what it goes on from.

    Args:
        sweep: what to run.
        out: the folder; its name is W&B's sweep id, unless the environment has WANDB_SWEEP_ID.
        workers: programs at a time.
        count: runs in all; None is the whole grid, or the file's `run_cap`.

    Raises:
        ValueError: a search has no end, or a Bayesian one could not see its metric.
    """

    def __init__(self, sweep: Sweep, out: Path, workers: int = 1, count: int | None = None) -> None:
        if workers < 1 or (count is not None and count < 1):
            raise ValueError("--workers and --count must be at least 1")
        limits = [limit for limit in (count, sweep.run_cap) if limit is not None]
        self.sweep, self.out, self.workers = sweep, out.resolve(), workers
        self.count = min(limits, default=None)
        if sweep.method != "grid" and self.count is None:
            raise ValueError(
                f"{sweep.path}: method {sweep.method} has no end: give --count, or run_cap in the file"
            )
        if sweep.method == "bayes" and self.folder(Run("", sweep.examples()[0])) is None:
            raise ValueError(
                f"{sweep.path}: {sweep.metric} is read from metrics.csv in the folder that --run_dir of the "
                "command names, and it names none"
            )
        self._under_way: dict[str, tuple[Run, Attempt]] = {}
        self._signals: list[int] = []
        self._told: set[str] = set()

    # --- a run ----------------------------------------------------------------------------------------------

    def environment(self, run: Run) -> dict[str, str]:
        """What the program of a run is told, as by the agent, but offline where nothing else is asked for."""
        settings = self.sweep.settings
        defaults = {
            "WANDB_MODE": "offline",
            "WANDB_SWEEP_ID": self.out.name,
            "WANDB_PROJECT": settings.get("project") or self.out.name,
            "WANDB_DIR": str(self.out),
        }
        if settings.get("entity"):
            defaults["WANDB_ENTITY"] = settings["entity"]
        own = {
            "WANDB_RUN_ID": run.name,
            "WANDB_NAME": run.name,
            "WANDB_SWEEP_PARAM_PATH": str(self.out / "parameters" / f"{run.name}.yaml"),
        }
        inherited = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
        return defaults | inherited | own

    def folder(self, run: Run) -> Path | None:
        """What `--run_dir` of a run's command names; None where there is none."""
        named = None
        command = self.sweep.command_line(run.parameters)
        for part, following in zip(command, [*command[1:], ""], strict=True):
            if part == "--run_dir":
                named = following
            elif part.startswith("--run_dir="):
                named = part.partition("=")[2]
        return None if named is None else Path(Template(named).safe_substitute(self.environment(run)))

    def _attempt(self, run: Run) -> Attempt:
        """The last start of a run."""
        return Attempt(f"{run.name}.{run.starts}", self.out / "logs")

    def _start(self, run: Run) -> None:
        before = self._attempt(run)
        if run.state == "running":  # when this sweep was killed
            if before.is_running or before.exit_code is not None:
                self._under_way[run.name] = run, before
                return
            run.seconds += max(0.0, before.ended - run.begun)
        environment = self.environment(run)
        values = {name: {"value": value} for name, value in run.parameters.items()}
        parameters = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        write_whole(environment["WANDB_SWEEP_PARAM_PATH"], f"wandb_version: 1\n\n{parameters}")
        run.state, run.starts, run.begun = "running", run.starts + 1, time.time()
        self._records.save(run)
        attempt = self._attempt(run)
        attempt.start(self.sweep.command_line(run.parameters), environment)
        self._under_way[run.name] = run, attempt

    def _end(self, run: Run, attempt: Attempt) -> None:
        run.exit_code = attempt.exit_code
        run.seconds += max(0.0, attempt.ended - run.begun)
        run.last_lines = ""
        if run.exit_code == 0:
            run.state, run.metric = "finished", self._metric(run)
        elif run.exit_code is None or run.exit_code in TOLD_TO_END:
            run.state = "stopped"
        else:
            run.state, run.last_lines = "failed", attempt.last_lines()
        self._records.save(run)

    def _metric(self, run: Run) -> float | None:
        """The metric's last value in the run's `metrics.csv`."""
        folder = self.folder(run)
        if self.sweep.metric is None or folder is None or not (folder / "metrics.csv").is_file():
            return None
        with (folder / "metrics.csv").open(newline="") as file:
            values = [row.get(self.sweep.metric) for row in csv.DictReader(file)]
        return next((float(value) for value in reversed(values) if value), None)

    # --- all of them ----------------------------------------------------------------------------------------

    def run(self) -> list[Run]:
        """Runs what has not finished, once more what failed, and returns all runs.

        Raises:
            ValueError: the folder holds another sweep, or this one is being run already.
            SystemExit: 128 + the signal, after SIGINT or SIGTERM, when the programs have ended. A second
                signal kills them.
        """
        refuse_other_sweep(self.sweep, self.out)
        with (
            _alone(self.out),
            closing(Records(self.out / "runs.db")) as self._records,
            self._heeding_signals(),
        ):
            if self.sweep.method == "grid":
                grid = islice(self.sweep.named_grid().items(), self.count)
                self._records.add(Run(name, parameters) for name, parameters in grid)
            due = [run for run in self._records.all() if run.state != "finished"]
            self._work_through(deque(sorted(due, key=lambda run: ORDER.index(run.state))))
            return self._records.all()

    def _work_through(self, queue: deque[Run]) -> None:
        self._write_tables()
        while True:
            while len(self._under_way) < self.workers and not self._signals:
                run = queue.popleft() if queue else self._proposed()
                if run is None:
                    break
                self._start(run)
                self._write_tables()
                self._say(run, "" if run.starts == 1 else f"start {run.starts}")
            if not self._under_way:
                break
            time.sleep(SECONDS_BETWEEN_LOOKS)
            self._pass_on_signals()
            for run, attempt in list(self._under_way.values()):
                if attempt.is_running:
                    continue
                del self._under_way[run.name]
                self._end(run, attempt)
                self._write_tables()
                self._say(run, run.last_lines.rpartition("\n")[2])
                if run.exit_code is None and not self._signals:
                    queue.appendleft(run)  # killed behind our back
        if self._signals:
            raise SystemExit(128 + self._signals[0])

    def _pass_on_signals(self) -> None:
        """The first signal tells the programs to end, which saves; the second kills them."""
        for name, (_, attempt) in list(self._under_way.items()):
            if not self._signals:
                return
            if not attempt.is_ours:
                del self._under_way[name]  # it outlives this process, too
            elif len(self._signals) > 1:
                attempt.kill()
            elif name not in self._told:
                self._told.add(name)
                attempt.tell_to_end()

    def _proposed(self) -> Run | None:
        """The next run of a search, where there is one."""
        runs = self._records.all()
        if self.sweep.method == "grid" or self.count is None or len(runs) >= self.count:
            return None
        parameters = propose(self.sweep, runs)
        if parameters is None:
            return None
        run = Run(self.sweep.run_name(parameters), parameters)
        self._records.add([run])
        return run

    def _write_tables(self) -> None:
        runs = self._records.all()
        write_tables(self.sweep, runs, self.out, {run.name: self.folder(run) for run in runs})

    def _say(self, run: Run, remark: str) -> None:
        print(f"emu sweep: {run.state} {run.name}{remark and ': '}{remark}", file=sys.stderr, flush=True)

    @contextmanager
    def _heeding_signals(self) -> Iterator[None]:
        def heed(signum: int, _: Any) -> None:
            self._signals.append(signum)

        before = {signum: signal.signal(signum, heed) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Nobody else runs this sweep meanwhile; a kill ends that, too.

    Raises:
        ValueError: somebody does.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out} is being run by another emu sweep") from None
        yield
