"""The command that hands a quantized checkpoint over to other runtimes: ``export``."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

from tinyq_lightning.command.answer import Answer, model_class
from tinyq_lightning.file import Archive
from tinyq_lightning.handover import FORMATS, Program, import_example
from tinyq_lightning.handover import export as write_export

__all__ = [
    "export",
]


def export(args: Namespace) -> Answer:
    """Write a quantized checkpoint in another format, run it there, and compare it."""
    wanted = FORMATS[args.to]
    path = args.output or os.path.splitext(args.checkpoint)[0] + wanted.ending
    given: dict[str, Any] = {}
    if isinstance(wanted, Program):
        given = {
            "example_inputs": import_example(args.example) if args.example else None,
            "module_class": _class_of(args),
            "method": args.method,
            "dynamic": _dynamic(args.dynamic),
            "max_error": args.max_error,
            "trust": args.trust,
            "init_args": args.init,
        }
    report = write_export(args.checkpoint, path, to=args.to, overwrite=args.overwrite, **given)
    return Answer(str(report), report.to_dict())


def _class_of(args: Namespace) -> Any:
    if args.model is not None or args.checkpoint.lower().endswith(".safetensors"):
        return args.model  # any class or function that makes the module
    with Archive(args.checkpoint) as source:
        return model_class(args.model, source, args.trust)


def _dynamic(names: list[str] | None) -> bool | dict[int, str]:
    """``batch tokens`` names the first dimensions of every input; ``none`` fixes all sizes."""
    if names is None:
        return True
    return False if names == ["none"] else dict(enumerate(names))
