"""A benchmark of several parts: each is kept in results.json before the next begins."""

from __future__ import annotations

import json
import shlex
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from emu_lightning.evaluation.comparison_page import environment
from emu_lightning.files import write_whole

Part = Callable[[Path], dict[str, Any]]  # from an empty folder, which ends with it, to figures


def run_parts(
    out: Path, parts: Mapping[str, Part], module: str, options: Sequence[str] = ()
) -> dict[str, Any]:
    """Measures, prints, and writes `<out>/results.json`; figures there of other parts stay.

    Args:
        out: folder, made where it is missing.
        parts: by name, in their order.
        module: of the benchmark, for the command kept with each part's figures.
        options: further ones of that command.
    """
    path = out / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for name, part in parts.items():
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            made = part(Path(folder))
        command = shlex.join(["python", "-m", module, "--parts", name, *options])
        made["about"] = results.get("about", {}) | {
            name: {"command": command, "seconds": round(time.monotonic() - begun, 1), **environment()}
        }
        results |= made
        write_whole(path, json.dumps(results, indent=1) + "\n")
        print(json.dumps(made, indent=1), flush=True)
    return results
