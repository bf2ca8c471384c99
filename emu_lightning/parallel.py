"""Training spread over many processes: sharding, and what is whole again afterwards.

:class:`Sharded` is FSDP2 (``torch.distributed.fsdp.fully_shard``) behind Lightning's
``ModelParallelStrategy``: every process holds a part of each weight, gradient, optimizer moment and average,
and the whole weights of one block at a time. Networks keep their names, so that checkpoints, averages and
generators know nothing of it.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils._pytree import register_dataclass

from emu_lightning.models import EMA, FrozenTextEncoder, Text
from emu_lightning.models.frozen import Frozen

M = TypeVar("M", bound=nn.Module)

register_dataclass(Text)  # or else FSDP2 does not see the tensors in it, and drops their gradients

SHARDS_INDEX, REMAINDER = ".metadata", "meta.pt"  # of a sharded checkpoint: torch's file, Lightning's file


class Sharded(ModelParallelStrategy):
    """FSDP2 over all processes; with ``num_replicas`` HSDP: sharded within a replica, equal between them.

    Lightning's own strategy leaves the mesh to the user and shards nothing by default. Here all processes are
    data-parallel, and the loss is that of one process with the whole batch.

    Args:
        num_replicas: copies of the whole model, each spread over (processes / num_replicas) of them. One per
            node keeps the traffic of weights inside the nodes.
        reshard_after_forward: free a block's whole weights between forward and backward. False is faster and
            needs memory for the whole weights.
        shard_frozen: also shard the blocks of frozen networks: a T5-XXL need not lie whole on every GPU.

    Raises:
        ValueError: the number of processes is not a multiple of ``num_replicas``.
    """

    def __init__(
        self, num_replicas: int = 1, reshard_after_forward: bool = True, shard_frozen: bool = False
    ) -> None:
        super().__init__(tensor_parallel_size=1)
        self.num_replicas, self.shard_frozen = num_replicas, shard_frozen
        self.reshard_after_forward = reshard_after_forward
        self._mesh: DeviceMesh

    def setup_environment(self) -> None:
        world = self.num_nodes * self.num_processes
        if self.num_replicas < 1 or world % self.num_replicas:
            raise ValueError(
                f"{world} processes cannot hold num_replicas={self.num_replicas} of equal size: "
                "give a divisor of the number of processes"
            )
        self._data_parallel_size = world
        super().setup_environment()
        if self.num_replicas == 1:
            self._mesh = self.device_mesh["data_parallel"]
        else:
            shape = (self.num_replicas, world // self.num_replicas)
            names = ("replicas", "shards")
            self._mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)

    def setup(self, trainer: Trainer) -> None:
        # FSDP2 keeps version counters, which tensors made in inference mode do not have.
        fit_loop = trainer.fit_loop.epoch_loop
        for loop in (fit_loop.val_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False
        super().setup(trainer)

    def shard(self, networks: Iterable[nn.Module]) -> None:
        """Shards in place; what is sharded already stays as it is.

        Args:
            networks: each trained, averaged (:class:`EMA`) or frozen as a whole, and used by calling it; only
                frozen ones may be used by other methods.
        """
        for network in networks:
            if isinstance(network, EMA):
                # Never in a backward, which would free its whole weights again: always after forward.
                self._shard(network.model, reshard_after_forward=True)
            elif any(parameter.requires_grad for parameter in network.parameters()):
                self._shard(network, self.reshard_after_forward)
            elif self.shard_frozen:
                self._shard_blocks(network, reshard_after_forward=True)
            for module in network.modules() if self.shard_frozen else ():
                if isinstance(module, Frozen) and not module.offload:
                    self._shard_frozen(module)

    def _shard(self, network: nn.Module, reshard_after_forward: bool) -> None:
        if isinstance(network, FSDPModule):
            return
        for weight in network.parameters():
            weight.data = weight.data.contiguous()  # FSDP2 takes no other memory order, such as channels-last
        self._shard_blocks(network, reshard_after_forward)
        fully_shard(network, mesh=self._mesh, reshard_after_forward=reshard_after_forward)
        if isinstance(network, FrozenTextEncoder):
            register_fsdp_forward_method(network, "read")  # is called alone where embeddings are cached

    def _shard_blocks(self, network: M, reshard_after_forward: bool) -> M:
        for block in blocks(network):
            if not isinstance(block, FSDPModule):
                fully_shard(block, mesh=self._mesh, reshard_after_forward=reshard_after_forward)
        return network

    def _shard_frozen(self, frozen: Frozen[Any]) -> None:
        if frozen.is_loaded:
            self._shard_blocks(frozen.network, reshard_after_forward=True)
        else:
            load = frozen.load
            frozen.load = lambda: self._shard_blocks(load(), reshard_after_forward=True)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        path = Path(self.broadcast(str(checkpoint_path)))
        if path.is_dir():
            read_index(path)
        return super().load_checkpoint(path, weights_only)


def blocks(network: nn.Module) -> list[nn.Module]:
    """The repeated parts of a network: the smallest modules that diffusers and transformers keep whole.

    They are what is gathered, compiled and checkpointed at once. A network that names none is one part.
    """
    names = {
        name for module in network.modules() for name in getattr(module, "_no_split_modules", None) or ()
    }

    def is_named(module: nn.Module) -> bool:
        return original_type(module).__name__ in names

    named = [module for module in network.modules() if is_named(module)]
    return [module for module in named if sum(map(is_named, module.modules())) == 1]


def original_type(module: object) -> type:
    """The class that a network had before it was sharded: FSDP2 gives it another one, of another name."""
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))


def saves(trainer: Trainer) -> bool:
    """Whether this process has to call what writes weights: the first, and all where they are sharded."""
    return trainer.is_global_zero or isinstance(trainer.strategy, Sharded)


def mean_where_logged(trainer: Trainer, value: Tensor) -> Tensor:
    """A training step's value, as its mean over all processes where the trainer logs this step.

    Lightning's ``sync_dist`` takes the mean every step, behind a barrier: each time the CPUs would wait for
    their GPUs, and all for the slowest.
    """
    settings: Any = trainer  # Lightning does not declare all of its attributes
    step, interval = settings.fit_loop.epoch_loop._batches_that_stepped + 1, settings.log_every_n_steps
    if trainer.world_size == 1 or interval == 0 or step % interval:
        return value.detach()
    mean: Tensor = trainer.strategy.reduce(value.detach().clone(), reduce_op="mean")
    return mean


def gathered(state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Whole tensors on the CPU in the first process, None in the others, which have to call this too."""
    is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    whole = {}
    for name, value in state.items():
        tensor = value.full_tensor() if isinstance(value, DTensor) else value
        if is_first:
            whole[name] = tensor.detach().cpu()
    return whole if is_first else None


