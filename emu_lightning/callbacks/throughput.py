"""How fast a run is: images a second, share of the device's arithmetic, waiting for data, peak memory."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from emu_lightning.callbacks.metrics import MetricsFile
from emu_lightning.data.batch import Batch
from emu_lightning.processes.seeding import generators_for

LARGEST_SIDE = 8192  # of the matrices whose product is timed: 1.1 TFLOP, 0.4 GB in bfloat16
LONG_ENOUGH = 5e-3  # seconds of a product that is timed well


class Throughput(Callback):
    """Measures every run, and costs it nothing but a pass over one sample at the start.

    Each time the trainer logs it adds a row to ``<run>/speed.csv`` (and to all other loggers) about the steps
    since the row before:

    - ``speed/images_per_second_per_device``: of training, which waiting for data is part of, and validation,
      checkpoints and samples are not.
    - ``speed/mfu``: share of the rate of matrix products, measured on this device in the run's precision at
      the start, that the arithmetic of the loss and its gradient makes up (Chowdhery et al. 2022, appendix
      B). What activation checkpointing computes again does not count. Absent where it cannot be computed;
      the last line of the run says why.
    - ``speed/data_wait``: share of the time in which the device had nothing to do but wait for a batch.
    - ``speed/peak_memory_gb``: 10^9 bytes; allocated on the GPU, or resident in the process on a CPU.

    Rows are of process 0. The first step, which compiles and allocates, is left out. The file is apart from
    ``metrics.csv`` because that one is a function of the seed, which times are not.
    """

    def __init__(self) -> None:
        self.flops_per_image: float | None = None
        self.matmul_rate: float | None = None  # FLOP/s
        self.rows: list[dict[str, float]] = []
        self._no_mfu = ""
        self._begin_window()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._clock = Clock(trainer.strategy.root_device)
        self._profiler: Any = trainer.profiler  # type: ignore[attr-defined]  # the Trainer declares little
        self._is_prepared = self._is_warm = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        others = [each for each in trainer.loggers if not isinstance(each, MetricsFile)]
        self._loggers = [MetricsFile(Path(trainer.default_root_dir) / "speed.csv"), *others]
        self._watch_fetching()

    def _watch_fetching(self) -> None:
        """Marks the ends of every fetching, of which Lightning tells nobody but its profiler."""
        start, stop = self._profiler.start, self._profiler.stop

        def started(action: str) -> None:
            if action.endswith("train_dataloader_next"):
                self._fetch_started = self._clock.mark()
            start(action)

        def stopped(action: str) -> None:
            stop(action)
            if action.endswith("train_dataloader_next"):
                self._fetch_ended = self._clock.mark()

        self._profiler.start, self._profiler.stop = started, stopped

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if self._is_prepared:
            return
        self._is_prepared = True
        try:
            with trainer.precision_plugin.train_step_context():
                self.matmul_rate = measure_matmul_rate(self._clock)
                self.flops_per_image = _flops_of_a_sample(pl_module, batch)
        except Exception as error:  # whatever a loss may raise: no measurement may end a run
            cause = str(error).splitlines()[0] if str(error) else ""
            self._no_mfu = f"{type(error).__name__}: {cause}"
        self._clock.forget_peak_memory()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._num_images += len(batch)
        self._marks.append((self._fetch_started, self._fetch_ended, self._clock.mark()))
        if trainer.global_step == self._step:  # gradients accumulate
            return
        self._step = trainer.global_step
        if not self._is_warm:
            self._is_warm = True
            self._begin_window()
        elif self._step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            row = self._measure()
            self.rows.append(row)
            for logger in self._loggers:
                logger.log_metrics(row, self._step - 1)  # loggers number the steps from 0
            self._begin_window()

    def _begin_window(self) -> None:
        self._num_images = 0
        self._marks: list[tuple[Any, Any, Any]] = []  # fetching starts, fetching ends, batch ends

    def _measure(self) -> dict[str, float]:
        waiting = sum(self._clock.seconds(start, end) for start, end, _ in self._marks)
        computing = sum(self._clock.seconds(start, end) for _, start, end in self._marks)
        images_per_second = self._num_images / (waiting + computing)
        row = {"speed/images_per_second_per_device": images_per_second}
        if self.flops_per_image is not None and self.matmul_rate is not None:
            row["speed/mfu"] = self.flops_per_image * images_per_second / self.matmul_rate
        row["speed/data_wait"] = waiting / (waiting + computing)
        peak = self._clock.peak_memory()
        return row if peak is None else row | {"speed/peak_memory_gb": peak / 1e9}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.rows and trainer.is_global_zero:
            print(f"emu: {self.summary()}", file=sys.stderr)

    def summary(self) -> str:
        """The median row in words."""
        median = {name: statistics.median(row[name] for row in self.rows) for name in self.rows[0]}
        parts = [f"{median['speed/images_per_second_per_device']:.4g} images/s per device"]
        if "speed/mfu" in median:
            assert self.matmul_rate is not None
            parts.append(f"MFU {median['speed/mfu']:.1%} of {self.matmul_rate / 1e12:.3g} TFLOP/s measured")
        else:
            parts.append(f"no MFU ({self._no_mfu})")
        parts.append(f"{median['speed/data_wait']:.1%} of the time waiting for data")
        if "speed/peak_memory_gb" in median:
            parts.append(f"peak memory {max(row['speed/peak_memory_gb'] for row in self.rows):.3g} GB")
        return ", ".join(parts)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for name in ("start", "stop"):
            vars(self._profiler).pop(name, None)  # the class's own again


class Clock:
    """Moments on a device's own timeline, which runs behind the host's on a GPU; and its peak memory.

    Between two moments that the host marks while the GPU is busy with earlier work, no time passes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._is_cuda = device, device.type == "cuda"

    def mark(self) -> Any:
        """This moment."""
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """From one moment to a later one; waits until the device has reached it."""
        if not self._is_cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def forget_peak_memory(self) -> None:
        """The peak begins anew; that of a process cannot."""
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_memory(self) -> float | None:
        """Bytes; None where the operating system does not tell."""
        if self._is_cuda:
            return torch.cuda.max_memory_allocated(self.device)
        try:
            import resource  # Unix only
        except ImportError:
            return None
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure_matmul_rate(clock: Clock) -> float:
    """FLOP/s of the best of some products of large square matrices, in the precision that now holds.

    The sides double until a product takes long enough to be timed.
    """
    rng = torch.Generator(clock.device).manual_seed(0)
    one = torch.ones(1, 1, device=clock.device)
    dtype = (one @ one).dtype  # as autocast, or the default precision, would have it
    side, seconds = 128, 0.0
    while side < LARGEST_SIDE and seconds < LONG_ENOUGH:
        side *= 2
        matrix = torch.randn(side, side, generator=rng, device=clock.device).to(dtype)
        seconds = min(_seconds_of_product(clock, matrix) for _ in range(3))
    seconds = min(seconds, *(_seconds_of_product(clock, matrix) for _ in range(5)))
    return 2 * side**3 / seconds


