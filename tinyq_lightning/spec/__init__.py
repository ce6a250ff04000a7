"""What the user asks for: YAML, a mapping or arguments, read once into a frozen ``QuantizationSpec``."""

from tinyq_lightning.spec.arguments import with_arguments
from tinyq_lightning.spec.checks import METHOD_NAMES
from tinyq_lightning.spec.keywords import names_near_keywords
from tinyq_lightning.spec.matching import (
    Wanted,
    deciding_rule,
    excluding,
    names_parameter,
    pattern_matches,
    wanted_method,
)
from tinyq_lightning.spec.parts import MEASURED_BY, Budget, Calibrate, Export, Mode, Rule, RuleBy, Save
from tinyq_lightning.spec.places import Origin
from tinyq_lightning.spec.reader import nearest
from tinyq_lightning.spec.spec import QuantizationSpec, SpecLike, SpecOrMethods, as_spec

__all__ = [
    "MEASURED_BY",
    "METHOD_NAMES",
    "Budget",
    "Calibrate",
    "Export",
    "Mode",
    "Origin",
    "QuantizationSpec",
    "Rule",
    "RuleBy",
    "Save",
    "SpecLike",
    "SpecOrMethods",
    "Wanted",
    "as_spec",
    "deciding_rule",
    "excluding",
    "names_near_keywords",
    "names_parameter",
    "nearest",
    "pattern_matches",
    "wanted_method",
    "with_arguments",
]
