"""What every test relies on: no command line of pytest's own, one thread."""

import os

# Before torch is imported, and for the processes that tests start. Sums over two threads depend on how the
# work is split, so one thread is what makes losses and weights comparable bit by bit from machine to machine.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

import pytest  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start processes come first, so that two workers end at about the same time."""
    long = {item.path for item in items if any(item.iter_markers("smoke")) or any(item.iter_markers("slow"))}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(autouse=True)
def no_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning and jsonargparse look at `sys.argv`; pytest's is none of their business."""
    monkeypatch.setattr("sys.argv", ["main.py"])


@pytest.fixture
def in_tmp_path(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """An empty working directory, for what writes `runs/` where it stands."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
