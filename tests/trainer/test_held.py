"""State that hangs on threads, contexts, queues, classes and tables is put back as well."""

from __future__ import annotations

import itertools
import queue
import threading
import types
import weakref
from contextvars import ContextVar
from typing import ClassVar

import pytest
import torch
from models import Net, loader, trainer
from torch import nn

from tinyq_lightning import TinyQCallback, quantize
from tinyq_lightning.trainer.isolation import Snapshot


class Stats:
    """Counts on the class, which is held itself."""

    total = 0
    rows: ClassVar[list] = []

    @classmethod
    def add(cls, count):
        cls.total += count
        cls.rows.append(count)


class Registered(type):
    counts: ClassVar[dict] = {"n": 0}


class OfMeta(metaclass=Registered):
    pass


class Key:
    pass


def on_a_thread():
    local = threading.local()
    local.n = 0
    return local, lambda count: setattr(local, "n", local.n + count), lambda: local.n


def in_a_context():
    variable = ContextVar("total", default=None)
    variable.set([0])
    return variable, lambda count: variable.set([*variable.get(), count]), lambda: variable.get()


def in_a_context_by_default():
    variable = ContextVar("total", default=0)
    return variable, lambda count: variable.set(variable.get() + count), lambda: variable.get()


def in_a_queue(kind):
    held = kind()
    return held, held.put, lambda: (list(held.queue), held.unfinished_tasks)


def by_weak_key():
    key, held = Key(), weakref.WeakKeyDictionary()
    held[key] = 0
    return (key, held), lambda count: held.__setitem__(key, held[key] + count), lambda: held[key]


def small_parameter():
    held = nn.Parameter(torch.zeros(2), requires_grad=False)
    return held, lambda count: held.add_(count), held.tolist


def view():
    held = memoryview(bytearray(2))
    return held, lambda count: held.__setitem__(0, count), held.tolist


def low_discrepancy():
    held = torch.quasirandom.SobolEngine(1, scramble=True, seed=0)
    return held, held.draw, lambda: (held.num_generated, held.quasi.tolist())


def appended():
    rows = []
    return rows.append, rows.append, lambda: list(rows)


PLACES = {
    "thread": on_a_thread,
    "context": in_a_context,
    "context by default": in_a_context_by_default,
    "queue": lambda: in_a_queue(queue.Queue),
    "priority queue": lambda: in_a_queue(queue.PriorityQueue),
    "weak keys": by_weak_key,
    "class": lambda: (Stats, Stats.add, lambda: (Stats.total, list(Stats.rows))),
    "metaclass": lambda: (OfMeta(), lambda n: Registered.counts.update(n=n), Registered.counts.copy),
    "namespace": lambda: (held := types.SimpleNamespace(n=0), lambda n: setattr(held, "n", n), lambda: held.n),
    "parameter": small_parameter,
    "view": view,
    "low discrepancy": low_discrepancy,
    "method of a list": appended,
}


@pytest.mark.parametrize("name", PLACES)
def test_state_is_put_back_wherever_it_hangs(name):
    held, add, shown = PLACES[name]()
    module = nn.Module()
    module.held = {"deep": [held]} if name != "parameter" else None
    if name == "parameter":
        module.count = held
    before, snapshot = shown(), Snapshot(module)
    add(3)
    assert shown() != before, "the test changes nothing"
    assert snapshot.put_back() == []
    assert shown() == before


def test_a_queue_without_a_look_inside_is_named():
    module = nn.Module()
    module.held = queue.SimpleQueue()
    snapshot = Snapshot(module)
    assert snapshot.put_back() == []
    module.held.put(1)
    assert snapshot.put_back() == ["Module.held"]


def numbers():
    yield from range(9)


ITERATORS = {
    "count": itertools.count,
    "zip of a generator": lambda: zip(numbers(), range(9), strict=False),
    "map of a generator": lambda: map(len, ([each] for each in range(9))),
    "list of functions": lambda: iter([len, lambda: 0]),
    "chain": lambda: itertools.chain(range(3), numbers()),
}


def steps():
    at = 1000
    while True:
        yield at
        at += 1


STARTED = {"yield from": numbers, "loop": lambda: (each for each in range(9)), "steps": steps}


@pytest.mark.parametrize("name", STARTED)
def test_a_generator_that_has_begun_is_named_if_it_was_read_on(name):
    module = nn.Module()
    module.held = STARTED[name]()
    next(module.held)
    snapshot = Snapshot(module)
    assert snapshot.put_back() == []
    for _ in range(2):  # twice: a number that was let go gives its memory to the next
        next(module.held)
        assert snapshot.put_back() == ["Module.held"]


@pytest.mark.parametrize("name", ITERATORS)
def test_an_iterator_is_named_if_it_was_read(name):
    module = nn.Module()
    module.held = ITERATORS[name]()
    snapshot = Snapshot(module)
    assert snapshot.put_back() == []
    next(module.held)
    assert snapshot.put_back() == ["Module.held"]


def test_what_is_too_large_to_copy_and_what_lies_in_a_database_is_named():
    sqlite3 = pytest.importorskip("sqlite3")
    module = nn.Linear(2, 2)
    module.held = sqlite3.connect(":memory:")
    module.held.execute("create table totals(n)")
    snapshot = Snapshot(module)
    assert snapshot.put_back() == []
    module.held.execute("insert into totals values(1)")
    with torch.no_grad():
        module.weight.add_(1)
    assert sorted(snapshot.put_back()) == ["Linear._parameters['weight']", "Linear.held"]
    module.held.close()


@pytest.mark.parametrize("way", ["column", "cell", "row"])
def test_a_table_is_put_back(way):
    pandas = pytest.importorskip("pandas")
    module = nn.Module()
    module.table = pandas.DataFrame({"n": [0.0], "words": ["a"]})
    before, snapshot = module.table.copy(), Snapshot(module)
    if way == "column":
        module.table["n"] += 1
    elif way == "cell":
        module.table.loc[0, "n"] = 1
    else:
        module.table.loc[len(module.table)] = [1.0, "b"]
    assert not module.table.equals(before)
    for _ in range(2):
        snapshot.put_back()
        assert module.table.equals(before)
        module.table["n"] += 1


class CountsOnAClass(Net):
    """Counts with a class that it holds, and with a method of a list."""

    def __init__(self):
        super().__init__()
        self.stats, self.append = Stats, [].append

    def test_step(self, batch, batch_idx):
        right = int((self(batch[0]).argmax(1) == batch[1]).sum())
        self.append(right)
        self.stats.add(right)

    def on_test_epoch_end(self):
        self.log("right", float(sum(self.append.__self__)))
        self.log("right_of_class", float(self.stats.total))


def test_each_column_of_a_test_is_what_a_separate_run_gives(tmp_path, monkeypatch):
    monkeypatch.setattr(Stats, "total", 0)
    module = CountsOnAClass()
    callback = TinyQCallback("w8a8", when="test_start", report=False, save=False)
    trainer(tmp_path, callback).test(module, loader(seed=2), verbose=False)
    for column in ("float", "w8a8"):
        Stats.total = 0
        alone = CountsOnAClass()
        alone.load_state_dict(module.state_dict())
        if column != "float":
            quantize(alone, "w8a8")
        logged = trainer(tmp_path).test(alone, loader(seed=2), verbose=False)[0]
        assert {name: values[column] for name, values in callback.results.items()} == logged
