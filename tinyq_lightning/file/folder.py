"""Reads the folders that ``torch.distributed.checkpoint`` writes: Lightning's float checkpoints of sharded models.

Each rank has written its shards to one file. ``.metadata`` says which part of which tensor lies where, and ``meta.pt``
holds what else Lightning saves. No process group is needed to read them, and a tensor is read when it is asked for.
"""

from __future__ import annotations

import io
import os
import pickle
from collections import OrderedDict
from typing import IO, Any, cast

import fsspec
import torch
from torch import Tensor

from tinyq_lightning.errors import CheckpointError, quoted
from tinyq_lightning.file.archive import Archive, with_tensors

__all__ = [
    "Folder",
    "is_folder",
    "open_checkpoint",
]

_TORCH = "torch.distributed.checkpoint"
_RECORDS: dict[str, set[str]] = {
    f"{_TORCH}.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    f"{_TORCH}.filesystem": {"_StorageInfo"},
}
"""The classes that ``.metadata`` may name. It is a pickle, which could call and change whatever it names, so that each
file gets classes of its own in their place."""

_LAYOUTS = {str(each): each for each in vars(torch).values() if isinstance(each, torch.layout)}

_STATES = ("state_dict", "model")
"""The entries that hold a model's state: of ModelParallelStrategy, and of FSDPStrategy."""


def is_folder(path: object) -> bool:
    """Whether there is a folder at a local path or a URL."""
    if not isinstance(path, str | os.PathLike):
        return False
    fs, location = fsspec.core.url_to_fs(os.fspath(path))
    return bool(fs.isdir(location))


def open_checkpoint(path: Any, trust: bool = False) -> Archive | Folder:
    """A checkpoint to read tensor by tensor, be it a file of ``torch.save`` or a folder.

    Raises:
        CheckpointError: as :class:`~tinyq_lightning.file.archive.Archive`, or as :class:`Folder`.
    """
    return Folder(path, trust) if is_folder(path) else Archive(path, trust)


