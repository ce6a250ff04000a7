"""``export``: writes a quantized model for another runtime, runs it there, and compares it with the model."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from tinyq_lightning.errors import ExportError, TinyQError, quoted
from tinyq_lightning.file import digest_of, file_bytes, read_content, refuse_existing
from tinyq_lightning.handover.comparison import OutputError, output_errors, output_tensors, time_both, worst
from tinyq_lightning.handover.dynamic import Dynamic, dynamic_dims
from tinyq_lightning.handover.example import Example, example_for
from tinyq_lightning.handover.formats import Format, Program, Run, Tensors, format_for
from tinyq_lightning.handover.outputs import others_of, tensors_of
from tinyq_lightning.handover.place import check_place, move_into_place, workshop
from tinyq_lightning.handover.report import ExportReport
from tinyq_lightning.handover.request import Request
from tinyq_lightning.handover.source import callable_module, methods_that_round, model_from, on_cpu, rounding_noise
from tinyq_lightning.handover.untouched import untouched
from tinyq_lightning.methods import Activations
from tinyq_lightning.plan import state_bytes
from tinyq_lightning.search import Timing, is_one_input

__all__ = [
    "export",
]

_ONE_AT_A_TIME = threading.RLock()
"""That a graph is made is a flag of torch for the whole process, and so are its random numbers, which are put back."""

_SHARE = 0.1  # of the error of a file: what the model must differ from itself by to be the reason


def export(
    model_or_path: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    to: str | None = None,
    module_class: Any = None,
    part: str = "",
    method: str = "forward",
    dynamic: Dynamic = True,
    activations: Activations = "dynamic",
    calibration: Iterable[Any] | None = None,
    max_error: float | None = None,
    overwrite: bool = False,
    trust: bool = False,
    init_args: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Write a quantized model for another runtime, run it there, and compare it with the model.

    What was written is run on the example and, where sizes are dynamic, on random inputs of other sizes. If it is
    further from the quantized model than ``max_error``, no file is left. The model is as it was afterwards. Exports in
    several threads take turns; meanwhile no other thread may run quantized models, since they compute as in a graph.

    Args:
        model_or_path: a model with quantized layers; or the path of a quantized checkpoint, or of a safetensors file
            made from one.
        path: where to write, a local path or a URL that fsspec can open. Its ending tells the format.
        example_inputs: of the exported method: a tensor, a tuple of arguments, or a dict of arguments by name; by
            default the ``example_input_array`` of a LightningModule.
        to: the format, if the ending of ``path`` does not tell: see :data:`~tinyq_lightning.handover.FORMATS`.
        module_class: for a path: the class it was made from, as in :func:`~tinyq_lightning.load_quantized`.
        part: for a path: the attribute that ``module_class`` makes, as in :func:`~tinyq_lightning.load_quantized`.
        method: name of the method to export.
        dynamic: ``True``: the size of the batch, the first dimension of the inputs, may change. ``False``: no size
            may. Or names of dimensions: ``{0: "batch", 1: "tokens"}`` of every input that has them, or
            ``{"ids": {0: "batch", 1: "tokens"}}`` of single inputs; a ``torch.export.Dim`` instead of a name gives
            bounds.
        activations: ``dynamic``: as the model rounds them; ``static``: by ranges from ``calibration``, which some
            runtimes are faster with; ``static-signed``: likewise, with a zero point of 0, as TensorRT needs it.
        calibration: for static activations: inputs, each like ``example_inputs``.
        max_error: the largest relative error of any output: the norm of the difference, relative to the norm of the
            model's output, as the runtime computes by default. Without it, what the format is known to keep, and with
            ``w8a8`` layers 0.15: activations that differ in the last bit may be rounded to another step, and this
            adds up from layer to layer. A file that is as near only where the runtime rounds no activations on its own
            is then written, too, and a note says so.
        overwrite: whether to replace files that are there.
        trust: for a path: as in :func:`~tinyq_lightning.load_quantized`.
        init_args: for a path: arguments of the class; they replace the hyper-parameters stored in the file.

    Returns:
        What was written, with errors, sizes and times.

    Raises:
        ExportError: the model cannot be written so, or what was written is too far from it; no file is left.
        ModelError: the model has no quantized layers, or the example inputs do not fit it.
        CheckpointError: the file to export is missing, damaged, or does not fit the class.
        MissingExtraError: a library is not installed.
    """
    target = os.fspath(path)
    wanted = format_for(target, to)
    check_place(target)
    refuse_existing(target, overwrite, ExportError)
    if isinstance(wanted, Tensors):
        return _export_tensors(model_or_path, target, wanted, overwrite)
    assert isinstance(wanted, Program)
    if isinstance(model_or_path, str | os.PathLike):
        model_or_path = model_from(os.fspath(model_or_path), module_class, init_args or {}, part, trust)
    model = on_cpu(model_or_path)
    example = example_for(model, example_inputs, method)
    dims = dynamic_dims(example, dynamic)
    _check_activations(wanted, activations, calibration)
    with _ONE_AT_A_TIME, untouched(model):
        module = callable_module(model, method)
        outputs = _called(module, example)
        names = tuple(output_tensors(outputs))
        notes = [f"not exported, since graphs do not hold such: {each}" for each in others_of(outputs)]
        traced = dims.large_enough(example)
        request = Request(module, traced, dims, names, activations, calibration, torch.get_num_threads())
        bound = _Bound(max_error, max(wanted.bound(activations), rounding_noise(model)))
        return _write_program(wanted, request, example, target, bound, overwrite, notes)


