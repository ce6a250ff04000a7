"""What a run says: on the screen, beside the checkpoint, in the loggers, and in a browser."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from browser import chromium, find_chromium
from lightnings import CSVLogger, TensorBoardLogger
from models import CLASSES, FEATURES, Net, keeper, loader, loops_of, trainer
from torch import nn

from tinyq_lightning import QuantizationSpec, TinyQCallback, load_quantized
from tinyq_lightning.errors import CheckpointError
from tinyq_lightning.plan.swap import Swap
from tinyq_lightning.report.outcome import Outcome
from tinyq_lightning.report.tables import comparison_table, speed_advice
from tinyq_lightning.search import BatchTimes
from tinyq_lightning.search.layer_errors import measured_layers

TESTS = Path(__file__).parents[1]
STEMS = {".ckpt", ".html", ".json", ".yaml"}


def fit(root, callback, module=None, **settings):
    run = trainer(root, keeper(root), callback, **settings)
    run.fit(module or Net(), loader(shuffle=True), loader(seed=1))
    return Path(callback.quantized_path) if callback.quantized_path else None


class Odd(Net):
    """A layer with a name that HTML would take for its own, and more layers than a screen has rows."""

    def __init__(self, width: int = 16, depth: int = 50):
        super().__init__(width)
        self.body = nn.ModuleDict({"<script>alert(1)</script>": nn.Linear(FEATURES, width)})
        self.more = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.body["<script>alert(1)</script>"](x)
        for layer in self.more:
            x = x + 0.1 * layer(x).tanh()
        return self.head(x)


# Beside the checkpoint


def test_json_html_and_yaml_lie_beside_the_checkpoint_and_report_false_leaves_none(tmp_path):
    path = fit(tmp_path / "with", TinyQCallback("w8a32"))
    assert {each.suffix for each in path.parent.glob("w8a32-*")} == STEMS
    assert len(list(path.parent.glob("w8a32-*"))) == 4
    path = fit(tmp_path / "without", TinyQCallback("w8a32", report=False))
    assert [each.name for each in path.parent.glob("w8a32-*")] == [path.name]
    fit(tmp_path / "nothing", TinyQCallback("w8a32", save=False))
    assert {each.suffix for each in (tmp_path / "nothing").iterdir()} == {".ckpt"}


def test_the_trainer_still_finds_its_own_last_and_best(tmp_path):
    callback = TinyQCallback("w8a32", weights="last")
    run = trainer(tmp_path, keeper(tmp_path, save_last=True), callback)
    run.fit(Net(), loader(shuffle=True), loader(seed=1))
    assert Path(callback.quantized_path).name == "w8a32-last.ckpt"
    run.test(Net(), loader(), ckpt_path="last", verbose=False, weights_only=True)
    assert Path(run.ckpt_path).name == "last.ckpt"


def test_json_has_the_figures_of_the_run(tmp_path):
    callback = TinyQCallback("w8a8", exclude=["head"])
    report = json.loads(fit(tmp_path, callback).with_suffix(".json").read_text())
    assert report["metrics"] == callback.results
    assert [layer["name"] for layer in report["layers"]] == [decision.name for decision in callback.plan]
    for layer, decision in zip(report["layers"], callback.plan, strict=True):
        assert layer["method"] == decision.method
        assert layer["reason"] == decision.reason
        assert layer["weight_sqnr_db"] == decision.weight_sqnr_db
        assert (layer["float_bytes"], layer["bytes"]) == (decision.float_bytes, decision.bytes)
        assert "output_sqnr_db" not in layer
    assert report["seconds_per_batch"]["w8a8"] > 0
    assert report["float_checkpoint"] == Path(callback.float_path).name, "names, no paths of this machine"
    assert str(tmp_path) not in json.dumps(report)
    assert QuantizationSpec.from_dict(report["spec"]) == callback.plan.to_spec()


def test_full_adds_what_real_batches_show_and_changes_no_figure(tmp_path):
    plain, full = TinyQCallback("w8a8"), TinyQCallback("w8a8", report="full")
    fit(tmp_path / "plain", plain)
    report = json.loads(fit(tmp_path / "full", full).with_suffix(".json").read_text())
    for layer in report["layers"]:
        sqnr = layer["output_sqnr_db"]
        assert sqnr["w8a8"] < sqnr["w8a16"]
        assert 20 < sqnr["w8a8"] < 60
        assert 1 <= layer["crest"] <= 16**0.5
        assert layer["ms"]["w8a8"] > 0
        assert layer["float_ms"] > 0


class Padded(Net):
    """torch's encoder with padding: a fast path hands its layers nested tensors."""

    def __init__(self, width: int = 16):
        super().__init__(width)
        self.body = nn.Linear(2, width)
        layer = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, x):
        tokens = self.body(x.unflatten(1, (-1, 2)))
        padding = torch.arange(tokens.shape[1]) >= 2 + torch.arange(len(x))[:, None] % 2
        return self.head(self.encoder(tokens, src_key_padding_mask=padding)[:, :2].mean(1))


