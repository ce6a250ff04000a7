"""A float checkpoint that lies where nothing can be written is tested, and its quantized file goes elsewhere."""

from __future__ import annotations

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from models import Net, keeper, loader, trainer

from tinyq_lightning import TinyQCallback, load_quantized


class Share(MemoryFileSystem):
    """A remote file system from which files can only be read."""

    protocol = ("share",)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("share://", "memory://"))

    def _open(self, path, mode="rb", **kwargs):
        if mode != "rb":
            raise PermissionError("this share is read-only")
        return super()._open(path, mode, **kwargs)


@pytest.fixture
def float_path(tmp_path):
    fsspec.register_implementation("share", Share, clobber=True)
    run = trainer(tmp_path, keeper(tmp_path))
    run.fit(Net(), loader(shuffle=True), loader(seed=1))
    with open(run.checkpoint_callback.best_model_path, "rb") as file:
        fsspec.filesystem("memory").pipe("/floats/best.ckpt", file.read())
    return "share://floats/best.ckpt"


def test_a_test_of_a_checkpoint_on_a_read_only_share_saves_to_the_root_folder_and_says_so(tmp_path, float_path):
    callback = TinyQCallback("w8a32", when="test_start", report=False)
    run = trainer(tmp_path / "root", callback)
    with pytest.warns(UserWarning, match=r"share://floats cannot be written to \(PermissionError: this share is read"):
        run.test(Net(), loader(seed=2), ckpt_path=float_path, verbose=False, weights_only=True)
    assert callback.error is None
    assert callback.results["test_acc"]
    assert callback.quantized_path == str(tmp_path / "root" / "w8a32-best.ckpt")
    assert load_quantized(callback.quantized_path, Net)


def test_if_the_root_folder_takes_no_files_either_the_results_are_kept(tmp_path, float_path):
    callback = TinyQCallback("w8a32", when="test_start", report=False, dirpath="share://elsewhere")
    run = trainer(tmp_path / "root", callback)
    with pytest.warns(
        UserWarning, match="(?s)Saving the quantized checkpoint failed: .*read-only.*The test had finished"
    ):
        metrics = run.test(Net(), loader(seed=2), ckpt_path=float_path, verbose=False, weights_only=True)
    assert metrics[0]["test_acc"] == pytest.approx(callback.results["test_acc"]["w8a32"])
    assert "read-only" in str(callback.error)
    assert callback.quantized_path is None
