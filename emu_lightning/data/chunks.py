"""Tensors in a folder of safetensors files: whole or absent, mapped instead of read, made by any processes.

Each file is made under a lock of its own, so that processes, on one machine or on several that share the
folder, divide the work without talking to each other. The system frees the lock of a killed process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

CacheDtype = Literal["float32", "bfloat16", "float16"]


def narrowed(tensor: Tensor, dtype: CacheDtype, what: str) -> Tensor:
    """`tensor` on the CPU, as `dtype` where its own takes more bytes; whole numbers stay as they are.

    Raises:
        ValueError: a value is not finite, or not any more; the message names `what`.
    """
    stored = tensor.detach().cpu()
    if stored.is_floating_point():
        if stored.element_size() > getattr(torch, dtype).itemsize:
            stored = stored.to(getattr(torch, dtype))
        if not stored.isfinite().all():
            raise ValueError(f"{what} are not finite in {stored.dtype}: is cache_dtype {dtype} too narrow?")
    return stored.contiguous()


def map_chunk(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that stay in the file until they are read, and the metadata.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and it is made again") from None


def make_all(folder: Path, names: Iterable[str], make: Callable[[str], None]) -> None:
    """Calls `make` with the file names of `names` that are not in `folder`; no two processes make the same.

    The first round takes what no other process is at. The second waits for those: what they made is left out,
    and what a killed one left behind is made here. So at the end everything is there.
    """
    names = list(names)
    for is_patient in (False, True):
        for name in names:
            if (folder / name).is_file():
                continue
            lock = folder / f"{name}.lock"
            with suppress(Timeout), FileLock(lock, blocking=is_patient):
                if not (folder / name).is_file():
                    make(name)
                with suppress(OSError):
                    lock.unlink()  # who still waits for it finds the file made
