"""Reads files of ``torch.save``: the structure at once, each tensor only when it is asked for.

The zip directory is checked against the size of the file first, the pickle goes through torch's own
weights-only unpickler, and each tensor is read from its place in the file.

Why this is not ``torch.load(path, mmap=True, weights_only=True)``, measured with torch 2.13:

* Memory is equal or better there. Opening a file of 500 MB takes no anonymous memory (RssAnon) in either
  way. Reading one tensor after the other takes at most one tensor here (98 MB of RssAnon, freed again); with
  mmap it takes no RssAnon, but the pages that were read stay mapped (480 MB of RssFile).
* The refusals are worse there. A compressed ``data.pkl`` is unpacked (a small file that unpacks to 400 MB took
  1.1 GB), a tensor of one value expanded to ``[10**9, 1000]`` is accepted, and damaged files raise OSError or
  RuntimeError without the name of the file or of the record.
* It reads local files only: a path such as ``s3://…`` or ``memory://…`` is not found, and open files are refused.
* The module would stay mapped to the file: a later change of the file in place changes or kills the process.

Why modules do not take their weights by ``load_state_dict(assign=True)`` (see ``weightless``): it puts new
parameters into the module. Tied weights come apart, and what else refers to a parameter (a list, the weak
references of ``nn.LSTM``) keeps one on the meta device.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import IO, Any, cast

import fsspec
import torch

# the unpickler of torch.load(weights_only=True): no public function offers it without reading all tensors
from torch import Tensor, _weights_only_unpickler

from tinyq_lightning.errors import CheckpointError, quoted
from tinyq_lightning.file.tensor_kind import kind_of_tensor, with_kind

__all__ = [
    "Archive",
    "with_tensors",
]

_LOCAL_HEADER = struct.Struct("<4s22xHH")


class Archive:
    """An open file that ``torch.save`` wrote. Use it as a context manager.

    Args:
        path: a local path, a URL that fsspec can open, or an open file, which stays open.
        trust: import and call the classes that the file names. If False, the file may hold tensors and plain
            data only, as with ``torch.load(weights_only=True)``.

    Attributes:
        content: the saved object, with its tensors on the meta device.

    Raises:
        CheckpointError: the file does not exist, is damaged, is not from ``torch.save``, has compressed records
            or records larger than the file, or holds objects and ``trust`` is False.
    """

    def __init__(self, path: str | os.PathLike[str] | IO[bytes], trust: bool = False) -> None:
        if path is None:
            raise CheckpointError(
                "there is no path to a file, but None: TinyQCallback.quantized_path is None where no file was written, "
                "and TinyQCallback.error says why"
            )
        is_open = hasattr(path, "read")
        self.path = str(getattr(path, "name", "the file")) if is_open else os.fspath(cast("str", path))
        self._storages: dict[int, tuple[torch.UntypedStorage, str, int]] = {}
        self._shared: dict[str, torch.UntypedStorage] = {}
        try:
            self._file: IO[bytes] = cast("IO[bytes]", path) if is_open else _opened(self.path)
            self._close: Callable[[], object] = partial(self._file.seek, 0) if is_open else self._file.close
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.path}: there is no such file") from error
        except (OSError, ValueError, ImportError) as error:
            raise CheckpointError(f"{self.path}: it cannot be opened: {error}") from error
        try:
            self._records = _records(self._file)
            with _unnoticed_by_torch_load():
                self.content = self._unpickle(trust)
        except CheckpointError as error:
            self._close()
            raise CheckpointError(f"{self.path}: {error}") from error
        except Exception as error:  # unpickling damaged bytes can raise any exception
            self._close()
            raise CheckpointError(f"{self.path}: the file is damaged: {quoted(error)}") from error

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def read(self, tensor: Tensor) -> Tensor:
        """Read one tensor.

        Args:
            tensor: one of :attr:`content`, on the meta device.

        Returns:
            A CPU tensor of the same dtype, shape and strides, which shares memory with no other.

        Raises:
            CheckpointError: the tensor claims more than the file holds.
        """
        return self._with_values(tensor, self._read_storage)

    def read_all(self, content: Any) -> Any:
        """Read every tensor of ``content``, which is :attr:`content` or a part of it.

        Returns:
            A copy of ``content`` with CPU tensors. Tensors that shared memory when they were saved share it again.

        Raises:
            CheckpointError: a tensor claims more than the file holds, or containers are nested too deeply.
        """
        try:
            return with_tensors(content, lambda tensor: self._with_values(tensor, self._shared_storage), {})
        except RecursionError as error:
            raise CheckpointError(f"{self.path}: the file is damaged: its containers are nested too deeply") from error

    def _unpickle(self, trust: bool) -> Any:
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
        if trust:
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
        """Return a meta storage of the size that the pickle gives; the record must have the same size."""
        _, kind, key, _, numel = saved_id
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        record = f"{self._prefix}data/{key}"
        if record not in self._records or self._records[record][1] != numel * dtype.itemsize:
            raise CheckpointError(f"the file is damaged: the record {record!r} is not of the size that its tensor has")
        storage = torch.UntypedStorage(numel * dtype.itemsize, device="meta")  # type: ignore[no-untyped-call]
        self._storages[storage._cdata] = (storage, record, numel * dtype.itemsize)
        return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]

    def _with_values(self, tensor: Tensor, read_storage: Callable[[str], torch.UntypedStorage]) -> Tensor:
        if type(tensor) is Tensor and tensor.layout == torch.sparse_coo:
            return self._sparse_with_values(tensor, read_storage)
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
        # an expanded tensor takes its full size in memory as soon as it is used
        excess = tensor.numel() and ((reach + 1) * tensor.itemsize > size or tensor.nbytes > max(size, self._size))
        if excess:
            raise CheckpointError(
                f"{self.path}: a tensor of shape {list(tensor.shape)} claims more than the file holds"
            )
        values = torch.empty(0, dtype=tensor.dtype)
        return values.set_(read_storage(record), tensor.storage_offset(), tensor.size(), tensor.stride())

    def _sparse_with_values(self, tensor: Tensor, read_storage: Callable[[str], torch.UntypedStorage]) -> Tensor:
        indices, values = (self._with_values(part, read_storage) for part in (tensor._indices(), tensor._values()))
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
        if record not in self._shared:
            self._shared[record] = self._read_storage(record)
        return self._shared[record]


@contextmanager
def _unnoticed_by_torch_load() -> Iterator[None]:
    """Put back torch's list of the sparse tensors that were unpickled.

    ``torch.load`` checks the values of all in it at its end. Those of an archive have none, so that the next
    ``torch.load`` of anybody would fail.
    """
    waiting: list[Tensor] = getattr(torch._utils, "_sparse_tensors_to_validate", [])
    before = list(waiting)
    try:
        yield
    finally:
        waiting[:] = before


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


def _opened(path: str) -> IO[bytes]:
    fs, location = fsspec.core.url_to_fs(path)
    return cast("IO[bytes]", fs.open(location, "rb"))


def _records(file: IO[bytes]) -> dict[str, tuple[int, int]]:
    """Offset and size of each record. Raises CheckpointError if they cannot all lie in the file."""
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


def with_tensors(value: Any, read: Callable[[Tensor], Tensor], done: dict[int, tuple[Any, Any]]) -> Any:
    """Copy ``value`` with ``read(tensor)`` for each tensor. An object that occurs twice stays one object."""
    if id(value) in done:
        return done[id(value)][1]
    result = value
    if isinstance(value, Tensor):
        kind, result = kind_of_tensor(value), read(value)
        result = with_kind(result, kind) if kind else result
    elif isinstance(value, dict | list):
        result = copy.copy(value)  # keeps attributes, such as _metadata of a state dict
        done[id(value)] = value, result  # before the items, because an item may refer to its container
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            result[key] = with_tensors(item, read, done)
    elif type(value) is tuple:
        result = tuple(with_tensors(item, read, done) for item in value)
    done[id(value)] = value, result  # also keeps value alive, so that its id stays unique
    return result
