"""What a loop changes outside of objects is not put back, since users gather there what all loops did; it is told."""

from __future__ import annotations

from contextvars import ContextVar
from functools import lru_cache

import pytest
from models import Net, loader, trainer

from tinyq_lightning import TinyQCallback

COUNTS, METER = {"n": 0.0}, type("Meter", (), {"n": 0.0})()
TOTAL = 0


def count():
    COUNTS["n"] += 1


@lru_cache
def remembered(key):
    return key


class Global(Net):
    def test_step(self, batch, batch_idx):
        global TOTAL
        TOTAL += 1
        self.log("test_n", float(TOTAL))


class InAHelper(Net):
    def test_step(self, batch, batch_idx):
        count()


class AnObject(Net):
    def test_step(self, batch, batch_idx):
        METER.n += 1


class Default(Net):
    def test_step(self, batch, batch_idx, *, seen=[]):  # noqa: B006 - that it stays is what is tested
        seen.append(batch_idx)


class Attribute(Net):
    def test_step(self, batch, batch_idx):
        Attribute.test_step.last = batch_idx + getattr(Attribute.test_step, "last", 0) + 1


class Cache(Net):
    def test_step(self, batch, batch_idx):
        remembered(float(self(batch[0]).sum()))


class CachedMethod(Net):
    """Its features are computed once, by whichever model comes first."""

    @lru_cache  # noqa: B019 - as users write it
    def features(self):
        return float(self.head.bias.sum())

    def test_step(self, batch, batch_idx):
        self.log("test_m", self.features())


class DefaultOnTheModule(Net):
    """From the first call on, the list hangs on the module too."""

    def test_step(self, batch, batch_idx, *, seen=[]):  # noqa: B006
        seen.append(batch_idx)
        self.seen = seen


@lru_cache(None)
def box():
    return []


class InACache(Net):
    def test_step(self, batch, batch_idx):
        box().append(batch_idx)


class Single:
    one = None

    def __new__(cls):
        cls.one = cls.one or super().__new__(cls)
        return cls.one


class Singleton(Net):
    def test_step(self, batch, batch_idx):
        Single().n = getattr(Single(), "n", 0) + 1


class Kind(type):
    seen: list = []  # noqa: RUF012


class Made(metaclass=Kind):
    pass


class OnAMetaclass(Net):
    def test_step(self, batch, batch_idx):
        Made.seen.append(batch_idx)


VARIABLE = ContextVar("variable", default=0)


class InAContext(Net):
    def test_step(self, batch, batch_idx):
        VARIABLE.set(VARIABLE.get() + 1)


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        (Global, "the global TOTAL of "),
        (InAHelper, "the global COUNTS of "),
        (AnObject, "the global METER of "),
        (Default, "a default of Default.test_step"),
        (Attribute, "an attribute of Attribute.test_step"),
        (Cache, "the cache of remembered"),
        (CachedMethod, "the cache of features"),
        (DefaultOnTheModule, "a default of DefaultOnTheModule.test_step"),
        (InACache, "the cache of box"),
        (Singleton, "an attribute of Single"),
        (OnAMetaclass, "an attribute of Kind"),
        (InAContext, "the global VARIABLE of "),
    ],
)
@pytest.mark.filterwarnings("default:TinyQ. the test loop changed")
def test_what_is_changed_outside_of_objects_is_told(tmp_path, kind, where):
    callback = TinyQCallback("w8a8", when="test_start", report=False, save=False)
    with pytest.warns(UserWarning, match=f"the test loop changed what is not put back .*{where}"):
        trainer(tmp_path, callback).test(kind(), loader(), verbose=False)


@pytest.mark.filterwarnings("error:TinyQ")
def test_a_variable_that_a_step_closes_over_is_told_and_kept(tmp_path):
    seen, total = [], 0.0

    class Closes(Net):
        def test_step(self, batch, batch_idx):
            nonlocal total
            total += 1
            seen.append(batch_idx)

    callback = TinyQCallback("w8a8", when="test_start", report=False, save=False)
    with pytest.warns(UserWarning, match=r"seen, which .*Closes.test_step closes over, total, which"):
        trainer(tmp_path, callback).test(Closes(), loader(), verbose=False)
    assert len(seen) == total == 2 * len(loader())


@pytest.mark.filterwarnings("error:TinyQ")
def test_a_loop_that_changes_nothing_outside_is_not_warned_of(tmp_path):
    callback = TinyQCallback("w8a8", when="test_start", report=False, save=False)
    trainer(tmp_path, callback).test(Net(), loader(), verbose=False)
    assert callback.results


class Holder:
    items: list = []  # noqa: RUF012 - shared on purpose


class OnAClassOfAClass(Net):
    kept = Holder

    def test_step(self, batch, batch_idx):
        self.kept.items.append(float(self(batch[0]).abs().sum()))

    def on_test_epoch_end(self):
        self.log("test_m", float(sum(self.kept.items)))


class OnTheTrainer(Net):
    def test_step(self, batch, batch_idx):
        self.trainer.total = getattr(self.trainer, "total", 0.0) + float(self(batch[0]).abs().sum())

    def on_test_epoch_end(self):
        self.log("test_m", self.trainer.total)


@pytest.mark.parametrize("kind", [OnAClassOfAClass, OnTheTrainer])
def test_counts_on_the_class_of_a_class_and_on_the_trainer_are_each_models_own(tmp_path, kind):
    module = kind()
    alone = trainer(tmp_path).test(module, loader(), verbose=False)[0]["test_m"]
    Holder.items.clear()
    callback = TinyQCallback("w8a8", when="test_start", report=False, save=False)
    trainer(tmp_path, callback).test(module, loader(), verbose=False)
    Holder.items.clear()
    assert callback.results["test_m"]["float"] == pytest.approx(alone)
