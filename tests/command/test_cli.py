"""What is promised of the command line: every command as users run it, exit codes, and no traceback for a mistake."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
import torch
from exported_nets import needs_onnx
from models import Net, keeper, loader, trainer

from tinyq_lightning import TinyQCallback
from tinyq_lightning.command.cli import main
from tinyq_lightning.file.checkpoint import _digests, file_sha256, read_checkpoint

COMMANDS = ("quantize", "inspect", "verify", "evaluate", "bench", "export")
ROOT = Path(__file__).parents[2]
NETS = """
import torch
from lightnings import LightningDataModule
from models import Net as Base, loader


class Net(Base):
    def __init__(self, width=16, lr=0.02):
        super().__init__(width, lr)
        self.example_input_array = torch.zeros(2, 8)


class Data(LightningDataModule):
    def __init__(self, batch_size=32):
        super().__init__()
        self.batch_size = batch_size

    def test_dataloader(self):
        return loader(seed=2, batch_size=self.batch_size)

    def val_dataloader(self):
        return loader(seed=1, batch_size=self.batch_size)


def example():
    return {"x": torch.zeros(3, 8)}


def calibration():
    return [torch.randn(16, 8) for _ in range(3)]
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder as a user has it after a run: modules, a float checkpoint, a quantized one."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    callback = TinyQCallback("w8a32", report=False)
    run = trainer(folder, keeper(folder, filename="epoch=7"), callback, max_epochs=1)
    run.fit(Net(), loader(shuffle=True), loader(seed=1))
    (folder / "nets.py").write_text(NETS)
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    for name in ("nets.py", "epoch=7.ckpt", "w8a32-epoch=7.ckpt"):
        (tmp_path / name).write_bytes((made / name).read_bytes())
    (tmp_path / "epoch=8.ckpt").write_bytes((made / "epoch=7.ckpt").read_bytes())
    (tmp_path / "damaged.ckpt").write_bytes((made / "epoch=7.ckpt").read_bytes()[:999])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("nets", None)
    return tmp_path


def run(command: str, folder) -> subprocess.CompletedProcess:
    """A command in a process of its own, as the console script runs it."""
    words = [sys.executable, "-m", "tinyq_lightning", *shlex.split(command)[1:]]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(words, capture_output=True, text=True, cwd=folder, env={**os.environ, "PYTHONPATH": paths})


def written_commands() -> list[str]:
    """The commands that the README, the other pages and the help texts show."""
    pages = [
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        ROOT / "tinyq_lightning" / "file" / "FORMAT.md",
        ROOT / "tinyq_lightning" / "command" / "cli.py",
    ]
    text = "\n".join(page.read_text() for page in pages)
    return list(dict.fromkeys(re.findall(r"^[ \"$]*(tinyq-lightning [a-z]+ \S.*?)\"?,?$", text, re.M)))


def is_right(command: str, code: int, said: str) -> bool:
    """Whether a written command did what its page says: one shows a damaged file."""
    return (code, "failed: damaged.ckpt" in said) == (1, True) if "damaged" in command else (code, said) == (0, "")


def ready(command: str, folder) -> str:
    """The command with what it writes out of its way."""
    for name in re.findall(r"--output (\S+)", command):
        (folder / name).unlink(missing_ok=True)
    writes = command.split()[1] in ("quantize", "export") and "--output" not in command
    return f"{command} --overwrite" if writes else command


@needs_onnx
def test_every_command_that_is_written_down_does_what_it_says(folder, capsys):
    commands = written_commands()
    assert {command.split()[1] for command in commands} == {*COMMANDS}
    for command in commands:
        code = main(shlex.split(ready(command, folder))[1:])
        told = capsys.readouterr()
        assert told.out
        assert is_right(command, code, told.err), command  # and silent where stderr is no terminal


@pytest.mark.slow
def test_every_command_that_is_written_down_runs_in_a_process_of_its_own(folder):
    for command in written_commands():
        done = run(ready(command, folder), folder)
        assert is_right(command, done.returncode, done.stderr), command


