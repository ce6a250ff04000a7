"""An evaluation leaves everything as it was, and begins where a run of its own would begin."""

from __future__ import annotations

import array
import io
import itertools
import random
import warnings
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pytest
import torch
from models import Data, Net, has_trained, keeper, loader, trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from tinyq_lightning import TinyQCallback, quantize, quantized
from tinyq_lightning.trainer.batches import KeptBatches, batch_digest
from tinyq_lightning.trainer.isolation import Snapshot


@dataclass
class Record:
    losses: list = field(default_factory=list)
    count: int = 0


class Slotted:
    __slots__ = ("total",)

    def __init__(self):
        self.total = 0


class Hidden(Slotted):
    """As paths of Python 3.13: a property that cannot be set has the name of a slot."""

    __slots__ = ()
    total = property(lambda self: Slotted.total.__get__(self))

    def __init__(self):
        Slotted.total.__set__(self, 0)


class AttrDict(dict):
    """Raises no AttributeError for what it lacks."""

    def __getattr__(self, name):
        return self[name]


class NotReady:
    """Raises for what it lacks, and has slots only."""

    __slots__ = ("total",)

    def __init__(self):
        self.total = []

    def __getattr__(self, name):
        raise RuntimeError("not ready")

    def __str__(self):
        return str(self.total)


class Meter:
    seen: ClassVar[list] = []

    def __init__(self):
        self.sum = 0.0

    def update(self, value):
        self.sum += float(value)
        self.seen.append(value)


class Listed(list):
    def clear(self):
        raise AssertionError("the subclass has its own idea of this")


def grow(mapping):
    mapping["new"] = 1


def add_one(value):
    value += 1


CHANGES = {
    "list": (list, lambda held: held.append(1)),
    "list subclass": (Listed, lambda held: held.append(1)),
    "nested": (lambda: {"a": [[], (set(), {})]}, lambda held: held["a"][1][1].update(b=1)),
    "defaultdict": (lambda: defaultdict(list), lambda held: held["x"].append(1)),
    "Counter": (Counter, lambda held: held.update("a")),
    "OrderedDict": (lambda: OrderedDict(a=1, b=2), lambda held: held.move_to_end("a")),
    "AttrDict": (AttrDict, grow),
    "not ready": (NotReady, lambda held: held.total.append(1)),
    "UserDict": (UserDict, grow),
    "deque": (lambda: deque([1], maxlen=2), lambda held: held.extend([2, 3])),
    "set": (set, lambda held: held.add(1)),
    "bytearray": (lambda: bytearray(b"ab"), lambda held: held.extend(b"c")),
    "array": (lambda: array.array("d", [1.0]), lambda held: held.append(2.0)),
    "NumPy array": (lambda: np.zeros((2, 2)), add_one),
    "NumPy array of objects": (lambda: np.array([[], {}], dtype=object), lambda held: held[0].append(1)),
    "dataclass": (Record, lambda held: (held.losses.append(1), setattr(held, "count", 3))),
    "slots": (Slotted, lambda held: setattr(held, "total", 1)),
    "slots below a property": (Hidden, lambda held: Slotted.total.__set__(held, 1)),
    "object": (Meter, lambda held: held.update(1)),
    "tensor": (lambda: torch.zeros(2), lambda held: held.add_(1)),
    "tensor in a dict": (lambda: {"n": torch.zeros(2)}, lambda held: held["n"].add_(1)),
    "file in memory": (io.StringIO, lambda held: held.write("line")),
    "random": (lambda: random.Random(0), lambda held: held.random()),
    "NumPy generator": (lambda: np.random.default_rng(0), lambda held: held.random()),
    "older NumPy generator": (lambda: np.random.RandomState(0), lambda held: held.rand()),
    "torch generator": (lambda: torch.Generator().manual_seed(0), lambda held: torch.rand(1, generator=held)),
    "bound method": (lambda: Meter().update, lambda held: held(1)),
}


def shown(held):
    """A text of the content, to compare by."""
    if isinstance(held, random.Random):
        return str(held.getstate())
    if isinstance(held, np.random.Generator):
        return str(held.bit_generator.state)
    if isinstance(held, np.random.RandomState):
        return str(held.get_state())
    if isinstance(held, torch.Generator):
        return str(held.get_state().tolist())
    if isinstance(held, io.StringIO):
        return held.getvalue() + str(held.tell())
    if isinstance(held, AttrDict | NotReady):
        return str(held)
    owner = getattr(held, "__self__", held)
    if isinstance(owner, Meter | Slotted):
        return str((getattr(owner, "__dict__", None), getattr(owner, "total", None), Meter.seen))
    return str(held)


