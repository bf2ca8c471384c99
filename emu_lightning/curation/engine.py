"""How shards are spread over processes, machines, or a cluster: one method, `Engine.map`.

Whatever spreads them, a shard is worked on in a process of its own under watch (:class:`Watched`): a picture
that kills its process, or holds it for ever, costs that picture and not the run. Engines carry tasks and
reports, no pixels and no scores: work writes its files itself.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any, Literal

MAX_DEATHS = 20  # of processes over one shard; more is no matter of single pictures
TICK = 0.5  # seconds between two looks at a process


@dataclass(frozen=True)
class Task:
    """Rows of a shard to work on.

    Attributes:
        shard: its id.
        num_rows: how many rows that is, for progress.
        rows: their numbers; None is all of them.
        suspects: rows of which one killed a process: each is to be worked on alone.
        refused: rows not to be touched again, and why.
    """

    shard: str
    num_rows: int
    rows: tuple[int, ...] | None = None
    suspects: frozenset[int] = frozenset()
    refused: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What became of a task.

    Attributes:
        shard: its id.
        num_rows: of the task.
        num_bad: of them no pictures, or broken ones.
        seconds: it took.
    """

    shard: str
    num_rows: int
    num_bad: int
    seconds: float


Mark = Callable[[int, int], None]  # says which rows, from first to last, are being worked on
Work = Callable[[Task, Mark], Report]  # picklable; errors that it raises end the run


class Engine(ABC):
    """Spreads work.

    Args:
        num_workers: processes on this machine, or in the cluster; None is this machine's cores.
        timeout: seconds without progress after which a process is taken to hang.
    """

    def __init__(self, num_workers: int | None = None, timeout: float = 300.0) -> None:
        if num_workers is not None and num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {num_workers}")
        if timeout <= 0:
            raise ValueError(f"timeout must be more than 0 seconds, got {timeout:g}")
        self.num_workers, self.timeout = num_workers or os.cpu_count() or 1, timeout

    @abstractmethod
    def map(self, work: Work, tasks: Sequence[Task], num_workers: int | None = None) -> Iterator[Report]:
        """A report for each task, in any order, as they come.

        Args:
            work: done once for each task; where a process dies, again from the task's beginning.
            tasks: in the order in which they are begun.
            num_workers: for this work, in place of the engine's own; never more than there are tasks.

        Raises:
            RuntimeError: processes die without end.
            Exception: what work raised.
        """


class Processes(Engine):
    """The processes of this machine, by the standard library alone."""

    def map(self, work: Work, tasks: Sequence[Task], num_workers: int | None = None) -> Iterator[Report]:
        num_workers = min(num_workers or self.num_workers, len(tasks))
        if not tasks:
            return
        watch = Watch(pickle.dumps(work), num_workers, self.timeout)
        threads = ThreadPoolExecutor(num_workers)
        try:
            for future in as_completed([threads.submit(watch.do, task) for task in tasks]):
                yield future.result()
        finally:  # also when the caller stops asking
            watch.close()
            threads.shutdown(cancel_futures=True)


class Daft(Engine):
    """Daft: its native runner on this machine, its Ray runner on a cluster, with the same files as a result.

    Args:
        runner: native; or ray, which joins the cluster that Ray finds (`RAY_ADDRESS`), or starts one here.
            Run folder and pool must be seen by all its machines under the same names.
        num_workers: processes; with ray in the whole cluster.
        timeout: see :class:`Engine`.
        gpus: of each process, such as 0.25; only Ray deals them out.

    Raises:
        ValueError: Daft is not installed.
    """

    def __init__(
        self,
        runner: Literal["native", "ray"] = "native",
        num_workers: int | None = None,
        timeout: float = 300.0,
        gpus: float = 0.0,
    ) -> None:
        super().__init__(num_workers, timeout)
        self.runner, self.gpus = runner, gpus

    def map(self, work: Work, tasks: Sequence[Task], num_workers: int | None = None) -> Iterator[Report]:
        num_workers = min(num_workers or self.num_workers, len(tasks))
        if not tasks:
            return
        for name in ("DAFT_ANALYTICS_ENABLED", "RAY_USAGE_STATS_ENABLED", "DAFT_PROGRESS_BAR"):
            os.environ.setdefault(name, "0")  # both tell their makers of each use unless told not to
        try:
            import daft
        except ModuleNotFoundError:
            raise ValueError(
                "Daft is not installed: pip install 'emu_lightning[curation]', or take the engine Processes"
            ) from None
        is_ray = self.runner == "ray"
        if daft.get_or_infer_runner_type() != self.runner:  # can be set once only
            daft.set_runner_ray() if is_ray else daft.set_runner_native()
        settings: dict[str, Any] = {"gpus": self.gpus} if is_ray else {"use_process": False}
        watched = daft.cls(_Watched, max_concurrency=num_workers, **settings)
        do = watched(pickle.dumps(work), 1 if is_ray else num_workers, self.timeout)
        table = daft.from_pydict({"task": [pickle.dumps(task) for task in tasks]})
        table = table.into_partitions(min(len(tasks), 16 * num_workers)) if is_ray else table.into_batches(1)
        for row in table.select(do(daft.col("task")).alias("outcome")).iter_rows():
            outcome = pickle.loads(row["outcome"])
            if isinstance(outcome, BaseException):
                raise outcome
            yield outcome