@pytest.mark.parametrize("budget", [{}, {"monitor": "val_loss", "mode": "min", "max_drop": 1e-9}])
@pytest.mark.filterwarnings("ignore:TinyQ. .*budget NOT met", "ignore:The PyTorch API of nested tensors")
def test_a_padded_encoder_is_measured_in_full_and_searched(tmp_path, budget):
    report = json.loads(
        fit(tmp_path, TinyQCallback("w8a8", report="full", **budget), Padded()).with_suffix(".json").read_text()
    )
    assert {layer["name"] for layer in report["layers"] if layer.get("output_sqnr_db")} >= {
        "head",
        "encoder.layers.0.self_attn.in_proj",
        "encoder.layers.0.linear1",
    }


class Mapped(Net):
    """Its head is called under vmap, where no number can be read from a tensor."""

    def forward(self, x):
        return torch.func.vmap(self.head)(self.body(x))


@pytest.mark.parametrize("budget", [{}, {"monitor": "val_loss", "mode": "min", "max_drop": 1e-9}])
@pytest.mark.filterwarnings("ignore:TinyQ. .*budget NOT met")
def test_a_layer_that_cannot_be_measured_costs_a_line_in_the_report_and_no_more(tmp_path, capsys, budget):
    path = fit(tmp_path, TinyQCallback("w8a8", report="full", **budget), Mapped())
    layers = {layer["name"]: layer for layer in json.loads(path.with_suffix(".json").read_text())["layers"]}
    assert layers["head"]["not_measured"].startswith("RuntimeError: vmap")
    assert layers["head"]["output_sqnr_db"] == {}
    assert layers["body.0"]["not_measured"] is None
    assert layers["body.0"]["output_sqnr_db"]["w8a8"] > 20
    assert "not measured: RuntimeError: vmap" in capsys.readouterr().out
    assert "not measured: RuntimeError: vmap" in path.with_suffix(".html").read_text()
    assert load_quantized(path, Mapped)


@pytest.mark.parametrize("when", ["fit_end", "test_start"])
def test_methods_of_other_codes_have_figures_of_their_own(tmp_path, when):
    callback = TinyQCallback(["w8a16", "w4a32"], when=when, report="full", dirpath=tmp_path, strict=True)
    run = trainer(tmp_path, callback, max_epochs=1)
    if when == "fit_end":
        run.fit(Net(), loader(shuffle=True), loader(seed=1))
    else:
        run.test(Net(), loader(seed=2), verbose=False)
    for method, path in callback.quantized_paths.items():
        content = json.loads(Path(path).with_suffix(".json").read_text())
        for layer in content["layers"]:
            assert layer["output_sqnr_db"]["w8a16"] > layer["output_sqnr_db"]["w4a32"] + 10, (method, layer)
            assert layer["ms"].keys() >= {"w8a16", "w4a32"}
        assert "No layer's error was measured" not in Path(path).with_suffix(".html").read_text()


class FailsInTheThirdLoop(Net):
    """The loops are those of the float model, of the quantized one, and the one in which layers are measured."""

    def on_validation_epoch_start(self):
        loops_of["FailsInTheThirdLoop"] += 1

    def validation_step(self, batch, batch_idx):
        if loops_of["FailsInTheThirdLoop"] == 3 and batch_idx == 1:
            raise RuntimeError("the third time")
        return super().validation_step(batch, batch_idx)


