"""``quantize`` of many files: what is done is left, a bad one stops no other, and the exit code tells."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from models import Net

from tinyq_lightning.command.cli import main

KILLED = """
import os, signal
from models import Net as Base

class Net(Base):
    def __init__(self, width=16, lr=0.02, die=False):
        super().__init__(width, lr)
        if die:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three float files of two kinds, and a bad one between them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    for name in ("a/net.ckpt", "b/net.pt", "c/net.ckpt"):
        Path(name).parent.mkdir()
        weights = Net().state_dict()
        torch.save(weights if name.endswith(".pt") else {"state_dict": weights, "hyper_parameters": {}}, name)
    Path("b/bad.ckpt").write_text("no checkpoint")
    return tmp_path


FILES = ["a/net.ckpt", "b/bad.ckpt", "b/net.pt", "c/net.ckpt"]


def quantize(capsys, *words) -> tuple[int, dict[str, str], list]:
    """Exit code, the status of each file, and all that is told of them."""
    code = main(["quantize", "--model", "models:Net", "--json", *words])
    told = json.loads(capsys.readouterr().out)["files"]
    return code, {each["checkpoint"]: each["status"] for each in told}, told


def test_a_bad_file_stops_no_other_and_a_second_run_does_only_what_is_left(folder, capsys):
    code, status, told = quantize(capsys, *FILES)
    assert code == 1
    assert status == {name: "failed" if "bad" in name else "quantized" for name in FILES}
    assert [each["path"] for each in told if each["path"]] == [
        "a/w8a32-net.ckpt",
        "b/w8a32-net.ckpt",
        "c/w8a32-net.ckpt",
    ]
    assert "b/bad.ckpt: the file is truncated" in told[1]["error"]
    made = Path("a/w8a32-net.ckpt").read_bytes()
    Path("c/w8a32-net.ckpt").unlink()
    code, status, told = quantize(capsys, *(str(path) for path in sorted(Path(".").glob("*/*net.*"))))
    assert code == 0
    assert list(status.values()) == [
        *("done before", "quantized file"),
        *("done before", "quantized file"),
        "quantized",
    ]
    assert Path("a/w8a32-net.ckpt").read_bytes() == made


def test_what_another_spec_or_another_float_file_made_is_not_done(folder, capsys):
    words = ("a/net.ckpt", "--jobs", "1")
    assert quantize(capsys, *words)[1] == {"a/net.ckpt": "quantized"}
    assert quantize(capsys, *words)[1] == {"a/net.ckpt": "done before"}
    assert quantize(capsys, *words, "--method", "w8a8")[1] == {"a/net.ckpt": "quantized"}
    code, _, told = quantize(capsys, *words, "--exclude", "head")
    assert code == 1
    assert "a/w8a32-net.ckpt: there is such a file already" in told[0]["error"]
    assert quantize(capsys, *words, "--exclude", "head", "--overwrite")[1] == {"a/net.ckpt": "quantized"}
    torch.save(Net().state_dict(), "a/net.ckpt")
    assert quantize(capsys, *words, "--exclude", "head")[1] == {"a/net.ckpt": "failed"}


def test_several_go_to_a_folder_of_their_own_but_never_to_one_name(folder, capsys):
    assert quantize(capsys, "a/net.ckpt", "--jobs", "1", "--output", "out")[2][0]["path"] == "out/w8a32-net.ckpt"
    assert main(["quantize", "a/net.ckpt", "c/net.ckpt", "--model", "models:Net", "--output", "out2"]) == 1
    told = capsys.readouterr().err
    assert "a/net.ckpt, c/net.ckpt would all be written to out2/*-net.ckpt" in told
    assert not Path("out2").exists()


def test_an_output_is_a_folder_if_there_is_one_and_never_the_one_file_of_several(folder, capsys):
    Path("out").mkdir()
    assert main(["quantize", "--model", "models:Net", "a/net.ckpt", "--output", "out"]) == 0
    assert [path.name for path in Path("out").iterdir()] == ["w8a32-net.ckpt"]
    capsys.readouterr()
    assert main(["quantize", "--model", "models:Net", "a/net.ckpt", "b/net.pt", "--output", "q.ckpt"]) == 1
    assert "q.ckpt: of several files --output is the folder" in capsys.readouterr().err
    assert main(["quantize", "--model", "models:Nothing", "a/net.ckpt", "c/net.ckpt", "--output", "out"]) == 1
    assert "Nothing" in capsys.readouterr().err


def test_the_summary_is_a_table_and_reasons_are_on_stderr(folder, capsys):
    assert main(["quantize", *FILES[:2], "--model", "models:Net"]) == 1
    told = capsys.readouterr()
    assert told.out.splitlines()[0].split() == ["checkpoint", "result", "method", "layers", "float", "now", "seconds"]
    assert told.out.splitlines()[2].split()[:6] == ["a/net.ckpt", "quantized", "w8a32", "3", "of", "3"]
    assert told.out.splitlines()[-1] == "1 quantized, 1 failed"
    assert told.err.startswith("failed: b/bad.ckpt: the file is truncated")
    with pytest.raises(SystemExit, match="2"):
        main(["quantize", *FILES, "--jobs", "0"])


@pytest.mark.slow
def test_a_process_that_dies_costs_its_file_alone(folder, capsys):
    Path("killed.py").write_text(KILLED)
    torch.save({"state_dict": Net().state_dict(), "hyper_parameters": {"die": True}}, "b/bad.ckpt")
    code, status, told = quantize(capsys, *FILES, "--model", "killed:Net", "--jobs", "2")
    assert code == 1
    assert status == {name: "failed" if "bad" in name else "quantized" for name in FILES}
    assert "the process that quantized it was killed by signal 9" in told[1]["error"]
