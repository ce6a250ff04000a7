"""The quantized checkpoint and its neighbours: written, verified, loaded, made from a float file, exported."""

from tinyq_lightning.file.archive import Archive
from tinyq_lightning.file.build import build, import_class
from tinyq_lightning.file.checkpoint import (
    check_digests,
    check_format,
    file_sha256,
    is_quantized,
    make_checkpoint,
    read_checkpoint,
    without_training_entries,
    write_checkpoint,
)
from tinyq_lightning.file.digest import digest_of
from tinyq_lightning.file.durable import replace_file
from tinyq_lightning.file.loading import QuantizedCheckpointMixin, load_quantized, prepare_structure, refuse_resuming
from tinyq_lightning.file.names import check_folder, quantized_path, stem_of
from tinyq_lightning.file.plain import kind_of_config, plain, plain_entries, plain_state
from tinyq_lightning.file.quantize_file import FloatFile, quantize_file
from tinyq_lightning.file.safetensors import read_safetensors, write_safetensors
from tinyq_lightning.file.state import check_state

__all__ = [
    "Archive",
    "FloatFile",
    "QuantizedCheckpointMixin",
    "build",
    "check_digests",
    "check_folder",
    "check_format",
    "check_state",
    "digest_of",
    "file_sha256",
    "import_class",
    "is_quantized",
    "kind_of_config",
    "load_quantized",
    "make_checkpoint",
    "plain",
    "plain_entries",
    "plain_state",
    "prepare_structure",
    "quantize_file",
    "quantized_path",
    "read_checkpoint",
    "read_safetensors",
    "refuse_resuming",
    "replace_file",
    "stem_of",
    "without_training_entries",
    "write_checkpoint",
    "write_safetensors",
]
