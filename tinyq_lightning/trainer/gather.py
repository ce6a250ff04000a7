"""The tensors of a sharded module, whole on rank 0, one at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from tinyq_lightning.errors import TrainerError, quoted
from tinyq_lightning.plan import users_path

__all__ = [
    "Gather",
]


class Gather:
    """Brings parts of tensors to rank 0, which asks for them by name; the other ranks answer until it has done.

    All goes by the default process group, since a rank that fails can interrupt that one for the others, and not the
    groups of a mesh. Parts go by the device that this group has connections for, wherever they lie: NCCL sends none
    of a CPU, where FSDP2 may keep them, and gloo none of a GPU.

    Args:
        module: sharded; every process has one.
    """

    def __init__(self, module: nn.Module) -> None:
        for each in module.modules():
            if isinstance(each, FSDPModule):
                each.reshard()
        self._state: dict[str, Any] = {
            users_path(name): value for name, value in module.state_dict(keep_vars=True).items()
        }
        self._device = _link_device()

    def end(self) -> None:
        """On rank 0: nothing more is asked for."""
        _broadcast(None)

    def answer(self) -> None:
        """On the other ranks: send what rank 0 asks for until it has done.

        What fails here is told to rank 0, which raises it; the ranks go on with the same calls to one another.
        """
        while (name := _broadcast(None)) is not None:
            try:
                part = self._part(name)
            except Exception as error:  # rank 0 waits for an answer, whatever failed
                dist.gather_object(quoted(error))
                continue
            dist.gather_object(part[0])
            if part[0].is_sent:
                dist.send(part[1], dst=0)

    def whole(self, name: str) -> Tensor:
        """On rank 0: an entry of the state dict, whole, on the CPU.

        Raises:
            TrainerError: another rank could not give its part.
        """
        tensor = self._state[name]
        if not isinstance(tensor, DTensor):
            return cast("Tensor", tensor.detach().cpu().clone())
        values = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        own, local = self._part(name)
        buffer = torch.empty_like(local)
        _broadcast(name)  # not earlier: the others wait for what follows
        places: list[Any] = [None] * dist.get_world_size()
        dist.gather_object(own, places)
        for rank, place in enumerate(places):
            if isinstance(place, _Place) and place.is_sent:
                place.put(local if rank == 0 else _received(place, rank, buffer), values)
        if failed := [f"rank {rank}: {place}" for rank, place in enumerate(places) if isinstance(place, str)]:
            raise TrainerError(f"{name} could not be gathered: {'; '.join(failed)}")
        return values

    def _part(self, name: str) -> tuple[_Place, Tensor]:
        """The part of a split tensor that this process holds, and its place."""
        tensor = self._state[name]
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        place = _Place(_is_first_holder(tensor), tuple(shape), tuple(offset))
        return place, tensor.to_local().detach().to(self._device).contiguous()


@dataclass(frozen=True)
class _Place:
    """Of a process's part in a whole tensor.

    Attributes:
        is_sent: whether this process sends it: it is not empty, and no earlier process holds it too.
        shape: of the part.
        offset: of its first value in the whole tensor, by dimension.
    """

    is_sent: bool
    shape: tuple[int, ...]
    offset: tuple[int, ...]

    def put(self, part: Tensor, whole: Tensor) -> None:
        """Copy the part to its place."""
        for dim, (start, size) in enumerate(zip(self.offset, self.shape, strict=True)):
            whole = whole.narrow(dim, start, size)
        whole.copy_(part)


def _link_device() -> torch.device:
    """Where the default process group takes tensors from: the CPU, unless its backend is for GPUs alone."""
    kinds = {device.type for device in cast("dist.ProcessGroup", dist.group.WORLD)._device_types}
    return torch.device("cpu" if "cpu" in kinds else min(kinds))


def _received(place: _Place, rank: int, buffer: Tensor) -> Tensor:
    """The part that a rank sends, in ``buffer`` if that has its shape: nothing can fail then."""
    part = buffer if tuple(buffer.shape) == place.shape else buffer.new_empty(place.shape)
    dist.recv(part, src=rank)
    return part


def _broadcast(name: str | None) -> str | None:
    told = [name]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def _is_first_holder(tensor: DTensor) -> bool:
    """Whether this process is the first, by its coordinates in the mesh, that holds its part."""
    coordinates = tensor.device_mesh.get_coordinate()
    if coordinates is None or not tensor.to_local().numel():
        return False
    pairs = zip(coordinates, tensor.placements, strict=True)
    return not any(coordinate for coordinate, placement in pairs if placement.is_replicate())
