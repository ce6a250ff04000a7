"""Lightning's model summary with the quantized weights counted in; its own counts parameters only."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parameter import is_lazy

from tinyq_lightning.layers import QuantizedLayer, WeightSize, kind_of
from tinyq_lightning.methods import METHODS
from tinyq_lightning.namespaces import namespace_of, of_both

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelSummary as SummaryOfBoth
    from lightning.pytorch.utilities.model_summary.model_summary import ModelSummary as Summary
else:
    Summary, SummaryOfBoth = object, of_both("callbacks.ModelSummary")

__all__ = [
    "QuantizedModelSummary",
    "QuantizedSummary",
    "summarize",
]


class QuantizedSummary(Summary):
    """The table of Lightning's ``ModelSummary``, of a module with quantized layers or without.

    A quantized weight counts as one weight that is not trainable, so the counts are those of the float module.
    Sizes are those of the tensors: one byte for each int8 weight, half of one and the multipliers for each of four bits
    as in a file, four for each scale, and the size of its dtype for each parameter. Tensors that share memory count
    once.

    Args:
        model: the module.
        max_depth: of the modules to show; -1 for all, 0 for none.
    """

    derives = "utilities.model_summary.ModelSummary"

    def __init__(self, model: LightningModule, max_depth: int = 1) -> None:
        with warnings.catch_warnings():  # sizes are read from the tensors, not guessed from the precision
            warnings.filterwarnings("ignore", message="Precision .* is not supported by the model summary")
            super().__init__(model, max_depth)

    @property
    def param_nums(self) -> list[int]:
        """The number of weights of each row."""
        return [layer.num_parameters + _quantized_count(layer._module) for layer in self._layer_summary.values()]

    @property
    def total_parameters(self) -> int:
        """The number of weights, float and quantized."""
        return super().total_parameters + _quantized_count(self._model)

    @property
    def model_size(self) -> float:
        """In megabytes (10⁶ bytes)."""
        held = (parameter for parameter in self._model.parameters() if not is_lazy(parameter))
        size = sum(parameter.numel() * parameter.element_size() for parameter in held)
        return (size + sum(each.bytes(bits) for each, bits in _quantized_sizes(self._model))) * 1e-6


def summarize(module: LightningModule, max_depth: int = 1) -> QuantizedSummary:
    """The summary of a module, to print: as Lightning's ``summarize``, with quantized weights counted in.

    Args:
        module: with quantized layers or without.
        max_depth: of the modules to show; -1 for all, 0 for none.
    """
    made: QuantizedSummary = namespace_of(module).derived(QuantizedSummary)(module, max_depth)
    return made


class QuantizedModelSummary(SummaryOfBoth):
    """Prints the summary when a fit starts, instead of the Trainer's own ``ModelSummary``.

    It uses rich if that is installed, as the Trainer's own does; before Lightning 2.6 if there is a RichProgressBar.

    Args:
        max_depth: of the modules to show; -1 for all, 0 for none.
        **summarize_kwargs: as Lightning's callbacks take them.
    """

    def _summary(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        lightnings = namespace_of(trainer).pytorch
        strategy: Any = trainer.strategy
        if isinstance(strategy, lightnings.strategies.DeepSpeedStrategy) and strategy.zero_stage_3:
            return lightnings.callbacks.ModelSummary._summary(self, trainer, pl_module)  # counts what is split up
        return summarize(pl_module, self._max_depth)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the summary, by rich if that is installed, as the package of the Trainer does."""
        lightnings = namespace_of(trainer)
        callbacks = lightnings.pytorch.callbacks
        has_rich_bar = isinstance(trainer.progress_bar_callback, callbacks.RichProgressBar)  # what tells before 2.6
        with_rich = getattr(lightnings.module("utilities.imports"), "_RICH_AVAILABLE", has_rich_bar)
        self._summarize = (callbacks.RichModelSummary if with_rich else callbacks.ModelSummary).summarize
        callbacks.ModelSummary.on_fit_start(self, trainer, pl_module)

    def summarize(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Print the table."""
        self._summarize(*args, **kwargs)


def _quantized_count(module: nn.Module) -> int:
    return sum(each.count for each, _ in _quantized_sizes(module))


def _quantized_sizes(module: nn.Module) -> Iterator[tuple[WeightSize, int]]:
    """The size of each quantized weight and the bits of its codes; a weight that several layers share comes once."""
    seen = set()
    for layer in module.modules():
        if isinstance(layer, QuantizedLayer) and (kind := kind_of(layer)) is not None:
            sizes, holders = kind.sizes(layer), layer.coded_weights()
            for name, holder in holders.items():
                place = holder.scales.untyped_storage()._cdata, holder.scales.storage_offset()
                if place not in seen:
                    seen.add(place)
                    yield sizes[name], METHODS[layer.method].bits