def test_a_loop_that_fails_when_it_is_measured_costs_a_warning_and_no_file(tmp_path):
    loops_of["FailsInTheThirdLoop"] = 0
    callback = TinyQCallback("w8a8", weights="current", report="full")
    with pytest.warns(UserWarning, match="could not be measured: .*the third time"):
        path = fit(tmp_path, callback, FailsInTheThirdLoop(), max_epochs=0, num_sanity_val_steps=0)
    layers = json.loads(path.with_suffix(".json").read_text())["layers"]
    assert all(layer["output_sqnr_db"]["w8a8"] > 20 for layer in layers), "the first batch was measured"


def test_the_time_of_a_batch_is_left_out_where_there_are_too_few(tmp_path, capsys):
    batches = 4
    path = fit(tmp_path, TinyQCallback("w8a8"), limit_val_batches=batches)
    assert "ms per batch" not in capsys.readouterr().out
    report = json.loads(path.with_suffix(".json").read_text())
    assert report["batches_timed"] == {"float": batches - 1, "w8a8": batches - 1}
    assert report["seconds_spread"]["float"] >= 0


def test_times_that_are_noise_are_left_out_of_the_table():
    steady, quicker, busy = (
        BatchTimes(seconds, spread, 9) for seconds, spread in ((2e-3, 1e-4), (1e-3, 1e-4), (1e-3, 5e-4))
    )

    plan = Swap(nn.Sequential(nn.Linear(4, 4)), QuantizationSpec("w8a8")).plan

    def outcome_of(before, after):
        return Outcome("w8a8", plan, plan.coverage, {}, 4, 1, before, after)

    def row(before, after):
        outcome = outcome_of(before, after)
        return next((list(each) for each in comparison_table([outcome]).rows if each[0] == "ms per batch"), None)

    assert row(steady, quicker) == ["ms per batch", "2.0 ±0.1", "1.0 ±0.1", "-50%"]
    assert row(steady, steady) == ["ms per batch", "2.0 ±0.1", "2.0 ±0.1", ""]
    assert row(steady, busy) is None
    assert row(BatchTimes(2e-3, 1e-4, 3), quicker) is None
    assert "never_slower=True" in speed_advice(outcome_of(quicker, steady))
    for before, after in ((steady, quicker), (steady, BatchTimes(2.15e-3, 1e-6, 9)), (busy, steady)):
        assert speed_advice(outcome_of(before, after)) is None


def test_output_sqnr_is_that_of_the_layer_on_its_inputs(tmp_path):
    model, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)), torch.randn(64, 8) + 3
    swap = Swap(model, QuantizationSpec())
    with torch.no_grad(), measured_layers(swap) as errors:
        model(x[:32])
        model(x[32:])
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad():
        inputs = model[1](model[0](x))
        exact = model[2](inputs).double()
        for name, _, layer in swap.pairs():
            if name == "2":
                for method in ("w8a8", "w8a16", "w8a32"):
                    noise = (layer.with_method(method)(inputs).double() - exact).square().sum()
                    expected = 10 * torch.log10((exact - exact.mean(0)).square().sum() / noise)
                    assert errors["2"].output_sqnr_db[method] == pytest.approx(expected.item(), abs=1e-3)
        crest = (x.abs().amax(1) / x.square().mean(1).sqrt()).mean()
        assert errors["0"].crest == pytest.approx(crest.item(), rel=1e-5)


def test_at_test_time_the_report_is_written_as_well(tmp_path):
    run = trainer(tmp_path, keeper(tmp_path))
    run.fit(Net(), loader(shuffle=True), loader(seed=1))
    callback = TinyQCallback("w8a8", when="test_start", report="full")
    path = run.checkpoint_callback.best_model_path
    trainer(tmp_path, callback).test(Net(), loader(seed=2), ckpt_path=path, verbose=False, weights_only=True)
    report = json.loads(Path(callback.quantized_path).with_suffix(".json").read_text())
    assert report["metrics"] == callback.results
    assert all(layer["output_sqnr_db"]["w8a8"] > 20 for layer in report["layers"])
    assert report["seconds_per_batch"]["float"] > 0