class _Bound(NamedTuple):
    """The relative error that is allowed: what the user has given, or else what the format keeps."""

    given: float | None
    known: float

    @property
    def value(self) -> float:
        return self.known if self.given is None else self.given


def _check_activations(wanted: Program, activations: str, calibration: Iterable[Any] | None) -> None:
    wanted.check_activations(activations)
    if (activations == "dynamic") != (calibration is None):
        raise ExportError(
            "static activations and calibration belong together: give activations='static' and "
            "calibration=[inputs, …], from which the ranges are taken"
        )
    if calibration is not None and is_one_input(calibration):
        raise ExportError("calibration must be several inputs, such as a list: write calibration=[x] for a single one")


def _called(module: nn.Module, example: Example) -> Any:
    given = example.fresh()
    try:
        return module(*given.args, **given.kwargs)
    except Exception as error:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in example.tensors().items())
        raise ExportError(f"the model failed on inputs of the shapes {shapes}: {quoted(error)}") from error


def _write_program(
    wanted: Program,
    request: Request,
    example: Example,
    target: str,
    bound: _Bound,
    overwrite: bool,
    left_out: Sequence[str],
) -> ExportReport:
    with workshop(target) as written:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries, about themselves
            notes = _guarded(wanted, request, "written", lambda: wanted.write(request, written))
            trial = _tried(wanted, request, example, written)
            own = _judged(wanted, request, trial, bound, written)
        files = move_into_place(written, target, overwrite)
    return ExportReport(
        path=target,
        format=wanted.name,
        files=files,
        bytes=sum(file_bytes(each) for each in files),
        model_bytes=state_bytes(request.module.state_dict()),
        max_error=bound.value,
        outputs=tuple(trial.outputs),
        inputs=tuple({name: tuple(tensor.shape) for name, tensor in case.tensors().items()} for case in trial.cases),
        ms=trial.timing.ms,
        model_ms=trial.timing.float_ms,
        threads=request.threads,
        notes=(*own, *notes, *trial.notes, *left_out),
    )


class _Trial(NamedTuple):
    """What running a file gave: the inputs, notes on those that were left out, the worst errors, and times."""

    cases: list[Example]
    notes: list[str]
    outputs: list[OutputError]
    timing: Timing


def _tried(wanted: Program, request: Request, example: Example, written: str) -> _Trial:
    run: Run = _guarded(wanted, request, "loaded", lambda: wanted.open(written, request))
    cases, notes = _cases(request, example)
    outputs = _guarded(wanted, request, "run", lambda: worst([_errors(request, run, case) for case in cases]))
    timed = example.fresh()
    timing = time_both(lambda: request.module(*timed.args, **timed.kwargs), lambda: run(timed))
    return _Trial(cases, notes, outputs, timing)


def _guarded(wanted: Format, request: Request, what: str, step: Any) -> Any:
    try:
        return step()
    except TinyQError:
        raise
    except Exception as error:  # of a library, which may raise anything
        kinds = {each.dtype for each in (*request.module.parameters(), *request.example.tensors().values())}
        unusual = [str(each) for each in (torch.bfloat16, torch.float16, torch.float64) if each in kinds]
        advice = (
            f". It computes in {' and '.join(unusual)}, which not every runtime can: export model.float(), with inputs "
            "in float32"
            if unusual
            else ""
        )
        if request.activations != "dynamic":
            advice += ". With activations='dynamic' the runtime has less to rewrite, and may take it"
        reason = quoted(error)
        raise ExportError(f"{wanted.name}: the model could not be {what}: {reason}{advice}") from error