class Holder(nn.Module):
    def __init__(self, held):
        super().__init__()
        self.held = held


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_holds_state_is_put_back_into_the_same_object(name):
    make, change = CHANGES[name]
    module = Holder(make())
    held, before = module.held, shown(module.held)
    snapshot = Snapshot(module)
    change(held)
    assert shown(held) != before, "the test changes nothing"
    module.held = None
    module.late = 1
    assert snapshot.put_back() == []
    assert module.held is held
    assert shown(held) == before
    assert not hasattr(module, "late")


class KeepsOnItsClass(nn.Module):
    rows, total = [], 0


def test_lists_and_counts_on_the_users_own_classes_are_put_back():
    rows, snapshot = KeepsOnItsClass.rows, Snapshot(KeepsOnItsClass())
    rows.append(1)
    KeepsOnItsClass.total += 1
    KeepsOnItsClass.late = []
    snapshot.put_back()
    assert KeepsOnItsClass.rows is rows
    assert (rows, KeepsOnItsClass.total, hasattr(KeepsOnItsClass, "late")) == ([], 0, False)


def test_weights_whose_memory_was_exchanged_and_gradients_come_back():
    layer = nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    weight, grad, values = layer.weight, layer.weight.grad, layer.weight.detach().clone()
    snapshot = Snapshot(layer)
    layer.weight.data = torch.zeros(2, 2)
    layer.zero_grad()
    snapshot.put_back()
    assert layer.weight is weight
    assert layer.weight.grad is grad
    assert torch.equal(layer.weight, values)


def test_an_open_file_ends_where_it_did(tmp_path):
    with (tmp_path / "predictions.csv").open("w+") as file:
        file.write("a\n")
        snapshot = Snapshot(Holder(file))
        file.write("b\n")
        snapshot.put_back()
        file.write("c\n")
    assert (tmp_path / "predictions.csv").read_text() == "a\nc\n"


def test_what_cannot_be_put_back_is_named_if_it_was_read():
    module = Holder({"words": (word for word in "abc"), "turns": itertools.cycle([1, 2])})
    snapshot = Snapshot(module)
    assert not any("words" in name for name in snapshot.put_back())
    next(module.held["words"])
    assert any("Holder.held['words']" in name for name in snapshot.put_back())


# In runs


class KeepsCounts(Net):
    """Totals in the many ways in which a step may keep them; some are reset before the test, some never."""

    all_rows: ClassVar[list] = []

    def __init__(self):
        super().__init__()
        self.totals = {"n": torch.zeros(())}
        self.counts = Counter()
        self.matrix = np.zeros((4, 4))
        self.meter = Meter()
        self.register_buffer("seen", torch.zeros(()))

    def test_step(self, batch, batch_idx):
        found = self(batch[0]).argmax(1)
        right = (found == batch[1]).sum()
        self.totals["n"] += right
        self.counts.update(right=int(right))
        np.add.at(self.matrix, (found.numpy(), batch[1].numpy()), 1)
        self.meter.update(right)
        self.seen += right
        self.all_rows.append(int(right))

    def on_test_epoch_end(self):
        self.log("test_dict", self.totals["n"])
        self.log("test_counter", float(self.counts["right"]))
        self.log("test_matrix", float(self.matrix.trace()))
        self.log("test_meter", self.meter.sum)
        self.log("test_buffer", self.seen)
        self.log("test_class", float(sum(self.all_rows)))


def test_counts_of_one_model_are_none_of_the_others(tmp_path):
    module = KeepsCounts()
    with torch.no_grad():
        module.body[0].weight[:, 0] = 30.0  # so that int8 differs
    alone = {}
    for method in ("float", "w8a8"):
        KeepsCounts.all_rows.clear()
        snapshot = Snapshot(module)
        if method == "float":
            alone[method] = trainer(tmp_path).test(module, loader(seed=2), verbose=False)[0]
        else:
            with quantized(module, method):
                alone[method] = trainer(tmp_path).test(module, loader(seed=2), verbose=False)[0]
        snapshot.put_back()
    callback = TinyQCallback("w8a8", when="test_start", report=False, save=False)
    trainer(tmp_path, callback).test(module, loader(seed=2), verbose=False)
    assert len(callback.results) == 6
    for name, values in callback.results.items():
        assert values["float"] == alone["float"][name]
        assert values["w8a8"] == alone["w8a8"][name]
    assert module.counts["right"] == alone["w8a8"]["test_counter"], "as after a test without the callback"


