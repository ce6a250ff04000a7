"""What is promised of reading: damaged and hostile files are refused by name, before they cost anything."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from lightnings import LightningModule
from models import Net, loader, trainer
from torch import nn

from tinyq_lightning import QuantizedCheckpointMixin, TinyQCallback, TinyQError, load_quantized
from tinyq_lightning.errors import CheckpointError
from tinyq_lightning.file.archive import Archive
from tinyq_lightning.file.checkpoint import read_checkpoint
from tinyq_lightning.file.digest import digest_of

# of tests/data/format-*.ckpt, as each was when it was written: output and digest of its state
WRITTEN = {
    "format-1": (
        [[0.17648868, -0.06522252, -0.01775025], [0.32393196, 0.05737285, -0.11800747]],
        "b4beac97087c2234cf6677ba5927a6f67f2534c79af3c259e4f858b28eafe3ca",
    ),
    "format-2": (
        [[0.07252203, 0.05078526, -0.09895740], [0.02866781, 0.08039744, -0.12263519]],
        "64cbd169a205f9b2058edd2d8625f57cfba8ff657b8316f790767b079690d90c",
    ),
}
DATA = Path(__file__).parents[1] / "data"


def damaged(data: bytes, random: random.Random) -> bytes:
    """Cut short, one bit flipped, a few bytes overwritten, or a block of zeros, as failing disks leave."""
    kind = random.choice(["cut", "bit", "bit", "bytes", "zeros"])
    if kind == "cut":
        return data[: random.randrange(len(data))]
    place, changed = random.randrange(len(data)), bytearray(data)
    if kind == "bit":
        changed[place] ^= 1 << random.randrange(8)
    else:
        length = random.randint(1, 4) if kind == "bytes" else 512
        new = random.randbytes(length) if kind == "bytes" else bytes(length)
        changed[place : place + length] = new[: len(data) - place]
    return bytes(changed)


def outcomes(path: Path, count: int, seed: int) -> list[str]:
    """``refused``, ``equal`` or what went wrong, for ``count`` damaged copies of a file."""
    data, random_ = path.read_bytes(), random.Random(seed)
    wanted = read_checkpoint(path)["state_dict"]
    victim, found = path.with_name("victim.ckpt"), []
    for _ in range(count):
        victim.write_bytes(damaged(data, random_))
        try:
            state = read_checkpoint(victim)["state_dict"]
            same = state.keys() == wanted.keys() and all(torch.equal(state[name], wanted[name]) for name in wanted)
            found.append("equal" if same else "OTHER WEIGHTS")
        except TinyQError as error:
            found.append("refused" if str(victim) in str(error) else f"NO NAME: {error}")
    return found


def test_a_damaged_file_loads_bit_equal_or_is_refused_by_name(fitted):
    found = outcomes(Path(fitted[0].quantized_path), 300, seed=0)
    assert set(found) == {"refused", "equal"}


@pytest.mark.slow
def test_none_of_a_thousand_damaged_files_loads_with_other_weights(fitted):
    found = outcomes(Path(fitted[0].quantized_path), 1000, seed=1)
    assert set(found) == {"refused", "equal"}


def test_a_weight_changed_in_the_file_is_refused_by_every_door(fitted, tmp_path):
    class MixedIn(QuantizedCheckpointMixin, Net):
        pass

    callback, _, _ = fitted
    content = torch.load(callback.quantized_path, weights_only=True)
    content["state_dict"]["head.int8_weights"][0, 0] += 1
    path = tmp_path / "changed.ckpt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"changed\.ckpt: the file is damaged: state_dict differs"):
        load_quantized(path, Net)
    with pytest.raises(CheckpointError, match="state_dict differs"):
        MixedIn.load_from_checkpoint(path, weights_only=True)
    run = trainer(tmp_path, TinyQCallback("w8a32", report=False))
    with pytest.raises(CheckpointError, match=r"changed\.ckpt: the file is damaged: state_dict differs"):
        run.test(Net(), loader(), ckpt_path=str(path), verbose=False, weights_only=True)


@pytest.mark.parametrize("key", ["hyper_parameters", "epoch", "tinyq"])
def test_what_is_not_a_tensor_is_covered_as_well(fitted, tmp_path, key):
    content = torch.load(fitted[0].quantized_path, weights_only=True)
    if key == "epoch":
        content[key] += 1
    else:
        content[key]["label" if key == "tinyq" else "width"] = "another"
    torch.save(content, tmp_path / "changed.ckpt")
    with pytest.raises(CheckpointError, match=f"damaged: {key} differs from what was written"):
        read_checkpoint(tmp_path / "changed.ckpt")


class Evil:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_hostile_pickle_executes_nothing_and_is_named(fitted, tmp_path):
    content = torch.load(fitted[0].quantized_path, weights_only=True)
    content["hyper_parameters"]["width"] = Evil(tmp_path / "executed")
    torch.save(content, tmp_path / "evil.ckpt")
    with pytest.raises(CheckpointError, match=r"evil\.ckpt: it is damaged, or holds more than .*: posix\.system"):
        load_quantized(tmp_path / "evil.ckpt", Net)
    assert not (tmp_path / "executed").exists()


def test_a_stored_class_path_imports_nothing(fitted, tmp_path):
    (tmp_path / "planted.py").write_text("raise SystemExit('imported')")
    content = torch.load(fitted[0].quantized_path, weights_only=True)
    stored = {"_class_path": "planted.Net", "_instantiator": "lightning.pytorch.cli.instantiate_module"}
    content["hyper_parameters"] |= stored
    content["tinyq"]["digests"]["hyper_parameters"] = digest_of(content["hyper_parameters"])
    torch.save(content, tmp_path / "planted.ckpt")
    with pytest.raises(
        CheckpointError, match=r"made from planted\.Net, and Net was given: give that class, or pass trust=True"
    ):
        load_quantized(tmp_path / "planted.ckpt", Net)


def rewritten(path: Path, target: Path, change) -> Path:
    """A copy of a zip file, each record through ``change(name, data) -> (data, compression)``."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            data, compression = change(entry.filename, old.read(entry))
            new.writestr(entry.filename, data, compression)
    return target