@pytest.mark.slow
def test_a_reader_of_stdout_may_leave_before_the_answer(folder):
    words = f"{shlex.quote(sys.executable)} -m tinyq_lightning inspect w8a32-epoch=7.ckpt | true"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, shell=True, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.stderr == ""


def test_help_and_version_need_neither_torch_nor_lightning():
    """So that they answer at once: both take seconds to import."""
    code = """
import sys
from tinyq_lightning.command import main
for words in (["--help"], ["quantize", "--help"], ["--version"]):
    try:
        main(words)
    except SystemExit as end:
        assert end.code == 0
assert not {"torch", "lightning", "omegaconf", "numpy"} & set(sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "exit codes" in run.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["--exclude", "head", "epoch=7.ckpt"],
        ["--exclude", "head", "--exclude", "body.0", "epoch=7.ckpt"],
        ["--kinds", "linear", "conv", "epoch=7.ckpt", "--exclude", "head"],
        ["--init", "width=16", "epoch=7.ckpt"],
        ["epoch=7.ckpt", "--exclude", "head", "body.0"],
    ],
)
def test_a_list_does_not_swallow_the_file_after_it(folder, capsys, words):
    assert main(["inspect", "--model", "nets:Net", "--json", *words]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    excluded = {"head", "body.0"}.intersection(words)
    assert {entry["name"] for entry in plan if entry["method"] == "float"} == excluded


def test_the_commands_output_is_the_callbacks_file_but_for_the_metrics(folder, capsys):
    assert main(["quantize", "epoch=7.ckpt", "--model", "nets:Net", "--output", "q.ckpt", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["path"] == "q.ckpt"
    ours, theirs = (torch.load(name, weights_only=True) for name in ("q.ckpt", "w8a32-epoch=7.ckpt"))
    assert ours["tinyq"]["digests"].keys() == theirs["tinyq"]["digests"].keys()
    different = {k for k, v in ours["tinyq"]["digests"].items() if theirs["tinyq"]["digests"][k] != v}
    assert different == {"tinyq"}
    different = {k for k, v in ours["tinyq"].items() if theirs["tinyq"][k] != v}
    assert different == {"metrics", "metrics_from", "digests"}


def test_verify_tells_the_right_float_file_from_another(folder, capsys):
    verify = ["verify", "w8a32-epoch=7.ckpt", "--model", "nets:Net", "--json", "--float"]
    assert main([*verify, "epoch=7.ckpt"]) == 0
    assert json.loads(capsys.readouterr().out)["same"]
    content = torch.load("epoch=7.ckpt", weights_only=True)
    content["state_dict"]["head.weight"][0, 0] += 1
    torch.save(content, "other.ckpt")
    assert main([*verify, "other.ckpt"]) == 1
    assert json.loads(capsys.readouterr().out)["differs"] == ["float_sha256"]
    # a file that claims to come from it
    main(["quantize", "other.ckpt", "--model", "nets:Net", "--output", "claims.ckpt"])
    claims = torch.load("claims.ckpt", weights_only=True)
    claims["tinyq"]["float_sha256"] = file_sha256("epoch=7.ckpt")
    claims["tinyq"]["digests"] = _digests(claims)
    torch.save(claims, "claims.ckpt")
    read_checkpoint("claims.ckpt")
    capsys.readouterr()
    assert main(["verify", "claims.ckpt", "--model", "nets:Net", "--float", "epoch=7.ckpt", "--json"]) == 1
    differs = json.loads(capsys.readouterr().out)["differs"]
    assert differs == ["state_dict.head.int8_weights", "state_dict.head.scales", "tinyq.plan"]


def test_quantize_counts_weights_and_inspect_all_entries(folder, capsys):
    Path("buffered.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Buffered(nn.Sequential):\n    def __init__(self):\n"
        "        super().__init__(nn.Linear(8, 8, bias=False))\n"
        "        self.register_buffer('mask', torch.zeros(64))\n"
    )
    torch.save({"0.weight": torch.randn(8, 8), "mask": torch.zeros(64)}, "buffered.pt")
    assert main(["quantize", "buffered.pt", "--model", "buffered:Buffered", "--output", "buffered.ckpt"]) == 0
    assert "100 % of the weight bytes in int8 (w8a32), 1 of 1 layer\n" in capsys.readouterr().out
    assert main(["inspect", "buffered.ckpt"]) == 0
    assert (
        "50.0 % of the weight bytes in int8 (w8a32), 1 of 1 layer; in float 50.0 % other entries, buffers among them"
        in capsys.readouterr().out
    )


def test_inspect_tells_what_a_file_is(folder, capsys):
    assert main(["inspect", "w8a32-epoch=7.ckpt"]) == 0
    text = capsys.readouterr().out
    for word in (
        "100 % of the weight bytes in int8 (w8a32), 3 of 3 layers",
        "body.0",
        "val_acc",
        "SHA-256",
        "tinyq_lightning 0.1.0",
    ):
        assert word in text
    assert main(["inspect", "epoch=7.ckpt", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["quantized"] is False
    assert told["matrices"] == ["body.0.weight", "body.2.weight", "head.weight"]
    assert main(["inspect", "epoch=7.ckpt", "--model", "nets:Net", "--exclude", "head"]) == 0
    assert re.search(
        r"\d % of the weight bytes in int8 \(w8a32\), 2 of 3 layers; in float [\d.]+ % Linear", capsys.readouterr().out
    )
    assert main(["inspect", "epoch=7.ckpt", "--json", "--model", "nets:Net", "--exclude", "head"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert [(entry["name"], entry["method"]) for entry in plan][-1] == ("head", "float")


def test_evaluate_gives_the_trainers_numbers(folder, capsys):
    files = ["epoch=7.ckpt", "w8a32-epoch=7.ckpt"]
    command = ["evaluate", "--model", "nets:Net", "--data", "nets:Data", "--data-init", "batch_size=64", "--json"]
    assert main([*command, *files]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    module = Net.load_from_checkpoint("epoch=7.ckpt", weights_only=True)
    wanted = trainer(folder).test(module, loader(seed=2, batch_size=64), verbose=False)[0]
    assert metrics["epoch=7.ckpt"] == wanted
    assert metrics["w8a32-epoch=7.ckpt"].keys() == wanted.keys()
    assert main([*command, "--loop", "validate", files[0]]) == 0
    wanted = trainer(folder).validate(module, loader(seed=1, batch_size=64), verbose=False)[0]
    assert json.loads(capsys.readouterr().out)["metrics"][files[0]] == wanted


def test_a_bad_file_stops_no_other_evaluation_and_the_exit_code_tells(folder, capsys):
    Path("bad.ckpt").write_text("no checkpoint")
    torch.save({"state_dict": {"head.bias": torch.ones(3)}}, "other.ckpt")
    command = ["evaluate", "--model", "nets:Net", "--data", "nets:Data"]
    files = ["bad.ckpt", "epoch=7.ckpt", "other.ckpt", "missing.ckpt", "w8a32-epoch=7.ckpt"]
    assert main([*command, *files]) == 1
    told = capsys.readouterr()
    rows = {row.split()[0]: row.split()[1:] for row in told.out.splitlines()[2:]}
    assert list(rows) == files
    assert [name for name in files if rows[name] == ["failed"]] == [files[0], *files[2:4]]
    for name in (files[0], *files[2:4]):
        assert f"failed: {name}" in told.err
    assert main([*command, "--json", *files]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert list(answer["failed"]) == [files[0], *files[2:4]]
    assert {name for name, found in answer["metrics"].items() if found} == {files[1], files[4]}
    assert main([*command, files[0], files[3]]) == 1
    assert main([*command, files[0]]) == 1
    for wrong in (["--model", "nets:No"], ["--data-init", "no=1"]):
        capsys.readouterr()
        assert main([*command, *files, *wrong]) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1, "what is wrong for all files is told once"


def test_bench_times_model_and_layers(folder, capsys):
    assert (
        main(
            [
                "bench",
                "w8a32-epoch=7.ckpt",
                "--model",
                "nets:Net",
                "--batch",
                "1",
                "3",
                "--layers",
                "--runs",
                "2",
                "--json",
            ]
        )
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    layers = [None, "body.0", "body.2", "head"]
    assert [(each["layer"], each["batch"]) for each in told["timings"]] == [(n, b) for b in (1, 3) for n in layers]
    assert told["bytes"]["quantized"] < told["bytes"]["float"]


PLAIN = """
import torch
from torch import nn

