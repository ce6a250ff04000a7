"""What happens to each layer of one model, and why: one decision for each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tinyq_lightning.kernels import Choice
from tinyq_lightning.methods import METHODS
from tinyq_lightning.plan.coverage import Coverage, HeldWeight, coverage_of
from tinyq_lightning.plan.groups import group_name, grouped
from tinyq_lightning.spec import MEASURED_BY, QuantizationSpec, Rule, RuleBy, deciding_rule, wanted_method
from tinyq_lightning.table import Table, fill, format_bytes

__all__ = [
    "MANY_LAYERS",
    "DecidedBy",
    "Decision",
    "OtherWeight",
    "Plan",
    "state_bytes",
]


DecidedBy = Literal["spec", "rule", "exclude", "tie", "layer", "budget", "timing", "file"]


@dataclass(frozen=True)
class Decision:
    """What happens to one layer.

    Attributes:
        name: dotted path of the layer; the first, where it has several.
        method: ``w8a32``, ``w8a16``, ``w8a8``, ``w4a32``, ``w4a16``, ``w4a8`` or ``float``.
        reason: why: ``spec``, ``rule 2``, ``excluded``, ``tied to embed.weight``, …
        weight_sqnr_db: signal to quantization noise ratio of the weight in dB; None for a float layer,
            and until the layer has been quantized.
        float_bytes: size of weight and bias as floats. A weight that several layers share counts for the
            first of them only.
        bytes: size as the plan has it.
        aliases: the other paths of a layer that has several.
        tied_to: name of the first layer with the very same weight; None where that is this one.
        kind: of the layer: ``linear``, ``attention``, ``conv``, ``embedding``, ``recurrent`` or ``matrix``;
            empty in a plan from a file that does not say.
        kernel: how the layer is computed on this machine's CPU, and why; None for a float layer, for a kind
            without a choice, and in a plan that was read from a file, which knows nothing of machines.
        weights: how many the layer has, those of another left out; 0 in a plan that was read from a file.
        shared_bytes: what its kernel holds in memory for the weights of another, beside what that one's holds.
        asked: the method that was asked for, if the layer has another one, ``method``, because of its kind or because
            four bits would not make it smaller; else None.
        decided_by: what the decision comes from: ``spec`` (its method), ``rule``, ``exclude``, ``tie`` (another
            layer with the same weight), ``layer`` (what the layer is), ``budget`` or ``timing`` (what a run
            measured); ``file`` in a plan that was read from one, which does not say.
        output_error: with codes that were chosen with data, the mean squared error of the outputs on batches that
            were held out, as a share of that with the codes chosen without; 1 where these stayed. None if no data was
            there, or :attr:`uncalibrated` tells why it was not used.
        uncalibrated: why the codes were chosen without the data that was there; else None.
    """

    name: str
    method: str
    reason: str
    weight_sqnr_db: float | None
    float_bytes: int
    bytes: int
    aliases: tuple[str, ...] = ()
    tied_to: str | None = None
    kind: str = ""
    kernel: Choice | None = field(default=None, compare=False)
    asked: str | None = field(default=None, compare=False)
    weights: int = field(default=0, compare=False)
    shared_bytes: int = field(default=0, compare=False)
    decided_by: DecidedBy = field(default="file", compare=False)
    output_error: float | None = None
    uncalibrated: str | None = field(default=None, compare=False)

    @property
    def memory_bytes(self) -> int:
        """What the layer takes in memory on this machine, once it was called."""
        if self.kernel is None:
            return self.bytes
        expanded = self.kernel.bytes_a_weight - METHODS[self.method].bits / 8
        return self.bytes + max(0, int(expanded * self.weights)) + self.shared_bytes

    @property
    def measured(self) -> bool:
        """Whether a run decided so from what it measured, not the spec."""
        return self.decided_by in MEASURED_BY


@dataclass(frozen=True)
class OtherWeight:
    """A parameter with two dimensions or more that is in no layer of the plan.

    Attributes:
        name: its dotted path.
        shape: its sizes.
        bytes: what it takes.
    """

    name: str
    shape: tuple[int, ...]
    bytes: int


_NAMED = 3  # Layers or weights that a note names.

MANY_LAYERS = 40
"""A longer plan is shown in groups on a screen."""


@dataclass(frozen=True)
class Plan:
    """Decisions for every layer of a known kind of a model, in the order of its modules.

    Iterate over it.

    Attributes:
        decisions: one for each layer.
        spec: what was asked for.
        others: parameters that hold matrices and belong to no layer of the plan, so that they stay as they are;
            empty in a plan that was read from a file.
        held: all parameters of the float model; empty in a plan that was read from a file.
    """

    decisions: tuple[Decision, ...]
    spec: QuantizationSpec
    others: tuple[OtherWeight, ...] = field(default=(), compare=False)
    held: tuple[HeldWeight, ...] = field(default=(), compare=False, repr=False)

    def __iter__(self) -> Iterator[Decision]:
        return iter(self.decisions)

    def __str__(self) -> str:
        return self.table()

    def __len__(self) -> int:
        return len(self.decisions)

    @property
    def label(self) -> str:
        """The method, or ``mixed`` where the plan has several; what log keys are named by.

        Layers whose kind lacks the method that was asked for do not make a plan a mixed one.
        """
        quantized = [decision for decision in self if decision.method != "float"]
        methods = {decision.method for decision in quantized}
        asked = {decision.asked or decision.method for decision in quantized}
        if len(methods) > 1 and len(asked) > 1:
            return "mixed"
        return (methods if len(methods) == 1 else asked or {self.spec.method}).pop()

    @property
    def is_float(self) -> bool:
        """Whether every layer stays float."""
        return all(decision.method == "float" for decision in self)

    @property
    def column_label(self) -> str:
        """What a column of results is named by: the label, or ``all_float`` if a run found that better everywhere."""
        return "all_float" if self.is_float else self.label

    @property
    def file_label(self) -> str:
        """What a file is named by: the label, or ``float`` if a run found every layer better off in float."""
        return "float" if self.is_float else self.label

    def has_codes_of(self, other: Plan) -> bool:
        """Whether both give each layer the same method and, as far as their errors tell, the same codes."""
        ours, theirs = ([(d.name, d.method, d.weight_sqnr_db, d.output_error) for d in plan] for plan in (self, other))
        return ours == theirs

    def to_spec(self) -> QuantizationSpec:
        """A spec that resolves to exactly this plan on the same model, without a search or any timing.

        It is the spec that was asked for, without its budget, preceded by a rule with its reason for
        each layer that was decided otherwise.
        """
        spec = replace(self.spec, budget=None, methods=(), keep="all")
        changed = []
        for decision in self:
            wanted = wanted_method(spec, (decision.name, *decision.aliases))
            if decision.measured and (wanted.method, wanted.reason) != (decision.method, decision.reason):
                pattern, by = f"re:{re.escape(decision.name)}", cast("RuleBy", decision.decided_by)
                changed.append(Rule(pattern, decision.method, decision.reason, by))
        if not changed:
            return spec
        numbered = (replace(rule, reason=rule.reason or f"rule {i + 1}") for i, rule in enumerate(spec.rules))
        spec = replace(spec, rules=(*changed, *numbered))
        deciding = {deciding_rule(spec, (decision.name, *decision.aliases)) for decision in self}
        return replace(spec, rules=tuple(rule for i, rule in enumerate(spec.rules) if i in deciding))

    def to_list(self) -> list[dict[str, Any]]:
        """The decisions as plain data, without kernels, which depend on the machine, and why it was decided."""
        rows = []
        for decision in self:
            row = asdict(decision) | {"aliases": list(decision.aliases)}
            del row["kernel"], row["weights"], row["shared_bytes"], row["decided_by"]
            for key in ("output_error", "uncalibrated"):  # where no data was there, as in files of earlier versions
                if row[key] is None:
                    del row[key]
            rows.append(row)
        return rows

    def table(self, width: int | None = None, group: bool = False) -> str:
        """The plan as a text table for people, why its kernels were chosen, and what is still float.

        Args:
            width: the characters of a line on the screen; longer names and reasons are wrapped. None: any length.
            group: one row for the layers of the same decision whose names differ in numbers alone.
        """
        covered = str(self.coverage) if self.held else None
        notes = [self.worst_note() if group else None, *self.kernel_notes(), covered, self.others_note()]
        return "\n".join([self.as_table(group).text(width), *(fill(note, width) for note in notes if note)])

    def _repr_html_(self) -> str:
        """The plan in a notebook."""
        covered = str(self.coverage) if self.held else None
        notes = filter(None, [*self.kernel_notes(), covered, self.others_note()])
        return self.as_table().html() + "".join(f"<div>{escape(note)}</div>" for note in notes)

    @property
    def coverage(self) -> Coverage:
        """How much of the model's weights the plan quantizes, and by type what stays float."""
        return coverage_of(self, self.held)

    def others_note(self) -> str | None:
        """Which parameters hold matrices and are in no layer of the plan, in a sentence; None if there are none."""
        if not self.others:
            return None
        count, size = len(self.others), format_bytes(sum(other.bytes for other in self.others))
        largest = sorted(self.others, key=lambda other: -other.bytes)[:_NAMED]
        named = ", ".join(f"{other.name} {list(other.shape)}" for other in largest)
        more = ", …" if count > len(largest) else ""
        what = f"{count} weight{'s' * (count > 1)} of {size}"
        return f"not in a layer of the plan, and left as they are: {what} ({named}{more})"

    def kernel_notes(self) -> list[str]:
        """For each kernel that was chosen: why, in words; and what the layers take in memory."""
        chosen = dict.fromkeys((choice.kernel, choice.reason) for each in self if (choice := each.kernel))
        notes = [f"kernel {kernel}: {reason}" for kernel, reason in chosen]
        return [*notes, self.memory_note()] if notes else []

    def memory_note(self) -> str:
        """What the layers of the plan take in memory on this machine, once they were called, beside their floats."""
        held, floats = sum(each.memory_bytes for each in self), sum(each.float_bytes for each in self)
        copies = held - sum(each.bytes for each in self)
        of_it = f", {format_bytes(copies)} of it copies for speed (none with kernel: compact)" if copies else ""
        return f"in memory, once called: {format_bytes(held)}{of_it}; as floats {format_bytes(floats)}"

    def worst_note(self) -> str | None:
        """The layers whose weights lost most, in a sentence; None if there are few that were measured."""
        measured = [(each.weight_sqnr_db, each.name) for each in self if each.weight_sqnr_db is not None]
        if len(measured) <= _NAMED:
            return None
        worst = ", ".join(f"{name} {sqnr:.1f} dB" for sqnr, name in sorted(measured)[:_NAMED])
        return f"lowest SQNR: {worst}"

    def as_table(self, group: bool = False) -> Table:
        """A row for each layer, and one for their sum; with kinds if there are several, and kernels if known.

        Args:
            group: one row for the layers of the same decision whose names differ in numbers alone.
        """
        kernels = any(decision.kernel for decision in self)
        kinds = len({decision.kind for decision in self}) > 1
        calibrated = any(decision.output_error is not None or decision.uncalibrated for decision in self)
        groups = grouped(self) if group else [[decision] for decision in self]
        rows = [
            [
                group_name(alike),
                *([alike[0].kind] if kinds else []),
                alike[0].method,
                alike[0].reason + (f"; not calibrated: {why}" if (why := alike[0].uncalibrated) else ""),
                *([alike[0].kernel.label if alike[0].kernel else ""] if kernels else []),
                _range([each.weight_sqnr_db for each in alike if each.weight_sqnr_db is not None]),
                *([_change(alike)] if calibrated else []),
                format_bytes(sum(each.float_bytes for each in alike)),
                format_bytes(sum(each.bytes for each in alike)),
            ]
            for alike in groups
        ]
        before, after = sum(d.float_bytes for d in self), sum(d.bytes for d in self)
        head = ["layer", *(["kind"] if kinds else []), "method", "reason", *(["kernel"] if kernels else [])]
        figures = ["SQNR dB", *(["output error"] if calibrated else [])]
        blank = [""] * (len(head) + len(figures) - 1)
        total = [f"{len(self)} layers", *blank, format_bytes(before), format_bytes(after)]
        return Table([*head, *figures, "float", "now"], [*rows, total], len(head), reasons=head.index("reason"))