def test_compressed_and_oversized_records_are_refused(fitted, tmp_path):
    path = Path(fitted[0].quantized_path)
    bomb = rewritten(path, tmp_path / "bomb.ckpt", lambda name, data: (bytes(10**8), zipfile.ZIP_DEFLATED))
    assert bomb.stat().st_size < 5e6
    with pytest.raises(CheckpointError, match=r"bomb\.ckpt: the record .* is compressed"):
        read_checkpoint(bomb)
    short = rewritten(path, tmp_path / "short.ckpt", lambda name, data: (data[:5] if "/data/" in name else data, 0))
    with pytest.raises(CheckpointError, match=r"short\.ckpt: the file is damaged: the record .* not of the size"):
        read_checkpoint(short)
    data = bytearray(path.read_bytes())
    place = data.index(b"PK\x01\x02")
    data[place + 20 : place + 28] = struct.pack("<II", 0x7FFFFFFF, 0x7FFFFFFF)  # sizes in the directory
    (tmp_path / "big.ckpt").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"big\.ckpt: the file is truncated or damaged: its records are larger"):
        read_checkpoint(tmp_path / "big.ckpt")


HOSTILE = """
import resource, sys
from tinyq_lightning.file.archive import Archive
from tinyq_lightning.file.checkpoint import read_checkpoint
from tinyq_lightning.errors import CheckpointError

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        read_checkpoint(path)
        print("READ", path)
    except CheckpointError as error:
        print("refused", error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_absurd_shapes_and_nested_containers_take_no_memory(fitted, tmp_path):
    content = torch.load(fitted[0].quantized_path, weights_only=True)
    nested: tuple = ("ha",) * 10
    for _ in range(40):  # 10⁴¹ items, were each looked at
        nested = (nested,) * 10
    endless: list = []
    endless.append(endless)
    deep: list = []
    for _ in range(300):
        deep = [deep]
    expanded = {**content["state_dict"], "head.scales": torch.ones(1).expand(10**6, 10**5)}
    for name, change in {
        "expanded": {"state_dict": expanded},
        "nested": {"more": nested},
        "endless": {"more": endless},
        "deep": {"more": deep},
    }.items():
        torch.save(content | change, tmp_path / f"{name}.ckpt")
    files = [str(tmp_path / f"{name}.ckpt") for name in ("expanded", "nested", "endless", "deep")]
    run = subprocess.run([sys.executable, "-c", HOSTILE, *files], capture_output=True, text=True, check=True)
    *lines, kilobytes = run.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"refused {path}" for path in files]
    assert int(kilobytes) < 100_000


def test_files_of_other_kinds_are_refused_by_name(tmp_path):
    def legacy(path):
        torch.save({"state_dict": {}}, path, _use_new_zipfile_serialization=False)

    def zipped(path):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a.txt", "text")

    for name, write in {
        "empty": lambda path: path.write_bytes(b""),
        "text": lambda path: path.write_text("not a checkpoint"),
        "pickle": lambda path: path.write_bytes(pickle.dumps({"state_dict": {}})),
        "folder": lambda path: path.mkdir(),
        "legacy": legacy,
        "zipped": zipped,
        "list": lambda path: torch.save([1, 2], path),
        "weights": lambda path: torch.save(nn.Linear(2, 2).state_dict(), path),
        "odd": lambda path: torch.save({"tinyq": {"format_version": 1, "plan": [3]}, "state_dict": []}, path),
    }.items():
        write(tmp_path / name)
        with pytest.raises(CheckpointError, match=f"{name}: "):
            load_quantized(tmp_path / name, Net)


def test_a_newer_format_is_refused_by_its_number(fitted, tmp_path):
    content = torch.load(fitted[0].quantized_path, weights_only=True)
    content["tinyq"]["format_version"] = 7
    torch.save(content, tmp_path / "newer.ckpt")
    with pytest.raises(CheckpointError, match=r"newer\.ckpt: format version 7 is newer than 2.*upgrade"):
        load_quantized(tmp_path / "newer.ckpt", Net)


class Small(LightningModule):
    """What tests/data/*.ckpt were made from."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.save_hyperparameters()
        self.body, self.head = nn.Linear(4, width), nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.body(x).relu())


@pytest.mark.parametrize("path", sorted(DATA.glob("format-*.ckpt")), ids=lambda path: path.stem)
def test_files_of_every_format_version_are_read_for_ever(path):
    module = load_quantized(path, Small)
    output = module(torch.arange(8.0).reshape(2, 4) / 8)
    written, digest = WRITTEN[path.stem]
    assert torch.allclose(output, torch.tensor(written), atol=1e-6)
    assert digest_of(dict(module.state_dict())) == digest


def test_an_archive_reads_what_torch_saves(tmp_path):
    base = torch.arange(12, dtype=torch.float64)
    saved = {
        "view": base[3:9].reshape(2, 3).t(),
        "same": base,
        "parameter": nn.Parameter(torch.ones(2, dtype=torch.bfloat16), requires_grad=False),
        "dtypes": [
            torch.tensor([1, 2], dtype=kind) for kind in (torch.int8, torch.uint16, torch.complex64, torch.bool)
        ],
        "empty": (torch.empty(0, 3), torch.tensor(2.5)),
        "plain": {"a": [1, None, True, b"x", {3}], 2: 1j},
    }
    torch.save(saved, tmp_path / "saved.pt")
    with Archive(tmp_path / "saved.pt") as archive:
        read = archive.read_all(archive.content)
        again = archive.read_all(archive.content)
        one = archive.read(archive.content["view"])
    for content in (read, again):
        assert digest_of(content) == digest_of({**saved, "parameter": content["parameter"]})
        assert content["view"].untyped_storage()._cdata == content["same"].untyped_storage()._cdata
        assert isinstance(content["parameter"], nn.Parameter)
    assert torch.equal(one, saved["view"])


def test_reading_changes_nothing_for_torch(fitted):
    """The file is one of torch.save: what torch.load reads is what this package reads."""
    path = fitted[0].quantized_path
    theirs = torch.load(io.BytesIO(Path(path).read_bytes()), weights_only=True)
    assert digest_of(read_checkpoint(path)["state_dict"]) == digest_of(theirs["state_dict"])


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")  # as torch 2.14 says of its own loading
def test_a_file_with_sparse_tensors_leaves_nothing_for_the_next_torch_load(tmp_path):
    torch.save({"adjacency": torch.eye(4).to_sparse()}, tmp_path / "sparse.ckpt")
    torch.save({"adjacency": torch.eye(3).to_sparse()}, tmp_path / "other.ckpt")
    with Archive(tmp_path / "sparse.ckpt") as archive:
        assert archive.content["adjacency"].is_meta
        with torch.sparse.check_sparse_tensor_invariants():  # as torch 2.7 always does
            other = torch.load(tmp_path / "other.ckpt", weights_only=True)
    assert torch.equal(other["adjacency"].to_dense(), torch.eye(3))
