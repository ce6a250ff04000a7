"""What the callback promises of a test run: float and int8 in one pass, and the module float again afterwards."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path

import pytest
import torch
from lightnings import Callback, LambdaCallback, TQDMProgressBar, seed_everything
from models import Net, NetOfHooks, keeper, loader, trainer
from torch import nn

import tinyq_lightning.callback
from tinyq_lightning import QuantizationSpec, TinyQCallback, load_quantized
from tinyq_lightning.errors import EvaluationError, ModelError, SpecError
from tinyq_lightning.layers.linear import QuantizedLinear
from tinyq_lightning.trainer import test_run


def quiet(*args, **kwargs):
    return TinyQCallback(*args, when="test_start", report=False, **kwargs)


def trained(root, kind=Net):
    """The path of a float checkpoint."""
    seed_everything(1, verbose=False)
    run = trainer(root, keeper(root))
    run.fit(kind(), loader(shuffle=True), loader(seed=1))
    return run.checkpoint_callback.best_model_path


def separately_tested(root, module, *loaders):
    outputs = trainer(root).test(module, list(loaders), verbose=False)
    return {name: value for output in outputs for name, value in output.items()}


@pytest.mark.parametrize("workers", [{}, {"num_workers": 1, "persistent_workers": True}], ids=["inline", "persistent"])
@pytest.mark.parametrize("kind", [Net, NetOfHooks])
def test_results_are_those_of_separate_tests_and_the_users_keys_report_int8(tmp_path, kind, workers):
    path, callback = trained(tmp_path, kind), quiet("w8a8")
    data = loader(seed=2, **workers)
    returned = trainer(tmp_path, callback).test(kind(), data, ckpt_path=path, verbose=False, weights_only=True)[0]
    floats = separately_tested(tmp_path, kind.load_from_checkpoint(path, weights_only=True), data)
    int8 = separately_tested(tmp_path, load_quantized(callback.quantized_path, kind), data)
    assert {name: values["float"] for name, values in callback.results.items()} == floats
    assert {name: values["w8a8"] for name, values in callback.results.items()} == int8
    assert {name: returned[name] for name in int8} == int8
    for name in int8:
        assert returned[f"tinyq/{name}/float"] == floats[name]
        assert returned[f"tinyq/{name}/w8a8"] == int8[name]
        assert returned[f"tinyq/{name}/delta"] == pytest.approx(int8[name] - floats[name], abs=1e-6)
    assert returned["tinyq/size_mb/w8a8"] < returned["tinyq/size_mb/float"]


def test_several_dataloaders_and_several_callbacks(tmp_path):
    path, callbacks = trained(tmp_path), [quiet("w8a32"), quiet("w8a8"), quiet("w8a16", exclude=["head"])]
    loaders = [loader(seed=2), loader(seed=3, count=64)]
    module = Net()
    outputs = trainer(tmp_path, *callbacks).test(module, loaders, ckpt_path=path, verbose=False, weights_only=True)
    returned = {name: value for output in outputs for name, value in output.items()}
    floats = separately_tested(tmp_path, Net.load_from_checkpoint(path, weights_only=True), *loaders)
    for callback, method in zip(callbacks, ("w8a32", "w8a8", "w8a16"), strict=True):
        int8 = separately_tested(tmp_path, load_quantized(callback.quantized_path, Net), *loaders)
        assert {name: values["float"] for name, values in callback.results.items()} == floats
        assert {name: values[method] for name, values in callback.results.items()} == int8
        for name, value in int8.items():
            assert returned[f"tinyq/{name}/{method}"] == pytest.approx(value)
            delta = "delta" if method == "w8a32" else f"delta/{method}"
            assert returned[f"tinyq/{name}/{delta}"] == pytest.approx(value - floats[name], abs=1e-6)
    assert returned["test_acc/dataloader_idx_0"] == callbacks[0].results["test_acc/dataloader_idx_0"]["w8a32"]
    assert not any(isinstance(each, QuantizedLinear) for each in module.modules())


@pytest.mark.parametrize("argument", [{"weights": "last"}, {"weights": "best"}, {"monitor": "val_acc"}])
def test_an_argument_that_a_test_run_does_not_look_at_is_refused_by_name(argument):
    ((name, value),) = argument.items()
    with pytest.raises(
        SpecError, match=f"argument: {name}='{value}' chooses weights at the end of a fit.*leave {name}"
    ):
        TinyQCallback("w8a32", when="test_start", **argument)


def test_a_spec_that_a_test_run_does_not_look_at_is_refused_by_line_and_one_for_fits_may_be_used_again(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text("method: w8a32\nwhen: test_start\nweights: last\n")
    with pytest.raises(SpecError, match=r"spec\.yaml:3 \(weights\): weights='last' chooses"):
        TinyQCallback(str(path))
    path.write_text("method: w8a32\nweights: last\n")
    assert TinyQCallback(str(path), when="test_start").spec.weights == "last"
    assert TinyQCallback(QuantizationSpec.from_dict({"when": "test_start"})).spec.when == "test_start"


def test_callbacks_of_one_method_have_keys_of_their_own(tmp_path):
    path, callbacks = trained(tmp_path), [quiet("w8a8"), quiet("w8a8", exclude=["body"])]
    for _ in range(2):
        run = trainer(tmp_path, *callbacks)
        (returned,) = run.test(Net(), loader(seed=2), ckpt_path=path, verbose=False, weights_only=True)
        for callback, name in zip(callbacks, ("w8a8", "w8a8-v1"), strict=True):
            assert returned[f"tinyq/test_loss/{name}"] == pytest.approx(callback.results["test_loss"][name])
        assert returned["tinyq/size_mb/w8a8"] < returned["tinyq/size_mb/w8a8-v1"]


def test_the_module_is_float_again_and_trains(tmp_path):
    path, module = trained(tmp_path), Net()
    handle = module.head.register_forward_hook(lambda *_: None)
    before = {name: id(each) for name, each in module.named_modules()}
    trainer(tmp_path, quiet("w8a32")).test(module, loader(seed=2), ckpt_path=path, verbose=False, weights_only=True)
    assert {name: id(each) for name, each in module.named_modules()} == before
    floats = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(value, floats[name]) for name, value in module.state_dict().items())
    assert list(module.head._forward_hooks) == [handle.id]
    assert not {"on_test_epoch_end", "on_load_checkpoint"} & set(vars(module))
    assert not any(tensor.is_inference() for tensor in [*module.parameters(), *module.buffers()])
    trainer(tmp_path).fit(module, loader(shuffle=True), loader(seed=1))


def test_the_float_step_draws_the_random_numbers_of_the_int8_step(tmp_path):
    class Draws(Net):
        def test_step(self, batch, batch_idx):
            self.log("test_draw", torch.rand(()))

    callback = quiet("w8a32")
    run = trainer(tmp_path, callback)
    seed_everything(3, verbose=False)
    run.test(Draws(), loader(seed=2), verbose=False)
    after = torch.rand(3)
    assert callback.results["test_draw"]["delta"] == 0
    seed_everything(3, verbose=False)
    trainer(tmp_path).test(Draws(), loader(seed=2), verbose=False)
    assert torch.equal(after, torch.rand(3)), "the test left another random state than without the callback"


def test_hooks_at_the_start_see_the_layers_that_are_tested(tmp_path):
    class Anchored(Net):
        def on_test_start(self):
            self.anchor = self(torch.ones(1, 8)).sum()

        def test_step(self, batch, batch_idx):
            super().test_step(batch, batch_idx)
            self.log("test_anchor", self.anchor)

    path, callback = trained(tmp_path), quiet("w8a8")
    trainer(tmp_path, callback).test(Anchored(), loader(seed=2), ckpt_path=path, verbose=False, weights_only=True)
    floats = separately_tested(tmp_path, Anchored.load_from_checkpoint(path, weights_only=True), loader(seed=2))
    assert callback.results["test_anchor"]["float"] == floats["test_anchor"]
    assert callback.results["test_anchor"]["delta"] != 0


def test_a_failing_test_step_leaves_the_module_float(tmp_path):
    class Fails(Net):
        def test_step(self, batch, batch_idx):
            raise ValueError("no")

    module = Fails()
    before = [id(each) for each in module.modules()]
    with pytest.raises(ValueError, match="no"):
        trainer(tmp_path, quiet("w8a32")).test(module, loader(), verbose=False)
    assert [id(each) for each in module.modules()] == before
    assert not {"on_test_epoch_end", "on_load_checkpoint"} & set(vars(module))


def test_without_ckpt_path_the_modules_own_weights_are_tested_and_written_below_the_root(tmp_path):
    callback, module = quiet("w8a32"), Net()
    trainer(tmp_path, callback).test(module, loader(), verbose=False)
    assert callback.float_path is None
    assert callback.quantized_path == str(tmp_path / "w8a32-epoch=0-step=0.ckpt")
    assert torch.equal(load_quantized(callback.quantized_path, Net).head.bias, module.head.bias)


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_a_step_that_takes_an_iterator_is_refused(tmp_path):
    class Iterates(Net):
        def test_step(self, dataloader_iter):
            next(dataloader_iter)

    with pytest.raises(EvaluationError, match="dataloader_iter"):
        trainer(tmp_path, quiet("w8a32")).test(Iterates(), loader(), verbose=False)


def test_a_module_that_is_quantized_already_is_not_compared_with_itself(fitted, tmp_path):
    module = load_quantized(fitted[0].quantized_path, Net)
    with pytest.raises(ModelError, match=r"nothing to quantize.*head: already quantized"):
        trainer(tmp_path, quiet("w8a8")).test(module, loader(), verbose=False)


def test_a_pattern_that_matches_nothing_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"'hed' matches no layer\. Did you mean 'head'"):
        trainer(tmp_path, quiet("w8a32", exclude=["hed"])).test(Net(), loader(), verbose=False)


def test_a_callback_for_fits_tells_in_a_test_of_a_float_model_how_to_quantize_there(tmp_path, monkeypatch):
    path = trained(tmp_path)
    callback, told = TinyQCallback("w8a32", report=False), []
    monkeypatch.setattr(tinyq_lightning.callback, "rank_zero_info", told.append)
    trainer(tmp_path, callback).test(Net(), loader(seed=2), ckpt_path=path, verbose=False, weights_only=True)
    assert told == ["TinyQ: the float model is tested: quantizing it here takes when='test_start'"]
    assert callback.plan is None
    both = [quiet("w8a32"), callback, TinyQCallback("w8a8", report=False)]
    trainer(tmp_path, *both).test(Net(), loader(seed=2), ckpt_path=path, verbose=False, weights_only=True)
    assert len(told) == 1


def test_a_file_that_says_something_else_stays_and_the_next_one_has_a_version(tmp_path):
    path = trained(tmp_path)
    stem = Path(path).stem

    def tested(data=None, **settings):
        callback = TinyQCallback("w8a32", when="test_start", **settings)
        trainer(tmp_path, callback).test(Net(), data or loader(seed=2), ckpt_path=path, weights_only=True)
        return Path(callback.quantized_path).name

    first = f"w8a32-{stem}.ckpt"
    assert tested() == first
    files = {each: each.read_bytes() for each in tmp_path.glob("w8a32-*")}
    assert len(files) > 1  # its report
    assert tested(exclude=["head"]) == f"w8a32-{stem}-v1.ckpt"
    assert tested(loader(seed=3)) == f"w8a32-{stem}-v2.ckpt", "the metrics are others"
    assert {each: each.read_bytes() for each in files} == files
    assert tested() == first, "the same once more"
    (tmp_path / f"w8a32-{stem}-v3.ckpt").write_text("a file of the user's")
    assert tested(loader(seed=4)) == f"w8a32-{stem}-v4.ckpt"
    assert tested(loader(seed=4), filename="mine") == "mine.ckpt"
    assert tested(filename="mine") == "mine.ckpt", "a name that was asked for is taken"


def test_a_quantized_file_follows_its_float_file_and_what_has_none_stays(tmp_path):
    path = trained(tmp_path)
    for width, warned in (
        (16, nullcontext()),
        (24, pytest.warns(UserWarning, match="another float checkpoint was rep")),
    ):
        run, callback = trainer(tmp_path), quiet("w8a32")
        run.strategy.connect(Net(width))
        torch.save({**torch.load(path, weights_only=True), "state_dict": Net(width).state_dict()}, path)
        with warned:
            trainer(tmp_path, callback).test(Net(width), loader(seed=2), ckpt_path=path, weights_only=True)
        assert Path(callback.quantized_path).name == f"w8a32-{Path(path).stem}.ckpt"
    names = []
    for seed in (1, 2):  # weights of the module itself, which are in no other file
        seed_everything(seed, verbose=False)
        callback = TinyQCallback("w8a32", weights="current", report=False)
        trainer(tmp_path / "none", callback, enable_checkpointing=False).fit(Net(), loader(), loader(seed=1))
        names.append(callback.quantized_path)
    assert names[1] == names[0].replace(".ckpt", "-v1.ckpt")


def test_nothing_happens_in_a_fit(tmp_path):
    callback = quiet("w8a32")
    trainer(tmp_path, callback, keeper(tmp_path)).fit(Net(), loader(), loader(seed=1))
    assert callback.results == {}
    assert callback.quantized_path is None


def test_fit_and_test_callbacks_in_one_trainer(tmp_path):
    at_end, at_test = TinyQCallback("w8a32", report=False), quiet("w8a8")
    run = trainer(tmp_path, keeper(tmp_path), at_end, at_test)
    run.fit(Net(), loader(shuffle=True), loader(seed=1))
    run.test(dataloaders=loader(seed=2), ckpt_path="best", verbose=False)
    assert set(at_end.results["val_acc"]) == {"float", "w8a32", "delta"}
    assert set(at_test.results["test_acc"]) == {"float", "w8a8", "delta"}
    assert at_end.float_path == at_test.float_path


class Opened:
    """What a hostile file would have run; a class of this module, so that it can be pickled by name."""

    times = 0

    def __setstate__(self, state):
        type(self).times += 1


def test_a_checkpoint_is_read_once_and_by_lightning(tmp_path):
    path = trained(tmp_path)
    content = torch.load(path, weights_only=True)
    content["extra"] = Opened()
    content["extra"].value = 1
    torch.save(content, path)
    callback = quiet("w8a32", save=False)
    run = trainer(tmp_path, callback)
    run.test(Net(), loader(), ckpt_path=path, verbose=False, weights_only=False)
    assert Opened.times == 1


def test_a_quantized_file_that_fails_to_load_leaves_the_float_weights_as_they_were(fitted, tmp_path):
    class Refusing(Net):
        def on_load_checkpoint(self, checkpoint):
            raise RuntimeError("not this one")

    module = Refusing()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(RuntimeError, match="not this one"):
        trainer(tmp_path, quiet()).test(module, loader(), ckpt_path=fitted[0].quantized_path, verbose=False)
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


class FailsAsFloat(Net):
    def test_step(self, batch, batch_idx, dataloader_idx=0):
        if not isinstance(self.head, QuantizedLinear):
            raise ValueError("no float")
        super().test_step(batch, batch_idx)


def test_a_failing_comparison_ends_the_test_as_without_us(tmp_path):
    callbacks, module = [quiet("w8a32"), quiet(["w8a8", "w8a16"])], FailsAsFloat()
    run = trainer(tmp_path, *callbacks)
    with pytest.warns(UserWarning, match="Testing the models to compare with failed"):
        returned = run.test(module, loader(), verbose=False)[0]
    assert set(returned) == {"test_acc", "test_f1", "test_recall", "test_loss"}
    for callback in callbacks:
        assert isinstance(callback.error, EvaluationError)
        assert callback.results == callback.quantized_paths == {}
    assert module._current_fx_name is None
    assert run._logger_connector._current_fx is None
    assert not any(isinstance(each, QuantizedLinear) for each in module.modules())


def test_strict_raises_a_failing_comparison_and_leaves_no_trace_of_it(tmp_path):
    run, module = trainer(tmp_path, quiet("w8a32", strict=True)), FailsAsFloat()
    with pytest.raises(EvaluationError, match="no float"):
        run.test(module, loader(), verbose=False)
    assert module._current_fx_name is None
    assert run._logger_connector._current_fx is None
    assert not any(name.startswith("_tinyq") for name in vars(run.test_loop))


def test_a_test_of_a_quantized_file_leaves_the_loop_and_the_results_of_a_fit(fitted, tmp_path):
    at_fit, at_test = fitted[0], quiet("w8a8")
    before, results = dict(at_fit.quantized_paths), dict(at_fit.results)
    run = trainer(tmp_path, at_fit, at_test)
    own = set(vars(run.test_loop))
    run.test(Net(), loader(), ckpt_path=at_fit.quantized_path, verbose=False)
    assert set(vars(run.test_loop)) == own
    assert (at_fit.quantized_paths, at_fit.results) == (before, results)
    assert list(at_test.results["test_acc"]) == ["w8a32"]


def test_layers_of_a_second_callback_are_measured_on_as_many_batches_as_those_of_the_first(tmp_path):
    callbacks = [TinyQCallback(method, when="test_start", report="full") for method in ("w8a32", "w8a8")]
    counts = []

    class Counts(Net):
        def test_step(self, batch, batch_idx, dataloader_idx=0):
            counts.append(len(self.head._forward_hooks))
            super().test_step(batch, batch_idx)

    trainer(tmp_path, *callbacks).test(Counts(), loader(batch_size=8), verbose=False)
    assert counts[0] > 0
    assert counts[23] == 0


class Average(Callback):
    """Tests three times the weights, as a moving average that is put in for the test would be."""

    def on_test_start(self, trainer, pl_module):
        self.own = [each.detach().clone() for each in pl_module.parameters()]
        with torch.no_grad():
            for each in pl_module.parameters():
                each.mul_(3)

    def on_test_end(self, trainer, pl_module):
        with torch.no_grad():
            for each, own in zip(pl_module.parameters(), self.own, strict=True):
                each.copy_(own)


def test_weights_that_a_callback_before_it_puts_in_for_the_test_are_those_of_the_file(tmp_path):
    module = Net()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    callback = quiet(["w8a32", "w8a8"])
    trainer(tmp_path, Average(), callback).test(module, loader(), verbose=False)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    for method, path in callback.quantized_paths.items():
        alone = separately_tested(tmp_path, load_quantized(path, Net), loader())
        assert alone == {name: pytest.approx(each[method]) for name, each in callback.results.items()}


class Normed(Net):
    scale = 1.0

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        return super().forward(self.norm(x) * self.scale)


class AverageOfStatistics(Callback):
    """Sets what normalizes and a flag for the test."""

    def on_test_start(self, trainer, pl_module):
        self.own, pl_module.scale = pl_module.norm.running_mean.clone(), 2.0
        pl_module.norm.running_mean.add_(1)

    def on_test_end(self, trainer, pl_module):
        pl_module.norm.running_mean.copy_(self.own)
        del pl_module.scale


class AverageOfNothing(Callback):
    def on_test_start(self, trainer, pl_module):
        pl_module.flag = 1


class ExchangesStatistics(AverageOfStatistics):
    """Puts another buffer in."""

    def on_test_start(self, trainer, pl_module):
        self.own, pl_module.scale = pl_module.norm.running_mean, 2.0
        pl_module.norm.running_mean = self.own + 1

    def on_test_end(self, trainer, pl_module):
        pl_module.norm.running_mean = self.own
        del pl_module.scale


class WithBatches(AverageOfStatistics):
    """All its hooks run again for each model."""

    def on_test_batch_start(self, *args):
        pass


@pytest.mark.parametrize("kind", [AverageOfStatistics, ExchangesStatistics, WithBatches])
def test_buffers_and_flags_that_an_earlier_callback_sets_for_the_test_are_those_of_each_model(tmp_path, kind):
    module = Normed()
    alone = trainer(tmp_path, kind()).test(module, loader(), verbose=False)[0]
    callback = quiet("w8a32", save=False)
    trainer(tmp_path, kind(), callback).test(module, loader(), verbose=False)
    assert {name: values["float"] for name, values in callback.results.items()} == alone
    assert (module.scale, module.norm.running_mean.abs().max()) == (1.0, 0.0)


class CountsItsHooks(Net):
    evaluated = started = 0

    def on_test_model_eval(self):
        self.evaluated += 1
        super().on_test_model_eval()

    def on_test_start(self):
        self.started += 1

    def test_step(self, batch, batch_idx):
        super().test_step(batch, batch_idx)
        self.log_dict({"evaluated": float(self.evaluated), "started": float(self.started)})


def test_what_the_modules_own_hooks_set_is_set_once(tmp_path):
    callback = quiet(["w8a32", "w8a8"], save=False)
    trainer(tmp_path, AverageOfNothing(), callback).test(CountsItsHooks(), loader(), verbose=False)
    for name in ("evaluated", "started"):
        assert [callback.results[name][each] for each in ("float", "w8a32", "w8a8")] == [1.0, 1.0, 1.0]


def test_nothing_is_copied_where_no_other_callback_ends_the_test(tmp_path, monkeypatch):
    def float_values(*_):
        raise AssertionError("copied")

    monkeypatch.setattr(test_run, "float_values", float_values)
    for others, copied in (([], False), ([TQDMProgressBar()], False), ([LambdaCallback(on_test_end=print)], True)):
        callback = quiet("w8a32")
        run = trainer(tmp_path, callback, *others, enable_progress_bar=bool(others))
        with pytest.raises(AssertionError, match="copied") if copied else nullcontext():
            run.test(Net(), loader(), verbose=False)
        assert copied or callback.quantized_path


class AverageOfAll(Average):
    """Puts in what it has copied of all weights before the test begins."""

    def setup(self, trainer, pl_module, stage):
        self.average = [each.detach().clone() for each in pl_module.parameters()]

    def on_test_start(self, trainer, pl_module):
        super().on_test_start(trainer, pl_module)
        with torch.no_grad():
            for each, average in zip(pl_module.parameters(), self.average, strict=True):
                each.copy_(average)


class Broken(Net):
    def test_step(self, batch, batch_idx):
        raise ValueError("of the user's own")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have notes from Python 3.11 on")
def test_an_average_after_it_is_told_to_come_before_it_and_other_errors_are_left_alone(tmp_path):
    with pytest.raises(RuntimeError, match="size of tensor") as late:
        trainer(tmp_path, quiet("w8a32"), AverageOfAll()).test(Net(), loader(), verbose=False)
    assert "comes before TinyQCallback" in late.value.__notes__[0]
    with pytest.raises(ValueError, match="of the user's own") as other:
        trainer(tmp_path, AverageOfAll(), quiet("w8a32"), Average()).test(Broken(), loader(), verbose=False)
    assert not hasattr(other.value, "__notes__")


class Prototypes(nn.Module):
    """Keeps what it computes once; ``known`` before the test."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 4)

    @cached_property
    def centers(self):
        return self.linear(torch.ones(8)).detach()

    @cached_property
    def known(self):
        return self.linear(-torch.ones(8)).detach()