def _seconds_of_product(clock: Clock, matrix: Tensor) -> float:
    start = clock.mark()
    matrix @ matrix
    return clock.seconds(start, clock.mark())


def count_flops(run: Callable[[], Any], use_gradient: bool = True) -> float:
    """Floating-point operations of a computation and of its gradient, whichever kernels compute them.

    Matrix products, convolutions and attention are counted, a multiplication and an addition as two. What is
    recomputed in the backward pass is not, by activation checkpointing or inside fused attention.

    Args:
        run: computes, with ``use_gradient`` a loss, a scalar; gradients are left in the parameters.
        use_gradient: also differentiate the loss.
    """
    counter = _Counter(display=False)
    with counter:
        value = run()
        if use_gradient:
            counter.in_backward = True
            value.backward()
    counts = {str(kernel): flops for kernel, flops in counter.get_flop_counts().get("Global", {}).items()}
    fused = sum(flops for kernel, flops in counts.items() if "attention" in kernel and "backward" in kernel)
    return sum(counts.values()) - fused / 5  # of its five products one is repeated


class _Counter(FlopCounterMode):
    in_backward = False

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        if self.in_backward and torch.is_grad_enabled():  # a checkpoint recomputes, to differentiate it
            return out
        return super()._count_flops(func_packet, out, args, kwargs)


def _flops_of_a_sample(pl_module: LightningModule, batch: Batch) -> float:
    """Of the batch's first sample, in a pass that leaves weights, gradients and random states as they are."""
    generator: Any = getattr(pl_module, "generator", None)
    if generator is None:
        raise ValueError(f"the losses of {type(pl_module).__name__} are not counted")
    sample = first_sample(batch)
    rng = generators_for(0, sample.positions, pl_module.device)
    # Compiled blocks hide their operations; torch.compiler takes seconds to import where there are none.
    is_compiled = any(each._compiled_call_impl is not None for each in pl_module.modules())
    eager = torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()
    devices = [pl_module.device] if pl_module.device.type == "cuda" else []
    try:
        with eager, torch.random.fork_rng(devices):
            return count_flops(lambda: generator.loss(sample, rng))
    finally:
        for parameter in pl_module.parameters():  # this is before the first gradient
            parameter.grad = None


def first_sample(batch: Batch) -> Batch:
    """A batch of the first sample alone."""
    values = {each.name: getattr(batch, each.name) for each in fields(batch)}
    alone = {
        name: value[:1]
        for name, value in values.items()
        if isinstance(value, Tensor) or name in ("texts", "uids")
    }
    if batch.embeddings is not None:
        alone["embeddings"] = {name: value[:1] for name, value in batch.embeddings.items()}
    return replace(batch, **alone)