class Folder:
    """An open folder of a distributed checkpoint; the interface is that of ``Archive``. Use it as a context manager.

    Args:
        path: a local folder, or a URL that fsspec can open.
        trust: import and call the classes that ``meta.pt`` names. What ``.metadata`` and the shards name is never
            imported.

    Attributes:
        path: the folder.
        content: what a checkpoint file holds, with the tensors on the meta device.

    Raises:
        CheckpointError: the folder is no such checkpoint, is damaged, or holds objects and ``trust`` is False.
    """

    def __init__(self, path: str | os.PathLike[str], trust: bool = False) -> None:
        self.path = os.fspath(path).rstrip("/")
        self._fs, self._location = fsspec.core.url_to_fs(self.path)
        if not self._fs.isfile(f"{self._location}/.metadata"):
            raise CheckpointError(
                f"{self.path}: this folder is no checkpoint of torch.distributed.checkpoint: it has no file .metadata. "
                "A folder of DeepSpeed is made into one file by Lightning's convert_zero_checkpoint_to_fp32_state_dict"
            )
        if not self._fs.isfile(f"{self._location}/meta.pt"):
            raise CheckpointError(f"{self.path}: it has no file meta.pt: was it written by Lightning?")
        try:
            self._entries = self._read_metadata()
        except CheckpointError:
            raise
        except Exception as error:  # unpickling damaged bytes can raise any exception
            raise self._damaged(f".metadata cannot be read: {quoted(error)}") from error
        self._rest = Archive(f"{self.path}/meta.pt", trust)
        state = {name: tensor for name, tensor, _ in self._entries.values()}
        self.content: Any = {**self._rest.content, "state_dict": state}

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *exception: object) -> None:
        self._rest.__exit__(*exception)

    def read(self, tensor: Tensor) -> Tensor:
        """Read one tensor.

        Args:
            tensor: one of :attr:`content`, on the meta device.

        Returns:
            A contiguous CPU tensor of the same dtype and shape.

        Raises:
            CheckpointError: the shards do not hold what ``.metadata`` promises.
        """
        if id(tensor) not in self._entries:
            return self._rest.read(tensor)
        name, _, parts = self._entries[id(tensor)]
        held = sum(length for *_, length in parts)
        if tensor.nbytes > held or sum(sizes.numel() for _, sizes, *_ in parts) != tensor.numel():
            raise self._damaged(f"the shards do not make up {name}")
        values = torch.empty(tensor.shape, dtype=tensor.dtype)
        for offsets, sizes, file, offset, length in parts:
            try:
                place = values
                for dim, (start, size) in enumerate(zip(offsets, sizes, strict=True)):
                    place = place.narrow(dim, start, size)
                place.copy_(self._read_part(name, file, offset, length, place))
            except (OSError, RuntimeError, ValueError) as error:
                raise self._damaged(f"the part of {name} in {file} cannot be read: {error}") from error
        return values

    def read_all(self, content: Any) -> Any:
        """Read every tensor of ``content``, which is :attr:`content` or a part of it."""
        return with_tensors(content, self.read, {})

    def _read_part(self, name: str, file: str, offset: int, length: int, like: Tensor) -> Tensor:
        with self._fs.open(f"{self._location}/{file}", "rb") as opened:
            part = Archive(cast("IO[bytes]", _Window(opened, offset, length)))
            found = part.content
            if not isinstance(found, Tensor) or found.shape != like.shape or found.dtype != like.dtype:
                raise self._damaged(f"{file} does not hold the part of {name} that .metadata promises")
            return part.read(found)

    def _read_metadata(self) -> dict[int, tuple[str, Tensor, list[_Part]]]:
        """By the id of the meta tensor: its name in the state dict, the tensor itself, and where its parts lie."""
        with self._fs.open(f"{self._location}/.metadata", "rb") as file:
            metadata = _MetadataUnpickler(file, self.path).load()
        tensors = {}
        for key, stored in metadata.state_dict_metadata.items():
            way = (metadata.planner_data or {}).get(key, ())
            if len(way) != 2 or way[0] not in _STATES or not hasattr(stored, "chunks"):
                continue
            if stored.properties.layout != torch.strided:
                raise CheckpointError(f"{self.path}: {way[1]} is {stored.properties.layout}, not a plain tensor")
            tensors[key] = way[1], torch.empty(stored.size, dtype=stored.properties.dtype, device="meta")
        sizes = {
            (key, tuple(chunk.offsets)): torch.Size(chunk.sizes)
            for key in tensors
            for chunk in metadata.state_dict_metadata[key].chunks
        }
        parts: dict[str, list[_Part]] = {key: [] for key in tensors}
        for index, info in metadata.storage_data.items():
            if index.fqn in tensors:
                if getattr(info, "transform_descriptors", None):
                    raise CheckpointError(f"{self.path}: {index.fqn} is compressed, which is not read: save it plain")
                if os.path.basename(info.relative_path) != info.relative_path:
                    raise self._damaged(f"it names the file {info.relative_path!r} outside of the folder")
                offsets = tuple(index.offset)
                where = info.relative_path, int(info.offset), int(info.length)
                parts[index.fqn].append((offsets, sizes[index.fqn, offsets], *where))
        if not tensors:
            raise CheckpointError(f"{self.path}: it holds no state of a model")
        return {id(tensor): (name, tensor, parts[key]) for key, (name, tensor) in tensors.items()}

    def _damaged(self, how: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: the checkpoint is damaged: {how}")


_Part = tuple[tuple[int, ...], torch.Size, str, int, int]
"""Offsets and sizes of a part of a tensor, the file it lies in, and the offset and length there in bytes."""


class _MetadataUnpickler(pickle.Unpickler):
    """Reads ``.metadata`` into records of its own, because a pickle can set attributes of the classes it names."""

    def __init__(self, file: IO[bytes], path: str) -> None:
        super().__init__(file)
        self._path = path
        self._records: dict[str, type] = {}

    def find_class(self, module_name: str, global_name: str) -> Any:
        is_path = module_name.partition(".")[0] == "pathlib"  # of the folder it was written to
        if is_path or global_name in _RECORDS.get(module_name, ()):
            return self._records.setdefault(global_name, type(global_name, (_Record,), {}))
        if (module_name, global_name) == ("torch.serialization", "_get_layout"):
            return _LAYOUTS.get
        if (module_name, global_name) == ("collections", "OrderedDict"):
            return OrderedDict
        found = vars(torch).get(global_name) if module_name == "torch" else None
        if found is torch.Size or isinstance(found, torch.dtype):
            return found
        raise CheckpointError(f"{self._path}: .metadata names {module_name}.{global_name}, which no checkpoint needs")


class _Record:
    """The attributes of an object in ``.metadata``."""

    def __init__(self, *parts: object) -> None: ...

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            vars(self).update(state)
        else:  # the properties of a tensor, which begin with these
            self.dtype, self.layout, *_ = state


class _Window(io.RawIOBase):
    """A part of an open file, as a file."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._place = file, offset, length, 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        """As of a file."""
        self._place = place + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._length}[whence]
        return self._place

    def tell(self) -> int:
        """As of a file."""
        return self._place

    def readinto(self, buffer: Any) -> int:
        """As of a file."""
        view = memoryview(buffer).cast("B")
        self._file.seek(self._offset + self._place)
        data = self._file.read(min(len(view), max(0, self._length - self._place)))
        view[: len(data)] = data
        self._place += len(data)
        return len(data)
