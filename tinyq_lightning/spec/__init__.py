"""What the user asks for: YAML, a mapping or arguments, read once into a frozen ``QuantizationSpec``."""

from tinyq_lightning.spec.arguments import with_arguments
from tinyq_lightning.spec.matching import deciding_rule, excluding, is_measured, pattern_matches, wanted_method
from tinyq_lightning.spec.reader import nearest
from tinyq_lightning.spec.spec import (
    METHOD_NAMES,
    Budget,
    Mode,
    QuantizationSpec,
    Rule,
    Save,
    SpecLike,
    SpecOrMethods,
    as_spec,
)

__all__ = [
    "METHOD_NAMES",
    "Budget",
    "Mode",
    "QuantizationSpec",
    "Rule",
    "Save",
    "SpecLike",
    "SpecOrMethods",
    "as_spec",
    "deciding_rule",
    "excluding",
    "is_measured",
    "nearest",
    "pattern_matches",
    "wanted_method",
    "with_arguments",
]