class _Watched:
    """What Daft calls: one in each of Ray's processes, or one for all threads of its native runner."""

    def __init__(self, work: bytes, num_workers: int, timeout: float) -> None:
        self._watch = Watch(work, num_workers, timeout)

    def __call__(self, task: bytes) -> bytes:
        try:
            return pickle.dumps(self._watch.do(pickle.loads(task)))
        except Exception as error:  # Daft would raise it as an error of its own
            return pickle.dumps(error)


class Watch:
    """Processes that work under watch; threads ask for as many at once as they are.

    Args:
        work: pickled, so that it is made only where it is done.
        num_workers: how many processes share the machine's cores.
        timeout: see :class:`Engine`.
    """

    def __init__(self, work: bytes, num_workers: int, timeout: float) -> None:
        self._work, self._timeout = work, timeout
        self._threads = max(1, (os.cpu_count() or 1) // num_workers)
        self._idle: queue.LifoQueue[_Process] = queue.LifoQueue()
        self._busy: set[_Process] = set()
        self._is_closed = False

    def do(self, task: Task) -> Report:
        """One task to its end, over as many processes as it kills."""
        for _ in range(MAX_DEATHS):
            process = self._take()
            try:
                outcome = process.do(task, self._timeout)
            except _Died as died:
                if self._is_closed:
                    raise RuntimeError("stopped") from None
                task, last = after_death(task, died), died
            else:
                self._idle.put(process)
                if isinstance(outcome, BaseException):
                    raise outcome
                return outcome
            finally:
                self._busy.discard(process)
        raise RuntimeError(
            f"shard {task.shard}: {MAX_DEATHS} processes died over it, the last {last.why}: is there enough "
            "memory? What was finished is kept"
        )

    def _take(self) -> _Process:
        try:
            process = self._idle.get_nowait()
        except queue.Empty:
            process = _Process(self._work, self._threads)
        self._busy.add(process)
        if self._is_closed:  # meanwhile
            process.kill()
        return process

    def close(self) -> None:
        """Ends all processes, at work or not."""
        self._is_closed = True
        for process in list(self._busy):
            process.kill()
        with suppress(queue.Empty):
            while True:
                self._idle.get_nowait().kill()

    def __del__(self) -> None:
        self.close()


def after_death(task: Task, died: _Died) -> Task:
    """The task as it is tried again: the rows at hand come one by one, and what kills alone is refused.

    Every second death so puts at least one row aside. Death before the first row says nothing of rows.
    """
    if died.rows is None:
        return task
    first, last = died.rows
    if first == last and first in task.suspects:
        return replace(task, refused={**task.refused, first: f"its process {died.why}, twice"})
    return replace(task, suspects=task.suspects | set(range(first, last + 1)))


class _Died(Exception):
    """A process is gone.

    Args:
        rows: first and last of those at hand; None where it had not begun.
        why: "was killed by SIGKILL".
    """

    def __init__(self, rows: tuple[int, int] | None, why: str) -> None:
        super().__init__(rows, why)
        self.rows, self.why = rows, why


class _Process:
    """One process and what it says of itself: replies by a pipe, the rows at hand by shared memory.

    Looking at memory costs the process nothing, where a message for each picture would.
    """

    def __init__(self, work: bytes, num_threads: int) -> None:
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads may never wake
        self._pipe, theirs = context.Pipe()
        self._at = context.RawArray("q", 3)  # first row, last row, number of marks
        self._process = context.Process(
            target=_serve, args=(theirs, self._at, work, num_threads), daemon=True
        )
        self._process.start()
        theirs.close()

    def do(self, task: Task, timeout: float) -> Report | BaseException:
        """What the work returned or raised.

        Raises:
            _Died: the process died, or was killed because it hung.
        """
        begun = self._at[2]
        try:
            self._pipe.send(task)
            seen, since = begun, time.monotonic()
            while not self._pipe.poll(min(TICK, timeout)):
                if self._at[2] != seen:
                    seen, since = self._at[2], time.monotonic()
                elif seen != begun and time.monotonic() - since > timeout:  # loading a model may take longer
                    self.kill()
                    raise _Died(self._rows(begun), f"made no progress for {timeout:g} s")
            outcome: Report | BaseException = self._pipe.recv()
            return outcome
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode or 0
            why = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            raise _Died(self._rows(begun), why) from None

    def _rows(self, begun: int) -> tuple[int, int] | None:
        return None if self._at[2] == begun else (self._at[0], self._at[1])

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(pipe: Connection, at: Any, work: bytes, num_threads: int) -> None:
    """A process's life: a task, its outcome, the next task, until nobody is at the other end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all of them: the first process decides
    for library in ("OMP", "MKL", "OPENBLAS"):  # read when torch or onnxruntime is imported, with the work
        os.environ.setdefault(f"{library}_NUM_THREADS", str(num_threads))
    do: Work = pickle.loads(work)
    parent = os.getppid()

    def mark(first: int, last: int) -> None:
        if os.getppid() != parent:  # it was killed: whoever runs next shall not find us at the same shard
            os._exit(1)
        at[0], at[1] = first, last
        at[2] += 1

    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            outcome: Report | BaseException = do(task, mark)
        except Exception as error:
            outcome = _portable(error)
        pipe.send(outcome)


def _portable(error: Exception) -> Exception:
    """`error` with its traceback as a note, in a form that another process can load."""
    error.add_note(traceback.format_exc())
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # exceptions with arguments of their own often cannot be
        return RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
