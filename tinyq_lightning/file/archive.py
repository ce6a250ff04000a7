"""Files of ``torch.save``, opened without taking memory for their tensors, which are read one at a time.

``torch.load`` believes what a file says of itself: it allocates what a record claims, unpacks compressed
records, and reads every tensor. Here the directory of the zip file is checked against the size of the file
first, the pickle goes through torch's own weights-only unpickler, and tensors are read where they stand.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Callable
from typing import IO, Any

import fsspec
import torch

# torch.load's unpickler with weights_only=True, which no public function offers without its tensor reading
from torch import Tensor, _weights_only_unpickler

from tinyq_lightning.errors import CheckpointError

__all__ = [
    "Archive",
]

_LOCAL_HEADER = struct.Struct("<4s22xHH")


class Archive:
    """A file written by ``torch.save``: its content at once, its tensors on demand. A context manager.

    Args:
        path: local, or a URL that fsspec knows.
        weights_only: refuse whatever is not a tensor or plain data, and execute nothing, as
            ``torch.load(weights_only=True)`` does. Otherwise classes named in the file are imported.

    Attributes:
        content: what was saved, with the tensors on the meta device.

    Raises:
        CheckpointError: there is no such file, it is damaged or none of ``torch.save``, its records are
            compressed or claim more than the file holds, or it holds more than ``weights_only`` lets through.
    """

    def __init__(self, path: str | os.PathLike[str], weights_only: bool = True) -> None:
        self.path = os.fspath(path)
        self._storages: dict[int, tuple[torch.UntypedStorage, str, int]] = {}
        self._read_before: dict[str, torch.UntypedStorage] = {}
        try:
            fs, location = fsspec.core.url_to_fs(self.path)
            self._file: IO[bytes] = fs.open(location, "rb")
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.path}: there is no such file") from error
        except (OSError, ValueError, ImportError) as error:
            raise CheckpointError(f"{self.path}: it cannot be opened: {error}") from error
        try:
            self._records = _records(self._file)
            self.content = self._unpickle(weights_only)
        except CheckpointError as error:
            self._file.close()
            raise CheckpointError(f"{self.path}: {error}") from error
        except Exception as error:  # a damaged pickle raises whatever its reader stumbles over
            self._file.close()
            raise CheckpointError(f"{self.path}: the file is damaged: {type(error).__name__}: {error}") from error

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def read(self, tensor: Tensor) -> Tensor:
        """The values of one tensor of :attr:`content`, on the CPU.

        Args:
            tensor: from :attr:`content`, on the meta device.

        Returns:
            A tensor of the same dtype, shape and strides, with memory of its own.

        Raises:
            CheckpointError: the tensor claims more than the file holds.
        """
        return self._real(tensor, self._read_storage)

    def read_all(self, content: Any) -> Any:
        """``content``, or a part of it, with the values of every tensor in it; those that share memory still do.

        Raises:
            CheckpointError: a tensor claims more than the file holds.
        """
        return _with_tensors(content, lambda tensor: self._real(tensor, self._shared_storage), {})

    def _unpickle(self, weights_only: bool) -> Any:
        name = next((name for name in self._records if name.endswith("data.pkl") and name.count("/") <= 1), None)
        if name is None:
            raise CheckpointError("it is a zip file, but not one of torch.save")
        self._prefix = name.removesuffix("data.pkl")
        order = self._bytes(f"{self._prefix}byteorder") if f"{self._prefix}byteorder" in self._records else b"little"
        if order != sys.byteorder.encode():
            raise CheckpointError(
                f"its byte order is {order.decode(errors='replace')!r}, this machine's {sys.byteorder!r}"
            )
        stream = io.BytesIO(self._bytes(name))
        if not weights_only:
            return _TrustingUnpickler(stream, self._storage).load()
        unpickler = _weights_only_unpickler.Unpickler(stream, encoding="utf-8")
        unpickler.persistent_load = self._storage  # type: ignore[method-assign]
        try:
            return unpickler.load()  # type: ignore[no-untyped-call]
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            what = f": {named[1]}" if named else ""
            raise CheckpointError(f"it is damaged, or holds more than tensors and plain data{what}") from error

    def _bytes(self, record: str) -> bytes:
        offset, size = self._records[record]
        self._file.seek(offset)
        return self._file.read(size)

    def _storage(self, saved_id: Any) -> torch.storage.TypedStorage:
        """A storage on the meta device for what the pickle says of one; its record must be of that size."""
        _, kind, key, _, numel = saved_id
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        record = f"{self._prefix}data/{key}"
        if record not in self._records or self._records[record][1] != numel * dtype.itemsize:
            raise CheckpointError(f"the file is damaged: the record {record!r} is not of the size that its tensor has")
        storage = torch.UntypedStorage(numel * dtype.itemsize, device="meta")  # type: ignore[no-untyped-call]
        self._storages[storage._cdata] = (storage, record, numel * dtype.itemsize)
        return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]

    def _real(self, tensor: Tensor, read_storage: Callable[[str], torch.UntypedStorage]) -> Tensor:
        if type(tensor) is Tensor and tensor.layout == torch.sparse_coo:
            return self._real_sparse(tensor, read_storage)
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided and tensor.is_meta
        known = self._storages.get(tensor.untyped_storage()._cdata) if plain else None
        if known is None:
            raise CheckpointError(
                f"{self.path}: it holds a {tensor.layout} {type(tensor).__name__}, not a plain tensor"
            )
        _, record, size = known
        reach = tensor.storage_offset() + sum(
            (n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)
        )
        # what is expanded costs its full size as soon as it is used
        excess = tensor.numel() and ((reach + 1) * tensor.itemsize > size or tensor.nbytes > max(size, self._size))
        if excess:
            raise CheckpointError(
                f"{self.path}: a tensor of shape {list(tensor.shape)} claims more than the file holds"
            )
        values = torch.empty(0, dtype=tensor.dtype)
        return values.set_(read_storage(record), tensor.storage_offset(), tensor.size(), tensor.stride())

    def _real_sparse(self, tensor: Tensor, read_storage: Callable[[str], torch.UntypedStorage]) -> Tensor:
        indices, values = (self._real(part, read_storage) for part in (tensor._indices(), tensor._values()))
        try:
            return torch.sparse_coo_tensor(
                indices, values, tensor.shape, is_coalesced=tensor.is_coalesced(), check_invariants=True
            )
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{self.path}: a sparse tensor in it is damaged: {error}") from error

    @property
    def _size(self) -> int:
        return sum(size for _, size in self._records.values())

    def _read_storage(self, record: str) -> torch.UntypedStorage:
        offset, size = self._records[record]
        values = torch.empty(size, dtype=torch.uint8)
        self._file.seek(offset)
        view, done = values.numpy().data, 0
        while done < size and (count := self._file.readinto(view[done:])):  # type: ignore[attr-defined]
            done += count
        if done < size:
            raise CheckpointError(f"{self.path}: the file ends in the middle of {record!r}")
        return values.untyped_storage()

    def _shared_storage(self, record: str) -> torch.UntypedStorage:
        if record not in self._read_before:
            self._read_before[record] = self._read_storage(record)
        return self._read_before[record]


class _TrustingUnpickler(pickle.Unpickler):
    def __init__(self, stream: IO[bytes], storage: Callable[[Any], torch.storage.TypedStorage]) -> None:
        super().__init__(stream, encoding="utf-8")
        self._storage = storage

    def persistent_load(self, pid: Any) -> Any:
        return self._storage(pid)

    def find_class(self, module_name: str, global_name: str) -> Any:
        if module_name == "torch" and global_name.endswith("Storage") and global_name != "UntypedStorage":
            return torch.serialization.StorageType(global_name)  # type: ignore[no-untyped-call]
        return super().find_class(module_name, global_name)


def _records(file: IO[bytes]) -> dict[str, tuple[int, int]]:
    """Offset and size of every record, none of which can be larger than the file."""
    size = file.seek(0, os.SEEK_END)
    try:
        entries = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError) as error:
        raise CheckpointError("the file is truncated or damaged, or not one of torch.save") from error
    records: dict[str, tuple[int, int]] = {}
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise CheckpointError(f"the record {entry.filename!r} is compressed, which torch.save never does")
        file.seek(entry.header_offset)
        header = file.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04" or entry.filename in records:
            raise CheckpointError(f"the file is damaged: the record {entry.filename!r} is not where it should be")
        _, name, extra = _LOCAL_HEADER.unpack(header)
        records[entry.filename] = (entry.header_offset + _LOCAL_HEADER.size + name + extra, entry.file_size)
    if sum(length for _, length in records.values()) > size or any(sum(at) > size for at in records.values()):
        raise CheckpointError("the file is truncated or damaged: its records are larger than the file")
    return records


def _with_tensors(value: Any, real: Callable[[Tensor], Tensor], done: dict[int, tuple[Any, Any]]) -> Any:
    """``value`` with ``real(tensor)`` for each tensor in it; what occurs twice is one object still."""
    if id(value) in done:
        return done[id(value)][1]
    result = value
    if isinstance(value, Tensor):
        result = real(value)
        if isinstance(value, torch.nn.Parameter):
            result = torch.nn.Parameter(result, value.requires_grad)
    elif isinstance(value, dict | list):
        result = copy.copy(value)  # with the attributes that a state dict has
        done[id(value)] = value, result  # before what is in it, which may refer back
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            result[key] = _with_tensors(item, real, done)
    elif type(value) is tuple:
        result = tuple(_with_tensors(item, real, done) for item in value)
    done[id(value)] = value, result  # the value as well: its id is only its own while it lives
    return result