class OwnRandom(Dataset):
    def __init__(self):
        self.generator = np.random.default_rng(0)

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.from_numpy(self.generator.normal(size=8)).float(), index % 4


class KeepsItsPlace(IterableDataset):
    def __init__(self):
        self.place = 0

    def __iter__(self):
        for _ in range(64):
            self.place += 1
            yield torch.full((8,), float(self.place)), self.place % 4


class Logs(Net):
    def validation_step(self, batch, batch_idx):
        self.log("val_data", batch[0].mean())
        self(batch[0])

    def test_step(self, batch, batch_idx):
        self.log("test_data", batch[0].mean())
        self(batch[0])


@pytest.mark.filterwarnings("ignore:Your `IterableDataset`", "ignore:.*has `shuffle=True`")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("data", [OwnRandom, KeepsItsPlace])
def test_both_models_see_the_same_data_whatever_it_draws_from(tmp_path, data, workers):
    at_end = TinyQCallback("w8a32", report=False, save=False)
    trainer(tmp_path, at_end, num_sanity_val_steps=0).fit(Logs(), loader(), DataLoader(data(), 16, num_workers=workers))
    at_test = TinyQCallback("w8a32", when="test_start", report=False, save=False)
    trainer(tmp_path, at_test).test(Logs(), DataLoader(data(), 16, num_workers=workers), verbose=False)
    assert at_end.results["val_data"]["delta"] == 0
    assert at_test.results["test_data"]["delta"] == 0


class Stream(IterableDataset):
    """Goes on where it is, as a queue does, for each who asks; nothing can rewind it."""

    source = iter(range(10**9))

    def __iter__(self):
        source = type(self).source
        for _ in range(64):
            yield torch.full((8,), float(next(source))), 0


def test_data_that_goes_on_is_told(tmp_path):
    callback = TinyQCallback("w8a32", report=False, save=False)
    with pytest.warns(UserWarning, match="did not see the same data"):
        trainer(tmp_path, callback, num_sanity_val_steps=0).fit(Logs(), loader(), DataLoader(Stream(), 16))


class ChangesItsBatch(Net):
    def test_step(self, batch, batch_idx):
        batch[0].sub_(1.0).mul_(2.0)
        self.log("test_data", batch[0].mean())
        self(batch[0])
        batch.pop()


def test_a_step_may_change_its_batch_even_if_that_is_the_datasets_own(tmp_path):
    class HandsOut(Dataset):
        def __init__(self):
            self.batches = [[torch.ones(4, 8), torch.zeros(4).long()] for _ in range(3)]

        def __len__(self):
            return len(self.batches)

        def __getitem__(self, index):
            return self.batches[index]

    for data in (HandsOut(), TensorDataset(torch.ones(3, 4, 8), torch.zeros(3, 4).long())):
        callback = TinyQCallback("w8a32", when="test_start", report=False, save=False)
        batches = DataLoader(data, batch_size=None, collate_fn=list)
        trainer(tmp_path, callback).test(ChangesItsBatch(), batches, verbose=False)
        assert callback.results["test_data"] == {"float": 0.0, "w8a32": 0.0, "delta": 0.0}


class Averages(Net):
    """Puts an average of its weights in for validation."""

    def on_validation_start(self):
        self.own = [parameter.detach().clone() for parameter in self.parameters()]
        for parameter in self.parameters():
            parameter.data.mul_(0.5)

    def on_validation_end(self):
        for parameter, own in zip(self.parameters(), self.own, strict=True):
            parameter.data.copy_(own)


def test_a_module_that_validates_other_weights_is_told_so(tmp_path):
    callback = TinyQCallback("w8a32", report=False, save=False)
    with pytest.warns(UserWarning, match="hooks of Averages put other weights in for validation"):
        trainer(tmp_path, callback).fit(Averages(), loader(), loader(seed=1))