def _cases(request: Request, example: Example) -> tuple[list[Example], list[str]]:
    """The example, and random inputs of other sizes; those that the model itself does not take are noted."""
    cases, notes = [example], list[str]()
    if request.activations != "dynamic":  # random inputs would lie outside of the ranges
        return cases, ["compared on the example alone, since random inputs need not be like the calibration"]
    for seed, sizes in enumerate(request.dims.other_sizes(example)):
        case = request.dims.resized(example, sizes, seed)
        try:
            _called(request.module, case)
        except ExportError as error:
            shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
            notes.append(f"not tried with {shown}: {str(error).splitlines()[0]}")
            continue
        cases.append(case)
    return cases, notes


def _errors(request: Request, run: Run, case: Example) -> list[OutputError]:
    wanted = output_tensors(_called(request.module, case))
    return output_errors(wanted, run(case.fresh()))


def _judged(wanted: Program, request: Request, trial: _Trial, bound: _Bound, written: str) -> list[str]:
    """Refuse what is too far from the model; a note if that is the runtime's own rounding and no bound was given."""
    off = max(trial.outputs, key=_relative)
    if off.relative <= bound.value:
        return []
    again = max(_errors(request, lambda case: tensors_of(_called(request.module, case)), trial.cases[0]), key=_relative)
    if again.relative > min(bound.value, off.relative * _SHARE):
        raise ExportError(
            f"{wanted.name}: the model itself gives other numbers for the same inputs each time ({again.name} is "
            f"{again.relative:.2g} from what it was before, and what was written {off.relative:.2g}), so nothing can "
            "be compared with it and no file was left: it draws random numbers in eval mode too, such as F.dropout "
            "without training=self.training, or keeps state from call to call. Export a method that does not, or that "
            "takes such tensors as inputs"
        )
    rounding = _own_rounding(wanted, request, trial, bound, written)
    far = f"{off.name} of what was written is {off.relative:.2g} from the quantized model"
    if rounding and bound.given is None:
        return [f"{far}, more than the {bound.value:g} that is usual{rounding}."]
    raise ExportError(
        f"{wanted.name}: {far}, more than the {bound.value:g} allowed (max_error), so no file was left; the largest "
        f"difference is {off.largest:.2g}{rounding or _advice(wanted, request)}"
    )


def _own_rounding(wanted: Program, request: Request, trial: _Trial, bound: _Bound, written: str) -> str:
    """That the file is right and its runtime rounds, if it is near the model with the runtime's exact settings."""
    if not wanted.exact or request.activations != "dynamic":
        return ""
    exactly = replace(request, settings=wanted.exact)
    run: Run = _guarded(wanted, request, "loaded", lambda: wanted.open(written, exactly))
    found = _guarded(wanted, request, "run", lambda: worst([_errors(request, run, case) for case in trial.cases]))
    off = max(found, key=_relative)
    if off.relative > bound.value:
        return ""
    settings = " and ".join(f"{name} = {value}" for name, value in wanted.exact.items())
    return (
        f", because on this processor the runtime rounds on its own: with {settings} it is {off.relative:.2g}. A model "
        "that rounds, compares or chooses by its values (floor, >, argmax, topk) makes much of small differences. "
        "Serve it with these settings, or measure your own metric without them"
    )


def _advice(wanted: Program, request: Request) -> str:
    if request.activations != "dynamic":
        return ". Calibrate with more inputs, of the kind that you serve"
    rounding = methods_that_round(request.module)
    if wanted.rounds_as_layers or not rounding:
        return ""
    return (
        f". {wanted.name} gets the weights alone: activations are not rounded there as {' and '.join(rounding)} "
        "say: quantize with methods that end in a32, give a larger max_error, or write another format"
    )


def _relative(error: OutputError) -> float:
    return error.relative


def _export_tensors(
    source: nn.Module | str | os.PathLike[str], target: str, wanted: Tensors, overwrite: bool
) -> ExportReport:
    if isinstance(source, nn.Module):
        raise ExportError(
            f"the format {wanted.name} is made from a quantized checkpoint, which also holds hyper-parameters and the "
            "plan: give its path"
        )
    content = read_content(source)
    with workshop(target) as written:
        wanted.write(content, written)
        again = wanted.read(written)
        _refuse_other_tensors(wanted, content["state_dict"], again["state_dict"])
        files = move_into_place(written, target, overwrite)
    return ExportReport(
        path=target,
        format=wanted.name,
        files=files,
        bytes=sum(file_bytes(each) for each in files),
        model_bytes=state_bytes(content["state_dict"]),
    )


def _refuse_other_tensors(wanted: Format, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """What was read back must be what was written, bit by bit."""
    if digest_of(dict(before)) != digest_of(dict(after)):
        raise ExportError(f"{wanted.name}: what was read back is not what was written, so no file was left")