class WithPrototypes(Net):
    def __init__(self, width=16, lr=0.02):
        super().__init__(width, lr)
        self.prototypes = Prototypes()

    @cached_property
    def all(self):
        return self.prototypes.centers.sum()

    def test_step(self, batch, batch_idx):
        super().test_step(batch, batch_idx)
        self.log("centers", self.all + self.prototypes.known.sum())


def test_what_the_quantized_model_has_computed_once_is_not_taken_for_the_float_ones(tmp_path):
    seed_everything(1, verbose=False)
    module, callback = WithPrototypes(), quiet("w8a8", save=False)
    known, want = module.prototypes.known, module.prototypes.linear(torch.ones(8)).detach()
    trainer(tmp_path, callback).test(module, loader(seed=2), verbose=False)
    assert callback.results["centers"]["float"] == pytest.approx(float((want + known).sum()))
    assert callback.results["centers"]["delta"] != 0
    assert torch.equal(module.prototypes.centers, want)
    assert module.all == want.sum()
    assert module.prototypes.known is known


class ReadsOn(Net):
    """Its iterator has nothing left when the second model is tested."""

    def __init__(self, width=16, lr=0.02):
        super().__init__(width, lr)
        self.factors = (factor for factor in (1.0, 2.0))

    def test_step(self, batch, batch_idx):
        self.log("factor", next(self.factors, 0.0))


def test_an_iterator_that_the_first_model_has_read_to_its_end_is_named(tmp_path):
    with pytest.warns(UserWarning, match=r"cannot be put back \(ReadsOn\.factors\)"):
        trainer(tmp_path, quiet("w8a8", save=False)).test(ReadsOn(), loader(seed=2), verbose=False)
