"""The command line: ``tinyq-lightning quantize | inspect | verify | evaluate | bench | export``."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import yaml

from tinyq_lightning.command.shapes import Shapes
from tinyq_lightning.errors import CheckpointError, TinyQError
from tinyq_lightning.methods import ACTIVATIONS, FORMAT_NAMES
from tinyq_lightning.namespaces import OF_LIGHTNING
from tinyq_lightning.version import __version__

__all__ = [
    "main",
]

_EXIT_CODES = """exit codes:
  0    done; what was asked holds
  1    refused or failed, or verify found a difference: the reason is on stderr
  2    the command line itself is wrong
  130  interrupted"""


_MODEL = "what makes the model, package.module:name: a LightningModule or any nn.Module class, or a function; "
_MODEL += "needed unless --trust and LightningCLI noted it"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; those of the process by default.

    Returns:
        The exit code.
    """
    args = _parser().parse_args(_files_first(sys.argv[1:] if argv is None else argv))
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: the user's modules are importable from their folder
    try:
        _refuse_missing(args)
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            warnings.filterwarnings("ignore", module=OF_LIGHTNING)  # advice for training
            answer = _command(args.command)(args)
    except TinyQError as error:
        if args.json:
            _print(json.dumps({"error": str(error)}))
        print(f"tinyq-lightning {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    _print(json.dumps(answer.data, indent=2, default=str) if args.json else answer.text)
    return 0 if answer.good else 1


def _refuse_missing(args: argparse.Namespace) -> None:
    """Say that the only file is missing before torch is imported, which takes seconds."""
    files = [getattr(args, "checkpoint", None), *getattr(args, "checkpoints", ())]
    given = [each for each in files if each is not None]
    if len(given) == 1 and "://" not in given[0] and not os.path.exists(given[0]):
        raise CheckpointError(f"{given[0]}: there is no such file")


def _print(text: str) -> None:
    """Print to stdout, whose reader may have left, as ``head`` does when it has its lines."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends


# Options that take several words, and the endings of files that are never one of these.
_LISTS = ("--exclude", "--kinds", "--init", "--data-init", "--batch", "--shape")
_FILES = (".ckpt", ".safetensors", ".pt", ".pth")


def _files_first(words: Sequence[str]) -> list[str]:
    """The words with checkpoints that come after a list moved before it: ``--exclude head net.ckpt`` means the file.

    Only files that are there are moved, because ``epoch=7.ckpt`` could be a NAME=VALUE.
    """
    moved: list[str] = []
    kept = list(words[:1])
    in_list = False
    for word in words[1:]:
        in_list = word in _LISTS if word.startswith("--") else in_list
        is_file = in_list and word.endswith(_FILES) and os.path.isfile(word) and kept[-1] not in _LISTS
        (moved if is_file else kept).append(word)
    return [*kept[:1], *moved, *kept[1:]]


def _command(name: str) -> Callable[[argparse.Namespace], Any]:
    """The function of a command. Its module is imported here, because torch and Lightning take seconds to import."""
    modules = {"quantize": "quantize_command", "export": "export_command"}
    modules |= dict.fromkeys(("evaluate", "bench"), "run_commands")
    found = importlib.import_module(f"tinyq_lightning.command.{modules.get(name, 'file_commands')}")
    command: Callable[[argparse.Namespace], Any] = getattr(found, name)
    return command


def _show_warning(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tinyq-lightning",
        description="Post-training quantization of PyTorch Lightning checkpoints, to eight or four bits.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tinyq-lightning {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = _add(
        commands,
        "quantize",
        "float checkpoints to quantized ones, without a Trainer, one layer in memory at a time",
        "tinyq-lightning quantize epoch=7.ckpt --model nets:Net --method w8a32 --exclude head",
    )
    several = "of several, those done before are left and bad ones do not stop the rest"
    files = f"float checkpoints, or saved state dicts; {several}"
    command.add_argument("checkpoints", metavar="FLOAT.ckpt", nargs="+", help=files)
    _add_model(command)
    _add_spec(command)
    output = "default: <method>-<float name>.ckpt beside the float file; or a folder, for several files always"
    command.add_argument("--output", metavar="Q.ckpt", help=output)
    command.add_argument("--jobs", type=_count, metavar="N", help="so many files at once, each in a process of its own")
    command.add_argument("--overwrite", action="store_true", help="replace a quantized file that is there already")

    command = _add(
        commands,
        "inspect",
        "what a file is: plan, metrics, sizes, provenance; of a float file, what would be quantized",
        "tinyq-lightning inspect w8a32-epoch=7.ckpt",
    )
    command.add_argument("checkpoint", metavar="FILE.ckpt", help="a quantized or a float checkpoint")
    _add_model(command)
    _add_spec(command)

    command = _add(
        commands,
        "verify",
        "is the file intact? with the float file: does quantizing it again give the same bits?",
        "tinyq-lightning verify w8a32-epoch=7.ckpt --float epoch=7.ckpt --model nets:Net",
    )
    command.add_argument("checkpoint", metavar="Q.ckpt", help="the quantized checkpoint")
    command.add_argument("--float", metavar="FLOAT.ckpt", help="the float checkpoint it was made from")
    _add_model(command)

    command = _add(
        commands,
        "evaluate",
        "your test or validation loop on each file, float or quantized, in one table",
        "tinyq-lightning evaluate --model nets:Net --data nets:Data epoch=7.ckpt w8a32-epoch=7.ckpt",
    )
    files = (
        "float and quantized checkpoints, saved state dicts, safetensors files made from quantized ones; of several, "
        "bad ones do not stop the rest"
    )
    command.add_argument("checkpoints", metavar="FILE.ckpt", nargs="+", help=files)
    _add_model(command)
    command.add_argument("--data", required=True, metavar="M:CLASS", help="the LightningDataModule class")
    _add_init(command, "--data-init", "an argument of the data module")
    command.add_argument("--accelerator", default="cpu", help="as of the Trainer (default: cpu)")
    command.add_argument("--limit-batches", type=_limit, metavar="N", help="the first batches only")
    loop = "which of your loops (default: test)"
    command.add_argument("--loop", choices=("test", "validate"), default="test", help=loop)

    command = _add(
        commands,
        "bench",
        "time, throughput and memory of float and quantized on this machine",
        "tinyq-lightning bench w8a32-epoch=7.ckpt --model nets:Net --batch 1 32 --layers",
    )
    bench = "a quantized checkpoint, or a safetensors file made from one; or a float one, which is quantized in memory"
    command.add_argument("checkpoint", metavar="FILE.ckpt", help=bench)
    _add_model(command)
    _add_spec(command)
    command.add_argument("--batch", type=_count, nargs="+", default=[1], metavar="N", help="batch sizes (default: 1)")
    shape = "of one sample, without the batch, where the model has no example_input_array; else as of export: 3x224x224"
    command.add_argument("--shape", action=Shapes, nargs="+", metavar="SHAPE[:DTYPE[:BELOW]]", help=shape)
    example = "returns the arguments of one call; tensors are cut or repeated to each batch size"
    command.add_argument("--example", metavar="M:FUNCTION", help=example)
    command.add_argument("--layers", action="store_true", help="each quantized layer as well")
    command.add_argument(
        "--runs", type=_count, default=20, metavar="N", help="runs to take the median of (default: 20)"
    )
    command.add_argument("--threads", type=_count, metavar="N", help="of torch (default: as torch has it)")

    command = _add(
        commands,
        "export",
        "to other runtimes, where it is run and compared with the quantized model; or to files of tensors, and back",
        "tinyq-lightning export w8a32-epoch=7.ckpt --to pt2 --model nets:Net",
    )
    command.add_argument(
        "checkpoint", metavar="FILE", help="a quantized checkpoint, or a safetensors file made from one"
    )
    formats = "; ".join(f"{name}: {what}" for name, what in FORMAT_NAMES.items())
    wanted = f"the format wanted (default: by the ending of --output). {formats}"
    command.add_argument("--to", choices=tuple(FORMAT_NAMES), help=wanted)
    command.add_argument("--output", metavar="FILE", help="default: the same name with the other ending")
    command.add_argument("--overwrite", action="store_true", help="replace a file that is there already")
    _add_model(command)
    inputs = command.add_mutually_exclusive_group()
    example = "returns the arguments of one call (default: the model's example_input_array)"
    inputs.add_argument("--example", metavar="M:FUNCTION", help=example)
    shape = (
        "or draw the inputs at random, the batch first: 1x3x32x32 or 1 3 32 32, 2x16:int64:30522 for numbers below "
        "30522; several inputs are several words, or a --shape for each"
    )
    inputs.add_argument("--shape", action=Shapes, nargs="+", metavar="SHAPE[:DTYPE[:BELOW]]", help=shape)
    command.add_argument("--method", default="forward", metavar="NAME", help="the method to export (default: forward)")
    dynamic = "names of the inputs' first dimensions, whose sizes may change (default: batch), or none"
    command.add_argument("--dynamic", nargs="+", metavar="NAME", help=dynamic)
    command.add_argument("--max-error", type=float, metavar="X", help="largest relative error allowed")
    command.add_argument("--part", default="", metavar="NAME", help="the attribute that --model makes, such as net")
    how = "dynamic (default): rounded as they come; static, static-signed: by ranges of the validation data"
    command.add_argument("--activations", choices=ACTIVATIONS, default="dynamic", help=how)
    data = (
        "the LightningDataModule class: its validation batches give the ranges, and your loop measures what was written"
    )
    command.add_argument("--data", metavar="M:CLASS", help=data)
    _add_init(command, "--data-init", "an argument of the data module")
    command.add_argument("--batches", type=_count, default=8, metavar="N", help="to take ranges from (default: 8)")
    command.add_argument("--limit-batches", type=_limit, metavar="N", help="measure on the first batches only")
    calibration = "returns a list of inputs to take the ranges from, instead of --data"
    command.add_argument("--calibration", metavar="M:FUNCTION", help=calibration)
    return parser


def _add(commands: Any, name: str, what: str, example: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        epilog=f"example:\n  {example}\n\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--json", action="store_true", help="print JSON, for scripts")
    return command


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", metavar="M:CLASS", help=_MODEL)
    _add_init(command, "--init", "an argument of the class, over the hyper-parameters stored in the file")
    trust = "let the file name what is imported and called, which can run any code; without it, nothing is"
    command.add_argument("--trust", action="store_true", help=trust)


def _add_spec(command: argparse.ArgumentParser) -> None:
    given = command.add_mutually_exclusive_group()
    given.add_argument("--method", help="w8a32 (default), w8a16, w8a8, w4a32, w4a16 or w4a8")
    given.add_argument("--spec", metavar="S.yaml", help="a YAML spec instead: method, exclude, rules, …")
    exclude = "layers to leave float: names, paths, globs, or re: and a regular expression; may be repeated"
    kinds = "kinds of layer to quantize: all, or some of linear, attention, conv, embedding, recurrent; may be repeated"
    command.add_argument("--kinds", action="extend", nargs="+", default=None, metavar="KIND", help=kinds)
    command.add_argument("--exclude", action="extend", nargs="+", default=[], metavar="PATTERN", help=exclude)


def _add_init(command: argparse.ArgumentParser, flag: str, what: str) -> None:
    about = f"{what}, as YAML, or a YAML file of several; may be repeated"
    command.add_argument(flag, action=_Pairs, nargs="+", default={}, metavar="NAME=VALUE", help=about)


class _Pairs(argparse.Action):
    """Collects ``NAME=VALUE`` words in a dict; values are YAML, and dots in a name lead into an argument.

    A word that is the name of a YAML file stands for all that the file holds.
    """

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        pairs = dict(getattr(namespace, self.dest))
        for word in values:
            name, equals, text = word.partition("=")
            if not equals and name.endswith((".yaml", ".yml")):
                pairs |= self._of_file(parser, name, option_string)
                continue
            if not equals or not name.partition(".")[0].isidentifier() or not all(name.split(".")):
                parser.error(f"argument {option_string}: {word!r} is not NAME=VALUE")
            try:
                pairs[name] = yaml.safe_load(text)
            except yaml.YAMLError:
                parser.error(f"argument {option_string}: the value of {word!r} is not YAML")
        setattr(namespace, self.dest, pairs)

    def _of_file(self, parser: Any, path: str, option_string: str | None) -> dict[str, Any]:
        try:
            with open(path, encoding="utf-8") as file:
                content: Any = yaml.safe_load(file)
        except (OSError, ValueError, yaml.YAMLError) as error:
            parser.error(f"argument {option_string}: {path}: {error}")
        if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
            parser.error(f"argument {option_string}: {path} is not a YAML mapping from names to values")
        return dict(content)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _limit(text: str) -> int | float:
    return _count(text) if text.isdecimal() else float(text)
