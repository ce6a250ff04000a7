"""What is promised of writing: whatever happens meanwhile, there is the former file or the new one."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
import torch
from models import Net

from tinyq_lightning import quantize
from tinyq_lightning.errors import CheckpointError
from tinyq_lightning.file import durable
from tinyq_lightning.file.checkpoint import make_checkpoint, read_checkpoint, write_checkpoint
from tinyq_lightning.file.durable import replace_file

SCRIPTS = Path(__file__).parents[1] / "scripts"


def content(float_sha256="0" * 64, epoch=0, width=16):
    module = Net(width)
    plan = quantize(module)
    base = {"epoch": epoch, "global_step": 1, "pytorch-lightning_version": "2.6.6"}
    return make_checkpoint(base, module.state_dict(), plan, {}, float_sha256, None)


def kill(folder, count):
    command = [sys.executable, str(SCRIPTS / "kill_while_saving.py"), str(folder), str(count)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def check_kills(lines, count):
    assert sum(line in ("whole 0", "whole 1") for line in lines) == count, lines
    assert lines.count("hidden") == count, lines
    assert max(int(line.split()[0]) for line in lines if line.endswith("left")) <= 1, "the next run clears what is left"
    assert lines[-1] == "at the end: w8a32-best.ckpt"


def test_a_kill_at_any_moment_leaves_the_former_file_or_the_new_one(tmp_path):
    check_kills(kill(tmp_path, 12), 12)


@pytest.mark.slow
def test_none_of_a_hundred_kills_leaves_a_half_file(tmp_path):
    check_kills(kill(tmp_path, 100), 100)


FULL = """
import resource, sys
from tests_content import content
from tinyq_lightning.file.checkpoint import write_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
write_checkpoint(content(epoch=1), sys.argv[1])
"""


def test_a_full_disk_leaves_the_former_file(tmp_path):
    path = tmp_path / "q.ckpt"
    write_checkpoint(content(), path)
    before = path.read_bytes()
    script = tmp_path / "run.py"
    script.write_text(FULL.replace("tests_content", Path(__file__).stem))
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run([sys.executable, script, path], capture_output=True, text=True, env=environment)
    assert run.returncode == 1
    assert "CheckpointError" in run.stderr.splitlines()[-1]
    assert f"could not be written: [Errno {errno.EFBIG}] File too large" in run.stderr.splitlines()[-1]
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["q.ckpt", "run.py"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_folder_that_takes_no_files_is_named_not_the_temporary_file_in_it():
    with pytest.raises(CheckpointError) as caught:
        write_checkpoint(content(), "/proc/q.ckpt")
    assert str(caught.value) == "/proc/q.ckpt: the file could not be written: /proc takes no file: " + os.strerror(
        errno.ENOENT
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX permissions")
def test_a_read_only_folder_leaves_everything(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "q.ckpt"
    write_checkpoint(content(), path)
    before = path.read_bytes()
    for each in (folder, *folder.parents):  # so that another user comes this far
        if each.stat().st_uid == os.getuid() and each != Path("/tmp"):
            each.chmod(0o555 if each == folder else 0o755)
    new = content(epoch=1)
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setuid(65534)  # permissions do not hold for root
            write_checkpoint(new, path)
        except CheckpointError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    folder.chmod(0o755)
    assert path.read_bytes() == before
    assert os.listdir(folder) == ["q.ckpt"]


def test_what_a_killed_process_left_is_cleared_and_what_a_living_one_writes_is_not(tmp_path):
    leftover = tmp_path / ".0123456789ab.tinyq-tmp"
    leftover.write_bytes(b"half")

    def write_outer(file):
        file.write(b"outer")
        replace_file(tmp_path / "inner", lambda inner: [inner.write(b"inner"), None][1])
        assert Path(file.name).exists()

    replace_file(tmp_path / "outer", write_outer)
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == {"inner": b"inner", "outer": b"outer"}


def without_locks(monkeypatch, number):
    """As on a network file system that has no locks."""

    def flock(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(durable.fcntl, "flock", flock)


LEAVES = """
import os, sys
from tinyq_lightning.file.durable import replace_file
replace_file(sys.argv[1], lambda file: os._exit(3))
"""


@pytest.mark.skipif(durable.fcntl is None, reason="has no flock")
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EPERM])
def test_saving_works_and_leftovers_go_where_files_cannot_be_locked(tmp_path, monkeypatch, number):
    killed = subprocess.run([sys.executable, "-c", LEAVES, str(tmp_path / "file")], check=False)
    assert killed.returncode == 3
    assert len(list(tmp_path.glob(".*.tinyq-tmp"))) == 1
    old, new = (tmp_path / f".{name}-1-0123456789ab.tinyq-tmp" for name in ("aaaaaaaa", "bbbbbbbb"))
    for path in (old, new):
        path.write_bytes(b"of another machine")
    os.utime(old, (1e9, 1e9))
    without_locks(monkeypatch, number)

    def write_outer(file):
        file.write(b"outer")
        replace_file(tmp_path / "inner", lambda inner: inner.write(b"inner"))
        assert Path(file.name).exists(), "this process is alive"

    replace_file(tmp_path / "outer", write_outer)
    assert {each.name for each in tmp_path.iterdir()} == {"inner", "outer", new.name}


def test_leftovers_of_killed_processes_go_on_remote_file_systems_as_well():
    memory = fsspec.filesystem("memory")
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    dead, alive = (f"/left/.{durable._machine()}-{pid}-0.tinyq-tmp" for pid in (int(gone.stdout), os.getpid()))
    for path in (dead, alive):
        memory.pipe(path, b"half")
    replace_file("memory://left/file", lambda file: file.write(b"new"))
    assert sorted(memory.ls("/left", detail=False)) == sorted([alive, "/left/file"])
    memory.rm("/left", recursive=True)


def test_an_error_while_writing_leaves_the_former_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def fail(file):
        file.write(b"half")
        raise OSError("no space left")

    with pytest.raises(CheckpointError, match=r"file: the file could not be written: no space left"):
        replace_file(path, fail)
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("file", b"before")]


def test_a_link_keeps_pointing_at_the_file(tmp_path):
    (tmp_path / "real").mkdir()
    write_checkpoint(content(), tmp_path / "real" / "q.ckpt")
    (tmp_path / "link.ckpt").symlink_to(tmp_path / "real" / "q.ckpt")
    write_checkpoint(content(epoch=5), tmp_path / "link.ckpt")
    assert (tmp_path / "link.ckpt").is_symlink()
    assert read_checkpoint(tmp_path / "real" / "q.ckpt")["epoch"] == 5


def test_remote_files_are_written_whole_and_replaced(tmp_path):
    path = "memory://durable/run/q.ckpt"
    write_checkpoint(content(), path)
    write_checkpoint(content(epoch=2), path)
    assert read_checkpoint(path)["epoch"] == 2
    assert [os.path.basename(name) for name in fsspec.filesystem("memory").ls("/durable/run", detail=False)] == [
        "q.ckpt"
    ]


def test_another_runs_file_is_not_replaced_without_a_word(tmp_path):
    path = tmp_path / "q.ckpt"
    write_checkpoint(content(), path)
    write_checkpoint(content(epoch=1), path)  # of the same float file: no word
    with pytest.warns(UserWarning, match=r"q\.ckpt: a quantized checkpoint of another float checkpoint was replaced"):
        write_checkpoint(content("f" * 64, epoch=2), path)
    assert read_checkpoint(path)["epoch"] == 2


def test_a_file_that_is_not_a_quantized_checkpoint_is_never_overwritten(tmp_path):
    for name, write in {
        "float.ckpt": lambda path: torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, path),
        "notes.ckpt": lambda path: path.write_text("my notes"),
    }.items():
        write(tmp_path / name)
        before = (tmp_path / name).read_bytes()
        with pytest.raises(CheckpointError, match=f"{name}: there is a file already that is not a quantized"):
            write_checkpoint(content(), tmp_path / name)
        assert (tmp_path / name).read_bytes() == before
