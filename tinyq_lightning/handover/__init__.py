"""A quantized model written for other runtimes, which is then run there and compared with the model."""

from tinyq_lightning.handover.beside import check_formats, export_beside
from tinyq_lightning.handover.calls import recorded_calls
from tinyq_lightning.handover.example import as_arguments, copies_on_cpu, import_example
from tinyq_lightning.handover.exporting import export
from tinyq_lightning.handover.formats import FORMATS, Format, Program, Tensors, format_for
from tinyq_lightning.handover.place import check_place
from tinyq_lightning.handover.report import ExportReport
from tinyq_lightning.handover.session import session_forward

__all__ = [
    "FORMATS",
    "ExportReport",
    "Format",
    "Program",
    "Tensors",
    "as_arguments",
    "check_formats",
    "check_place",
    "copies_on_cpu",
    "export",
    "export_beside",
    "format_for",
    "import_example",
    "recorded_calls",
    "session_forward",
]
