"""Files: quantized checkpoints are written, checked, loaded, made from a float file and exported here."""

from tinyq_lightning.file.archive import Archive
from tinyq_lightning.file.by_layer import ByLayer
from tinyq_lightning.file.checkpoint import (
    file_sha256,
    is_free,
    make_checkpoint,
    read_checkpoint,
    refuse_foreign,
    warn_of_left_out,
    write_checkpoint,
)
from tinyq_lightning.file.construction import build
from tinyq_lightning.file.digest import digest_of
from tinyq_lightning.file.durable import replace_file, temporary_folder
from tinyq_lightning.file.factory import as_factory
from tinyq_lightning.file.folder import Folder, is_folder, open_checkpoint
from tinyq_lightning.file.from_float import FloatFile, float_content, quantize_file
from tinyq_lightning.file.hooks import HookView
from tinyq_lightning.file.loading import load_content, load_quantized, read_content
from tinyq_lightning.file.mixin import QuantizedCheckpointMixin
from tinyq_lightning.file.names import check_folder, file_bytes, file_exists, quantized_paths, refuse_existing, stem_of
from tinyq_lightning.file.part import content_of_part
from tinyq_lightning.file.plain import copied, plain
from tinyq_lightning.file.safetensors import is_safetensors, read_safetensors, write_safetensors
from tinyq_lightning.file.state import check_state
from tinyq_lightning.file.structure import restore_structure
from tinyq_lightning.file.trust import import_class, import_lightning_class, import_named
from tinyq_lightning.file.typed import escaped, typed_entries
from tinyq_lightning.file.validate import (
    HYPER_PARAMETERS,
    apart_from_weights,
    check_format,
    is_quantized,
    without_training_entries,
)
from tinyq_lightning.file.weightless import drop_weak_references
from tinyq_lightning.file.writable import why_not_writable

__all__ = [
    "HYPER_PARAMETERS",
    "Archive",
    "ByLayer",
    "FloatFile",
    "Folder",
    "HookView",
    "QuantizedCheckpointMixin",
    "apart_from_weights",
    "as_factory",
    "build",
    "check_folder",
    "check_format",
    "check_state",
    "content_of_part",
    "copied",
    "digest_of",
    "drop_weak_references",
    "escaped",
    "file_bytes",
    "file_exists",
    "file_sha256",
    "float_content",
    "import_class",
    "import_lightning_class",
    "import_named",
    "is_folder",
    "is_free",
    "is_quantized",
    "is_safetensors",
    "load_content",
    "load_quantized",
    "make_checkpoint",
    "open_checkpoint",
    "plain",
    "quantize_file",
    "quantized_paths",
    "read_checkpoint",
    "read_content",
    "read_safetensors",
    "refuse_existing",
    "refuse_foreign",
    "replace_file",
    "restore_structure",
    "stem_of",
    "temporary_folder",
    "typed_entries",
    "warn_of_left_out",
    "why_not_writable",
    "without_training_entries",
    "write_checkpoint",
    "write_safetensors",
]