def test_a_report_that_cannot_be_written_says_so_and_leaves_the_checkpoint(tmp_path):
    (tmp_path / "q.html").mkdir()
    callback = TinyQCallback(filename="q")
    with pytest.warns(UserWarning, match="report is not whole, the quantized checkpoint stands"):
        fit(tmp_path, callback)
    assert isinstance(callback.error, CheckpointError)
    assert re.search(r"(?s)the quantized checkpoint stands: .*q\.html: .*safe", str(callback.error))
    assert load_quantized(tmp_path / "q.ckpt", Net)


def test_the_yaml_says_why_for_each_layer_and_is_a_spec(tmp_path):
    rules = [{"match": "body.2", "method": "w8a8"}]
    callback = TinyQCallback({"exclude": ["head"], "rules": rules})
    path = fit(tmp_path, callback).with_suffix(".yaml")
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for name, method, reason in (
        ("body.0", "w8a32", "spec"),
        ("body.2", "w8a8", "rule 1"),
        ("head", "float", "excluded"),
    ):
        assert any(line.split()[1:4] == [name, method, reason.split()[0]] for line in comments)
    assert QuantizationSpec.from_yaml(path) == callback.plan.to_spec()
    assert "budget" not in yaml.safe_load(path.read_text())


def test_a_remote_folder_gets_the_report_too(tmp_path):
    import fsspec

    callback = TinyQCallback("w8a32", dirpath="memory://reports")
    run = trainer(tmp_path, callback)
    run.fit(Net(), loader(shuffle=True), loader(seed=1))
    names = {name.rpartition("/")[2] for name in fsspec.filesystem("memory").ls("/reports", detail=False)}
    assert {Path(name).suffix for name in names} == STEMS
    assert len(names) == 4


# On the screen


def test_the_screen_shows_the_comparison_and_every_layer_with_its_reason(tmp_path, capsys):
    fit(tmp_path, TinyQCallback("w8a32", exclude=["head"]))
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    assert ["head", "float", "excluded"] in [line[:3] for line in lines]
    assert ["body.0", "w8a32", "spec"] in [line[:3] for line in lines]
    assert "val_acc" in shown
    assert "\x1b" not in shown, "no colours where it is no terminal"


def test_a_long_plan_is_shown_in_groups_and_measured_in_full_by_its_worst_layers(tmp_path, capsys):
    callback = TinyQCallback("w8a32", exclude=["more.7"])
    fit(tmp_path / "grouped", callback, Odd())
    shown = capsys.readouterr().out
    rows = [line for line in shown.splitlines() if line.startswith("more.")]
    assert [row.split("  ")[0] for row in rows] == ["more.* ×49", "more.7"]
    worst = min((d for d in callback.plan if d.weight_sqnr_db), key=lambda d: d.weight_sqnr_db)
    assert f"lowest SQNR: {worst.name} {worst.weight_sqnr_db:.1f} dB" in shown
    fit(tmp_path / "full", TinyQCallback("w8a32", exclude=["more.7"], report="full"), Odd())
    shown = capsys.readouterr().out
    assert "more.7 " in shown
    assert sum(line.startswith("more.") for line in shown.splitlines()) < 42
    assert "… and" in shown
    assert f"\n{worst.name} " in shown


def test_a_list_of_methods_shows_each_layer_by_each_method(tmp_path, capsys):
    callback = TinyQCallback(["w8a32", "w4a8"], exclude=["head"])
    fit(tmp_path, callback)
    shown = capsys.readouterr().out.partition("layer: SQNR dB")[2].split("\n\n")[0].splitlines()
    rows = {row.split()[0]: row.split()[1:] for row in shown[2:]}
    one, other = ([each.weight_sqnr_db for each in callback.plans[name]] for name in ("w8a32", "w4a8"))
    figures = [[f"{a:.1f}", f"{b:.1f}"] for a, b in zip(one[:-1], other[:-1], strict=True)]
    assert rows == dict(zip(("body.0", "body.2", "head"), [*figures, ["float", "float"]], strict=True))