def make(width=16):
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4))
"""


def test_a_state_dict_of_a_plain_module_goes_all_the_way(folder, capsys):
    (folder / "plain.py").write_text(PLAIN)
    (folder / "sizes.yaml").write_text("width: 24\n")
    torch.save(
        torch.nn.Sequential(torch.nn.Linear(8, 24), torch.nn.ReLU(), torch.nn.Linear(24, 4)).state_dict(), "n.pt"
    )
    model = ["--model", "plain:make", "--init", "sizes.yaml"]
    bench = ["bench", *model, "--shape", "8", "--runs", "1", "--json"]
    for words in (
        ["inspect", *model, "n.pt"],
        ["quantize", *model, "n.pt"],
        [*bench, "--method", "w8a8", "--exclude", "2", "--", "n.pt"],
        [*bench, "w8a32-n.ckpt"],
        ["export", "w8a32-n.ckpt", "--to", "safetensors"],
        [*bench, "w8a32-n.safetensors"],
        ["export", "w8a32-n.ckpt", *model, "--to", "pt2", "--shape", "2x8"],
    ):
        assert main(words) == 0, words
        assert capsys.readouterr().err == ""
    assert main(["bench", "n.pt", *model]) == 1
    assert "Sequential has no example_input_array" in capsys.readouterr().err
    assert main(["bench", "n.pt", "--model", "plain:make", "--shape", "8"]) == 1
    assert "does not fit make" in capsys.readouterr().err


def test_evaluate_takes_a_state_dict_and_a_safetensors_file(folder, capsys):
    torch.save(torch.load("epoch=7.ckpt", weights_only=True)["state_dict"], "n.pt")
    assert main(["export", "w8a32-epoch=7.ckpt", "--to", "safetensors", "--output", "q.safetensors"]) == 0
    capsys.readouterr()
    files = ["epoch=7.ckpt", "n.pt", "w8a32-epoch=7.ckpt", "q.safetensors"]
    assert main(["evaluate", "--model", "nets:Net", "--data", "nets:Data", "--json", *files]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert metrics["n.pt"] == metrics["epoch=7.ckpt"]
    assert metrics["q.safetensors"] == metrics["w8a32-epoch=7.ckpt"]
    assert main(["evaluate", "--data", "nets:Data", "q.safetensors"]) == 1
    assert "q.safetensors does not say which class it was made from: give --model" in capsys.readouterr().err


def test_bench_takes_an_example(folder, capsys):
    command = [
        "bench",
        "w8a32-epoch=7.ckpt",
        "--model",
        "nets:Net",
        "--example",
        "nets:example",
        "--runs",
        "2",
        "--json",
    ]
    assert main([*command, "--batch", "1", "5"]) == 0
    assert [each["batch"] for each in json.loads(capsys.readouterr().out)["timings"]] == [1, 5]


def test_safetensors_of_a_checkpoint_are_inspected_and_verified(folder, capsys):
    assert main(["export", "w8a32-epoch=7.ckpt", "--output", "w8a32.safetensors"]) == 0
    assert main(["inspect", "w8a32.safetensors", "--json"]) == 0
    told = capsys.readouterr().out
    assert main(["inspect", "w8a32-epoch=7.ckpt", "--json"]) == 0
    first, other = (json.loads(text[text.index("{") :]) for text in (told, capsys.readouterr().out))
    assert first["tinyq"] == other["tinyq"]
    assert main(["verify", "w8a32.safetensors", "--float", "epoch=7.ckpt", "--model", "nets:Net"]) == 0
    assert "all digests agree" in capsys.readouterr().out
    content = Path("w8a32.safetensors").read_bytes()
    Path("w8a32.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert main(["verify", "w8a32.safetensors"]) == 1


@needs_onnx
def test_export_with_static_activations_is_measured_by_the_validation_loop(folder, capsys):
    command = ["export", "w8a32-epoch=7.ckpt", "--model", "nets:Net", "--activations", "static", "--json"]
    data = ["--data", "nets:Data", "--data-init", "batch_size=16", "--batches", "2"]
    assert main([*command, *data, "--output", "static.onnx"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["metrics"].keys() == told["model_metrics"].keys() >= {"val_acc"}
    assert told["metrics"] == pytest.approx(told["model_metrics"], abs=0.1)
    assert told["metrics"] != told["model_metrics"]
    assert main([*command, "--calibration", "nets:calibration", "--output", "other.onnx"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == {}


def test_the_class_that_lightning_cli_noted_is_imported_only_with_trust(folder, capsys):
    content = torch.load("epoch=7.ckpt", weights_only=True)
    content["hyper_parameters"]["_class_path"] = "nets.Net"
    torch.save(content, "noted.ckpt")
    assert main(["quantize", "noted.ckpt"]) == 1
    assert "says that it was made from nets.Net: give --model nets.Net, or --trust" in capsys.readouterr().err
    assert main(["quantize", "noted.ckpt", "--trust"]) == 0
    assert main(["bench", "w8a32-noted.ckpt", "--runs", "1"]) == 1
    assert main(["bench", "w8a32-noted.ckpt", "--runs", "1", "--trust"]) == 0


MISTAKES = [
    ("quantize nothing.ckpt --model nets:Net", r"nothing\.ckpt: there is no such file"),
    ("quantize epoch=7.ckpt", "does not say which class it was made from: give --model"),
    ("quantize epoch=7.ckpt --model nets:Nett", r"'nets:Nett' cannot be imported.*package\.module:Class"),
    ("quantize epoch=7.ckpt --model nets:Data", "a class of modules is needed, and Data is no nn.Module"),
    ("quantize epoch=7.ckpt --model nets:Net", "there is such a file already: give --overwrite"),
    ("quantize epoch=7.ckpt --model nets:Net --overwrite --output epoch=7.ckpt", "is not a quantized checkpoint"),
    ("quantize epoch=7.ckpt --model nets:Net --method w8a33", "'w8a33' is not a method. Did you mean 'w8a32'"),
    ("quantize epoch=7.ckpt --model nets:Net --kinds linear convv", r"\(kinds\.1\): 'convv' is not a kind.*'conv'"),
    ("quantize epoch=7.ckpt --model nets:Net --kinds conv", "Net has no layer of the kinds conv to quantize"),
    ("quantize epoch=7.ckpt --model nets:Net --spec no.yaml", r"no\.yaml: the spec cannot be read"),
    ("quantize epoch=7.ckpt --model nets:Net --exclude haed", "Did you mean 'head'"),
    ("quantize epoch=7.ckpt --model nets:Net --init width=5 --output q.ckpt", "does not fit Net"),
    ("quantize epoch=7.ckpt --model nets:Net --init wdith=5 --output q.ckpt", "no argument wdith"),
    ("quantize w8a32-epoch=7.ckpt --model nets:Net", "it is quantized already"),
    ("inspect nets.py", r"nets\.py: the file is truncated or damaged, or not one of torch\.save"),
    ("verify epoch=7.ckpt", "not a quantized one. Quantize it first: tinyq-lightning quantize epoch=7.ckpt --model"),
    ("bench w8a32-epoch=7.ckpt --model nets:Net --shape 3", r"forward of Net failed on an input of shape \[1, 3\]"),
    (
        "evaluate --model nets:Net --data nets:Data epoch=7.ckpt --data-init size=3",
        "unexpected keyword argument 'size'",
    ),
    (
        "evaluate --model nets:Net --data nets:Data epoch=7.ckpt --accelerator gpux",
        r"epoch=7\.ckpt: the test loop could not be run: .*accelerator",
    ),
    (
        "evaluate --model nets:Net --data nets:Data epoch=7.ckpt --limit-batches 1.5",
        r"epoch=7\.ckpt: the test loop could not be run: .*limit_test_batches",
    ),
    ("quantize epoch=7.ckpt --model nets:Net --init width.deep=5 --output q.ckpt", r"no argument width\.deep"),
    ("export epoch=7.ckpt --to safetensors", "not a quantized one"),
    ("export nets.py --to ckpt --output q.ckpt", "truncated or damaged"),
    ("export w8a32-epoch=7.ckpt --to pt2", "give --model"),
    ("export w8a32-epoch=7.ckpt --to pt2 --model nets:Net --example nets:nothing", "has no attribute 'nothing'"),
    ("export w8a32-epoch=7.ckpt --to pt2 --model nets:Net --shape 2x9", r"failed on inputs of the shapes \w+ \[2, 9\]"),
    ("export w8a32-epoch=7.ckpt --to pt2 --model nets:Net --method fly", "no example of its inputs"),
]


@pytest.mark.parametrize(("command", "message"), MISTAKES, ids=[command for command, _ in MISTAKES])
def test_a_mistake_gives_a_message_and_exit_code_1_and_no_file(folder, capsys, command, message):
    before = {each.name: each.read_bytes() for each in folder.iterdir() if each.is_file()}
    assert main(shlex.split(command)) == 1
    told = capsys.readouterr()
    assert re.search(message, told.err), told.err
    assert told.out == ""
    assert {each.name: each.read_bytes() for each in folder.iterdir() if each.is_file()} == before


def test_a_value_inside_an_argument_is_given_by_its_dotted_name(folder, capsys):
    Path("deep.py").write_text(
        "from nets import Net as Base\nclass Net(Base):\n"
        "    def __init__(self, sizes):\n        super().__init__(sizes['width'])\n        self.odd = sizes['odd']\n"
    )
    content = torch.load("w8a32-epoch=7.ckpt", weights_only=True)
    content["hyper_parameters"] = {"sizes": {"width": 16}}
    content["tinyq"]["dropped"] = ["hyper_parameters.sizes.odd"]
    content["tinyq"]["digests"] = _digests(content)
    torch.save(content, "deep.ckpt")
    command = ["bench", "deep.ckpt", "--model", "deep:Net", "--runs", "1", "--json"]
    assert main(command) == 1
    assert "sizes.odd" in capsys.readouterr().err
    assert main([*command, "--init", "sizes.odd=[1, 2]"]) == 0


def test_a_file_behind_a_url_is_not_overwritten_unless_asked(folder, capsys):
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/cli/q.ckpt", Path("w8a32-epoch=7.ckpt").read_bytes())
    command = ["quantize", "epoch=7.ckpt", "--model", "nets:Net", "--output", "memory://cli/q.ckpt"]
    assert main(command) == 1
    assert "memory://cli/q.ckpt: there is such a file already: give --overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


def test_errors_are_json_where_json_is_asked_for(folder, capsys):
    assert main(["verify", "nothing.ckpt", "--json"]) == 1
    assert "no such file" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize(
    "command",
    [
        *("", "quantise x.ckpt", "bench q.ckpt --batch 0"),
        *("quantize a.ckpt --init width", "quantize a.ckpt --init a..b=1", "quantize a.ckpt --init no.yaml"),
    ],
)
def test_a_wrong_command_line_gives_exit_code_2(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(command.split())
    assert stopped.value.code == 2


def test_the_disk_being_full_leaves_nothing_half(folder):
    command = f"ulimit -f 4; {sys.executable} -m tinyq_lightning quantize epoch=7.ckpt --model nets:Net --output q.ckpt"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 1
    assert "q.ckpt: the file could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [each for each in folder.iterdir() if each.name == "q.ckpt" or each.name.endswith("tmp")]


@pytest.mark.filterwarnings("default:the quantized checkpoint holds plain data only")
def test_only_a_file_that_is_trusted_may_name_classes(folder, capsys):
    content = torch.load("epoch=7.ckpt", weights_only=True)
    content["extra"] = shlex.shlex  # any class
    torch.save(content, "odd.ckpt")
    assert main(["quantize", "odd.ckpt", "--model", "nets:Net"]) == 1
    assert "shlex.shlex" in capsys.readouterr().err
    assert main(["quantize", "odd.ckpt", "--model", "nets:Net", "--trust"]) == 0
    assert (
        "warning: the quantized checkpoint holds plain data only, so these were left out: extra"
        in capsys.readouterr().err
    )