def _change(alike: Sequence[Decision]) -> str:
    """How calibration changed the errors of outputs: ``-83…-62 %``, the most and the least; empty if it did not."""
    shares = [each.output_error for each in alike if each.output_error is not None]
    ends = dict.fromkeys(f"{100 * (end(shares) - 1):+.0f}" for end in (min, max)) if shares else {}
    return f"{'…'.join(ends)} %" if ends else ""


def _range(values: Sequence[float]) -> str:
    """``45.2…47.1``, the lowest and the highest; one number where they are the same."""
    ends = dict.fromkeys(f"{end(values):.1f}" for end in (min, max)) if values else {}
    return "…".join(ends)


def state_bytes(state_dict: Mapping[str, Any]) -> int:
    """Bytes of the tensors of a state dict, those that are shared counted once; of a sparse one, with its indices."""
    tensors: dict[Any, int] = {}
    for value in state_dict.values():
        if isinstance(value, Tensor):
            held = value.layout == torch.strided and not is_traceable_wrapper_subclass(value)
            place = (value.untyped_storage()._cdata, value.storage_offset()) if held else id(value)
            tensors[place] = sum(part.numel() * part.element_size() for part in _parts(value))
    return sum(tensors.values())


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """The dense tensors that a sparse one consists of; another tensor itself."""
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return (tensor,)