def test_a_terminal_gets_rich_tables(tmp_path):
    code = (
        "from models import *; from tinyq_lightning import TinyQCallback; import sys\n"
        "trainer(sys.argv[1], TinyQCallback('w8a32')).fit(Net(), loader(), loader(seed=1))"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
        "TERM": "xterm",
        "COLUMNS": "150",
    }
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)],
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 1 << 16):
            shown += chunk
    except OSError:  # the other end was closed
        pass
    assert process.wait() == 0
    assert b"\x1b[1mfloat" in shown.replace(b"\x1b[1m ", b"\x1b[1m").replace(b" ", b"") or b"\x1b[1m" in shown
    assert "val_acc" in shown.decode()


# In the loggers


class Tables(CSVLogger):
    """A logger that takes tables, by the signature of Lightning's WandbLogger."""

    tables: dict

    def log_table(self, key, columns=None, data=None, dataframe=None, step=None):
        vars(self).setdefault("tables", {})[key] = (columns, data, step)


def test_loggers_that_take_tables_or_text_get_them(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board, tables = TensorBoardLogger(tmp_path, name="tb"), Tables(tmp_path, name="csv")
    callback = TinyQCallback("w8a8")
    fit(tmp_path, callback, logger=[board, tables, CSVLogger(tmp_path, name="plain")])
    events = EventAccumulator(board.log_dir)
    events.Reload()
    tags = {f"tinyq/comparison/{'text_summary'}", "tinyq/layers/w8a8/text_summary"}
    assert tags <= set(events.Tags()["tensors"])
    text = events.Tensors("tinyq/layers/w8a8/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| body.0 | w8a8 | spec |" in text
    columns, data, step = tables.tables["tinyq/layers/w8a8"]
    assert columns[:3] == ["layer", "method", "reason"]
    assert [row[0] for row in data][:-1] == [decision.name for decision in callback.plan]
    assert step > 0


# In a browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with chromium(executable, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def report(tmp_path):
    """A report with everything on it: odd names, several methods, a search, what real batches show."""
    import torch

    module = Odd(depth=12)
    trainer(tmp_path, limit_val_batches=0).fit(module, loader(shuffle=True), loader(seed=1))
    with torch.no_grad():
        module.more[0].weight[:, 0] = 400
        module.more[0].weight[:, 1] = -400  # of a feature that equals the first: nothing changes in float
        first = module.body["<script>alert(1)</script>"]
        first.weight[1], first.bias[1] = first.weight[0], first.bias[0]
    methods = ["w8a32", "w8a8"]
    callback = TinyQCallback(methods, weights="current", monitor="val_loss", mode="min", max_drop=1e-4, report="full")
    trainer(tmp_path, callback, max_epochs=0).fit(module, loader(), loader(seed=1))
    return Path(callback.quantized_paths["w8a8"]).with_suffix(".html")


@pytest.mark.filterwarnings("ignore:TinyQ. .*budget NOT met")
def test_the_page_stands_alone_in_light_and_dark_and_on_a_phone(page, report, tmp_path):
    text = report.read_text()
    assert "http" not in text.replace("http-equiv", "")
    grounds = set()
    for width, scheme in ((1100, "light"), (1100, "dark"), (390, "light"), (390, "dark")):
        page.requests.clear()
        page.show(report, width, scheme=scheme)
        assert page.requests == [report.as_uri()], "one file, and no network"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing hangs over at the side"
        grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert (
            page.evaluate(
                "Math.min(...[...document.querySelectorAll('td, p, span, pre')].map(e => "
                "parseFloat(getComputedStyle(e).fontSize)))"
            )
            >= 12
        ), "large enough to read"
        page.screenshot(tmp_path / f"{width}-{scheme}.png")
    assert len(grounds) == 2
    assert page.errors == []


@pytest.mark.filterwarnings("ignore:TinyQ. .*budget NOT met")
def test_the_page_shows_the_run(page, report):
    content = json.loads(report.with_suffix(".json").read_text())
    page.show(report, 1000)
    assert page.evaluate("document.title").startswith(content["quantized_checkpoint"])
    assert page.evaluate("document.querySelector('header p').textContent").startswith(content["headline"])
    assert "% of the weight bytes in int8" in content["headline"]
    sections = page.evaluate("[...document.querySelectorAll('h2')].map(e => e.textContent)")
    assert sections == [
        "Before and after",
        "The search",
        "Which layer hurts?",
        "By kind of layer",
        "Layer by layer",
        "The plan as a spec",
    ]
    assert f"{torch.get_num_threads()} thread" in page.evaluate("document.querySelector('footer').textContent")
    # odd names are text
    names = page.evaluate(
        "[...document.querySelectorAll('section:nth-of-type(5) td:first-child')].map(e => e.textContent)"
    )
    assert names == [*(layer["name"] for layer in content["layers"]), f"{len(content['layers'])} layers"]
    # the bars are sorted
    widths = page.evaluate(
        "[...document.querySelectorAll('.wide .bar rect:last-child')].map(e => +e.getAttribute('width'))"
    )
    assert len(widths) == len(content["layers"])
    assert widths == sorted(widths, reverse=True)
    assert widths[0] == 100
    # every plan of the search is a dot, inside the drawing
    trials = [trial for trial in content["budget"]["trials"] if trial["lost"] is not None]
    assert page.evaluate("document.querySelectorAll('.curve circle').length") == len(trials)
    assert page.evaluate(
        "[...document.querySelectorAll('.curve circle, .curve text')].every(e => {"
        "const a = e.getBoundingClientRect(), b = e.closest('svg').getBoundingClientRect();"
        "return a.left >= b.left - 1 && a.right <= b.right + 1 && a.top >= b.top - 1"
        " && a.bottom <= b.bottom + 1; })"
    ), "drawn inside"
    # the button copies the spec, the very file
    page.evaluate("document.getElementById('copy').click()")
    assert page.evaluate("getSelection().toString().trim()") == report.with_suffix(".yaml").read_text().strip()
    assert page.evaluate("document.getElementById('spec').textContent") == report.with_suffix(".yaml").read_text()
    assert page.errors == []


def test_a_report_without_metrics_or_measurements_is_a_page_too(tmp_path):
    callback = TinyQCallback("w8a32")
    with pytest.warns(UserWarning, match="without a comparison"):
        trainer(tmp_path, callback, limit_val_batches=0).fit(Net(), loader(shuffle=True), loader(seed=1))
    content = json.loads(Path(callback.quantized_path).with_suffix(".json").read_text())
    assert content["metrics"] == {}
    assert content["seconds_per_batch"] == {"float": None, "w8a32": None}
    page = Path(callback.quantized_path).with_suffix(".html").read_text()
    assert "Before and after" in page
    assert "ms per batch" not in page


@pytest.mark.parametrize("ending", [".yaml", ".json", ".html"])
def test_a_file_of_the_users_is_not_replaced_by_a_report_but_an_earlier_report_is(tmp_path, ending):
    own = tmp_path / f"q{ending}"
    own.write_text("method: w8a32\n")
    for _ in range(2):
        (tmp_path / "q.ckpt").unlink(missing_ok=True)
        spec = {"method": "w8a32", "save": {"dirpath": str(tmp_path), "filename": "q"}}
        fit(tmp_path, TinyQCallback(spec))
        assert own.read_text() == "method: w8a32\n"
        assert {path.name for path in tmp_path.glob("q*")} == {
            "q.ckpt", own.name, "q-report.json", "q-report.yaml", "q-report.html"
        }  # fmt: skip
    assert 'TinyQCallback("q-report.yaml")' in (tmp_path / "q-report.yaml").read_text()
    assert QuantizationSpec.from_yaml(tmp_path / "q-report.yaml").method == "w8a32"


def test_what_the_budget_decided_is_told_by_the_plan_and_not_by_the_words_of_a_reason(tmp_path):
    rules = [{"match": "head", "method": "float", "reason": "budget of my own", "decided_by": "rule"}]
    path = fit(tmp_path, TinyQCallback({"method": "w8a32", "rules": rules}))
    layers = {layer["name"]: layer for layer in json.loads(path.with_suffix(".json").read_text())["layers"]}
    assert layers["head"]["decided_by"] == "rule"
    assert "w8a32, now float" not in path.with_suffix(".html").read_text()
