import multiprocessing

import pytest

from emu_lightning.curation import engine as engines
from emu_lightning.curation.engine import Daft, Processes, Task
from tests.curation.planted import CountRows

TASKS = [Task(f"{number:08d}", num_rows=5) for number in range(6)]


def reports(engine, work, tasks=TASKS):
    return sorted((report.shard, report.num_rows, report.num_bad) for report in engine.map(work, tasks))


def expected(bad=None):
    return [(task.shard, 5, int(task.shard == bad)) for task in TASKS]


def test_every_task_is_reported_once():
    assert reports(Processes(2), CountRows()) == expected()
    assert reports(Processes(2), CountRows(), []) == []
    assert not multiprocessing.active_children()


def test_a_row_that_kills_is_refused_and_its_neighbours_are_not():
    assert reports(Processes(2), CountRows(TASKS[1].shard, 3)) == expected(bad=TASKS[1].shard)


def test_a_row_that_hangs_is_refused():
    work = CountRows(TASKS[0].shard, 3, "hangs")
    assert reports(Processes(1, timeout=2), work, TASKS[:1]) == [(TASKS[0].shard, 5, 1)]


def test_a_row_at_hand_is_suspected_and_only_alone_refused():
    died = engines._Died((2, 4), "was killed by SIGKILL")
    task = engines.after_death(TASKS[0], died)
    assert task.suspects == {2, 3, 4} and not task.refused
    task = engines.after_death(task, engines._Died((3, 3), "was killed by SIGKILL"))
    assert task.refused == {3: "its process was killed by SIGKILL, twice"}
    task = engines.after_death(task, engines._Died((9, 9), "was killed by SIGKILL"))
    assert task.suspects == {2, 3, 4, 9} and set(task.refused) == {3}
    assert engines.after_death(task, engines._Died(None, "was killed by SIGKILL")) == task


def test_errors_of_the_work_come_out():
    with pytest.raises(FileNotFoundError, match="clip.safetensors"):
        reports(Processes(2), CountRows(TASKS[2].shard, 0, "raises"))
    assert not multiprocessing.active_children()


def test_processes_that_die_without_end(monkeypatch):
    monkeypatch.setattr(engines, "MAX_DEATHS", 2)
    with pytest.raises(RuntimeError, match="2 processes died over it, the last was killed by SIGKILL"):
        reports(Processes(1), CountRows(TASKS[0].shard, 0, "killed at once"), TASKS[:1])


def test_stopping_ends_the_processes():
    running = Processes(2).map(CountRows(TASKS[5].shard, 0, "hangs"), TASKS)
    next(running)
    running.close()
    assert not multiprocessing.active_children()


def test_daft_reports_the_same():
    pytest.importorskip("daft")
    assert reports(Daft(num_workers=2), CountRows(TASKS[1].shard, 3)) == expected(bad=TASKS[1].shard)
    with pytest.raises(FileNotFoundError, match="clip.safetensors"):
        reports(Daft(num_workers=2), CountRows(TASKS[2].shard, 0, "raises"))


@pytest.mark.parametrize(
    "arguments, name", [({"num_workers": 0}, "num_workers"), ({"timeout": 0}, "timeout")]
)
def test_settings_that_cannot_be(arguments, name):
    with pytest.raises(ValueError, match=name):
        Processes(**arguments)