# --- sharded checkpoints ------------------------------------------------------------------------------------


def is_sharded(path: Path) -> bool:
    """Whether this is a complete sharded checkpoint, a folder."""
    return (path / SHARDS_INDEX).is_file() and (path / REMAINDER).is_file()


def read_checkpoint(path: Path, mmap: bool = False) -> dict[str, Any]:
    """A checkpoint that is one file, on the CPU.

    Args:
        path: of the file.
        mmap: leave the weights in the file until they are used.

    Raises:
        ValueError: it is truncated, no checkpoint, or holds anything but plain data, which is not loaded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle's protocol
            checkpoint = torch.load(path, "cpu", weights_only=True, mmap=mmap)
        if isinstance(checkpoint, dict):
            return checkpoint
    except pickle.UnpicklingError:  # torch advises to load it all the same
        cause = "it is none, or holds code, which is not loaded"
    except Exception as error:  # torch raises half a dozen kinds, from EOFError to RuntimeError
        cause = f"truncated, or something else ({type(error).__name__})"
    else:
        cause = f"it holds a {type(checkpoint).__name__}"
    raise ValueError(f"{path} cannot be read as a checkpoint: {cause}")


def consolidate(folder: Path) -> dict[str, Any]:
    """A sharded checkpoint as if it had not been sharded, on the CPU and without the optimizers' states.

    Needs no process group.

    Raises:
        ValueError: the checkpoint is incomplete or broken, or holds anything but plain data.
    """
    index = read_index(folder)
    whole = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in index.state_dict_metadata.items()
        if name.startswith("state_dict.") and isinstance(entry, TensorStorageMetadata)
    }
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is meant to be
            dcp.load(whole, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
        checkpoint = torch.load(folder / REMAINDER, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds, from UnpicklingError to CheckpointException
        raise ValueError(f"{folder} cannot be read as a sharded checkpoint: {_first_line(error)}") from None
    state = {name.removeprefix("state_dict."): value for name, value in whole.items()}
    return {**checkpoint, "state_dict": state}


def read_index(folder: Path) -> Metadata:
    """What lies where in a sharded checkpoint. The index and all but the tensors are pickles, which torch
    would trust: here they are checked to hold nothing but data, before anything loads them.

    Raises:
        ValueError: the checkpoint is incomplete or broken, or holds anything but plain data.
    """
    if not is_sharded(folder):
        raise ValueError(
            f"{folder} is not a complete sharded checkpoint: it needs {SHARDS_INDEX} and {REMAINDER}"
        )
    try:
        with (folder / SHARDS_INDEX).open("rb") as file:
            index: Metadata = _IndexUnpickler(file).load()
        for place, stored in index.storage_data.items():
            if isinstance(index.state_dict_metadata[place.fqn], BytesStorageMetadata):
                with (folder / stored.relative_path).open("rb") as file:
                    file.seek(stored.offset)
                    torch.load(io.BytesIO(file.read(stored.length)), weights_only=True)
    except Exception as error:
        raise ValueError(f"{folder} cannot be read as a sharded checkpoint: {_first_line(error)}") from None
    return index


class _IndexUnpickler(pickle.Unpickler):
    """Makes only what an index consists of."""

    CLASSES = {
        "torch.distributed.checkpoint.metadata": {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size"},
        "pathlib": {"PosixPath", "WindowsPath"},
        "pathlib._local": {"PosixPath", "WindowsPath"},  # Python 3.13
    }

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if name in self.CLASSES.get(module, ()) else None
        if found is None and module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            found = getattr(torch, name)
        if found is None:
            raise pickle.UnpicklingError(f"its index names {module}.{name}, which is no part of an index")
        return found


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
