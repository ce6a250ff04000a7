"""The tensors of a sharded module, whole on rank 0, one at a time."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

__all__ = [
    "Gather",
]


class Gather:
    """Brings parts of tensors to rank 0, which asks for them by name; the other ranks answer until it has done.

    All goes by the default process group, since a rank that fails can interrupt that one for the others, and not the
    groups of a mesh.

    Args:
        module: sharded; every process has one.
    """

    def __init__(self, module: nn.Module) -> None:
        for each in module.modules():
            if isinstance(each, FSDPModule):
                each.reshard()
        self._state: dict[str, Any] = module.state_dict(keep_vars=True)

    def end(self) -> None:
        """On rank 0: nothing more is asked for. After a failure the others learn of that in another way."""
        _broadcast(None)

    def answer(self) -> None:
        """On the other ranks: send what rank 0 asks for until it has done."""
        while (name := _broadcast(None)) is not None:
            tensor = self._state[name]
            if isinstance(tensor, DTensor):
                dist.gather_object(_place(tensor))
                if _is_first_holder(tensor):
                    dist.send(_local(tensor), dst=0)

    def whole(self, name: str) -> Tensor:
        """On rank 0: an entry of the state dict, whole, on the CPU."""
        _broadcast(name)
        tensor = self._state[name]
        if not isinstance(tensor, DTensor):
            return cast("Tensor", tensor.detach().cpu().clone())
        places: list[Any] = [None] * dist.get_world_size()
        dist.gather_object(_place(tensor), places)
        local = _local(tensor)
        values = torch.empty(tensor.shape, dtype=tensor.dtype)
        for rank, (is_first, shape, offset) in enumerate(places):
            if not is_first:
                continue
            part = local
            if rank > 0:
                part = torch.empty(shape, dtype=tensor.dtype, device=local.device)
                dist.recv(part, src=rank)
            place = values
            for dim, (start, size) in enumerate(zip(offset, shape, strict=True)):
                place = place.narrow(dim, start, size)
            place.copy_(part)
        return values


def _broadcast(name: str | None) -> str | None:
    told = [name]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def _local(tensor: DTensor) -> Tensor:
    return tensor.to_local().detach().contiguous()


def _is_first_holder(tensor: DTensor) -> bool:
    """Whether this process is the first, by its coordinates in the mesh, that holds its part."""
    coordinates = tensor.device_mesh.get_coordinate()
    if coordinates is None or not tensor.to_local().numel():
        return False
    pairs = zip(coordinates, tensor.placements, strict=True)
    return not any(coordinate for coordinate, placement in pairs if placement.is_replicate())


def _place(tensor: DTensor) -> tuple[bool, tuple[int, ...], tuple[int, ...]]:
    """Whether this process sends its part, and the shape and offset of that in the whole tensor."""
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return _is_first_holder(tensor), tuple(shape), tuple(offset)