def test_a_score_that_the_best_checkpoint_does_not_reach_again_is_told(tmp_path):
    class Drifts(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val_acc", 0.5 if has_trained(self.trainer) else 0.9)

    callback = TinyQCallback("w8a32", report=False, save=False)
    latest = keeper(tmp_path / "latest", monitor=None)  # another ModelCheckpoint, which records no score
    with pytest.warns(UserWarning, match="val_acc of the best checkpoint is 0.5, where ModelCheckpoint recorded 0.9"):
        trainer(tmp_path, keeper(tmp_path), latest, callback).fit(Drifts(), loader(), loader(seed=1))


def test_data_that_can_be_read_again_is_not_complained_of(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback = TinyQCallback("w8a32", report=False, save=False)
        trainer(tmp_path, keeper(tmp_path), callback).fit(Net(), loader(shuffle=True), loader(seed=1))
    assert not [str(each.message) for each in caught if "TinyQ" in str(each.message)]


class ChangesItsData(Net):
    """Changes what the dataset itself holds: in the hook before a transfer, in the step, and of the batch before."""

    last = None

    def on_before_batch_transfer(self, batch, dataloader_idx):
        batch["x"].mul_(0.5)
        return batch

    def test_step(self, batch, batch_idx):
        x, y = batch["x"].add_(0.1), batch.pop("y")
        if self.last is not None:
            self.last.zero_()
        self.last = x
        self.log("test_loss", nn.functional.cross_entropy(self(x), y))
        self.log("test_sum", x.sum(), batch_size=len(x))


def windows():
    """Rows that overlap, as those of a time series do, so that a change of one changes the next."""
    series = torch.randn(80, 8, generator=torch.Generator().manual_seed(0))
    return [{"x": series[at : at + 32], "y": torch.arange(32) % 4} for at in range(0, 48, 8)]


def same(batch):
    return batch


def test_rows_that_a_run_changes_are_the_next_models_as_they_were_and_the_own_run_is_left_alone(tmp_path):
    alone = {}
    for method in ("float", "w8a8"):
        torch.manual_seed(0)
        module = ChangesItsData()
        with nullcontext() if method == "float" else quantized(module, method):
            given = DataLoader(windows(), batch_size=None, collate_fn=same)
            alone[method] = trainer(tmp_path).test(module, given, verbose=False)[0]
    torch.manual_seed(0)
    rows = windows()
    callback = TinyQCallback("w8a8", when="test_start", report=False, save=False)
    given = DataLoader(rows, batch_size=None, collate_fn=same)
    trainer(tmp_path, callback).test(ChangesItsData(), given, verbose=False)
    for name, values in callback.results.items():
        assert (values["float"], values["w8a8"]) == (alone["float"][name], alone["w8a8"][name])
    assert all(torch.equal(row["x"], as_made["x"]) and "y" in row for row, as_made in zip(rows, windows(), strict=True))


class Fetcher:
    """As those of Lightning: gives one batch after the other."""

    def __init__(self, batches):
        self.iterator = iter(batches)


def test_batches_that_only_the_loop_holds_are_let_go():
    held = [{"x": torch.zeros(4)} for _ in range(8)]
    batches = ({"x": torch.zeros(4)} if index % 2 else held[index // 2] for index in range(16))
    kept, fetcher = KeptBatches([held]), Fetcher(batches)
    kept.watch(fetcher)
    for index, batch in enumerate(fetcher.iterator):
        if index < 8:
            batch["x"].add_(1)
    lasting = [part._value for part in kept._lasting]
    assert [type(value) for value in lasting].count(torch.Tensor) == 4, "held by others, and changed"
    kept.put_back()
    assert all(torch.equal(each["x"], torch.zeros(4)) for each in held)


@pytest.mark.parametrize(
    "row",
    [
        lambda: (torch.zeros(4), [torch.zeros(2)]),
        lambda: {"x": torch.tensor([1.0, float("nan")])},
        lambda: np.array([1.0, float("nan")]),
        lambda: np.array(["a", "text"], dtype=object),
    ],
    ids=["containers", "nan", "array of nan", "texts"],
)
def test_rows_that_nobody_changes_are_not_kept(row):
    held = [row() for _ in range(20)]
    kept, fetcher = KeptBatches([held]), Fetcher(held)
    kept.watch(fetcher)
    assert len(list(fetcher.iterator)) == 20
    assert kept._lasting == []


class BatchOfItsOwn(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("x", torch.zeros(2))


def test_datasets_and_modules_that_batches_hold_are_not_walked_over():
    data, net = TensorDataset(torch.zeros(2)), nn.Linear(2, 2)
    held = [{"rows": [{"n": 0}], "data": data, "net": net}, BatchOfItsOwn()]
    kept, fetcher = KeptBatches([held]), Fetcher(held)
    kept.watch(fetcher)
    first, second = fetcher.iterator
    assert len(kept._recent[0]) == 3, "the batch, its rows and the one row"
    first["rows"][0]["n"] = 1
    second.x.add_(1)
    kept.put_back()
    assert (first["rows"], second.x.tolist()) == ([{"n": 0}], [0.0, 0.0])


def refilled(rows):
    """One list for all batches."""
    batch = []
    for each in rows:
        batch[:] = each
        yield batch


def test_a_list_that_a_loader_refills_and_frames_that_several_batches_hold_are_put_back_and_let_go():
    rows = [[{"n": 0} for _ in range(300)] for _ in range(3)]
    kept, fetcher = KeptBatches([rows]), Fetcher(refilled(rows))
    kept.watch(fetcher)
    for batch in fetcher.iterator:
        for row in batch:
            row["n"] += 1
    kept.put_back()
    assert all(row == {"n": 0} for each in rows for row in each)
    frames = [torch.full((2**15,), float(at)) for at in range(12)]
    windows_of_four = (frames[at : at + 4] for at in range(9))
    kept, fetcher = KeptBatches([frames]), Fetcher(windows_of_four)
    kept.watch(fetcher)
    assert len(list(fetcher.iterator)) == 9
    assert kept._lasting == []


@pytest.mark.filterwarnings("ignore")  # torch tells of layouts that may change
def test_batches_of_every_layout_are_kept():
    ones = [torch.ones(2), torch.ones(3)]
    nested = [torch.nested.nested_tensor(ones, layout=layout) for layout in (torch.strided, torch.jagged)]
    held = [torch.eye(4).to_sparse(), torch.eye(4).to_sparse_csr(), *nested, torch.empty(3, device="meta")] * 2
    kept, fetcher = KeptBatches([held]), Fetcher(held)
    kept.watch(fetcher)
    assert len(list(fetcher.iterator)) == 10
    kept.put_back()


def test_the_ends_of_long_containers_count_in_a_digest():
    digests = {batch_digest([int(row == at) for row in range(300)]) for at in (0, 127, 172, 299)}
    assert len(digests | {batch_digest([0] * 300)}) == 5
    assert batch_digest({"words": dict.fromkeys(range(9999), 0), "x": 1}) != batch_digest(
        {"words": dict.fromkeys(range(9999), 0), "x": 2}
    )


def test_read_only_memory_is_not_written_to(tmp_path):
    np.save(tmp_path / "rows.npy", np.ones((6, 4), dtype=np.float32))
    stored = np.load(tmp_path / "rows.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells of arrays that are not writable
        held = [torch.from_numpy(row) for row in stored]
    kept, fetcher = KeptBatches([held]), Fetcher(held)
    kept.watch(fetcher)
    assert len(list(fetcher.iterator)) == 6
    kept.put_back()


def test_batches_whose_objects_name_each_other_have_a_digest():
    one, other = {"x": torch.ones(2)}, {"x": torch.zeros(2)}
    one["near"], other["near"] = [other], [one]
    assert batch_digest([one, other]) != batch_digest([other, one])


class AsksItsTrainer(Net):
    """A hook that asks for the loader of its data module."""

    def on_validation_epoch_end(self):
        self.log("rows", float(len(self.trainer.datamodule.val_dataloader().dataset)))


def test_data_modules_have_their_loaders(tmp_path):
    callback = TinyQCallback("w8a32", report=False, save=False, strict=True)
    trainer(tmp_path, callback, max_epochs=1).fit(AsksItsTrainer(), datamodule=Data())
    assert callback.results["rows"]["w8a32"] == 192


class KeepsAWeight(Net):
    """Keeps the weight of a layer, and views of it and of a buffer, from one hook to the next."""

    def __init__(self):
        super().__init__()
        self.register_buffer("sums", torch.zeros(3))

    def on_test_start(self):
        self.kept = [layer.weight for layer in self.modules() if isinstance(layer, nn.Linear)]
        self.rows, self.last = self.kept[0][:2], self.sums[1:]

    def test_step(self, batch, batch_idx):
        super().test_step(batch, batch_idx)
        self.sums += 1
        self.log("kept", sum(weight.square().sum() for weight in self.kept) + self.rows.sum() + self.last.sum())


def test_a_weight_that_a_module_keeps_is_that_of_the_model_which_is_tested(tmp_path):
    callback, module = TinyQCallback("w4a8", when="test_start", report=False, save=False, strict=True), KeepsAWeight()
    wanted = trainer(tmp_path).test(module, loader(), verbose=False)[0]["kept"]
    module.sums.zero_()
    trainer(tmp_path, callback).test(module, loader(), verbose=False)
    module.sums.zero_()
    quantize(module, "w4a8")
    int8 = trainer(tmp_path).test(module, loader(), verbose=False)[0]["kept"]
    assert callback.results["kept"]["float"] == pytest.approx(wanted)
    assert callback.results["kept"]["w4a8"] == pytest.approx(int8)
    assert wanted != pytest.approx(int8)
