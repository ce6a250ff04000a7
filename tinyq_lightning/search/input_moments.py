"""Second moments of what layers are called with while a model runs: of some batches, and of those held out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tinyq_lightning.kernels import Moments
from tinyq_lightning.layers import QuantizedLayer, kind_of
from tinyq_lightning.plan import Swap
from tinyq_lightning.search.timer import brief

__all__ = [
    "APART",
    "InputMoments",
    "InputWatch",
]

APART = 3
"""Parts of the rows of attention's joint projection: queries, keys and values."""


# Of each of so many batches, one is held out.
_HELD_OUT = 4


class _UnknownWeightError(Exception):
    """A kind of layer yields inputs of a weight that its layers do not have."""


class InputWatch:
    """Sums up the inputs of some layers of a swap, batch by batch. The inputs themselves are not kept.

    Every fourth batch is held out, beginning with the second; of the first batch, the last quarter of its places. So
    one batch is enough, and nobody has to know how many there are.

    Args:
        swap: out of the model, which runs :meth:`~tinyq_lightning.plan.swap.Swap.opened`.
        names: of the layers to watch.

    Attributes:
        layers: what was summed up, by the name of the layer and of the weight.
        batches: how many have begun.
    """

    def __init__(self, swap: Swap, names: Collection[str]) -> None:
        self.batches = 0
        self.layers = {name: _moments_of(layer) for name, _, layer in swap.called() if name in names}
        self._quantized = {name: (layer, places) for name, layer, places in swap.called_places() if name in names}
        self._attentions = {name: module for name, module in swap.joint_projections() if name in names}

    def next_batch(self) -> None:
        """A batch begins."""
        self.batches += 1

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Sum up what the layers are called with inside the block."""
        with ExitStack() as stack:
            for name, moments in self.layers.items():
                layer, places = self._quantized[name]
                hook = self._guarded(moments, partial(_add_call, moments, layer))
                for place in places:
                    stack.callback(place.register_forward_pre_hook(hook, with_kwargs=True).remove)
                if name in self._attentions:
                    hook = self._guarded(moments, partial(_add_attention, moments["weight"]))
                    handle = self._attentions[name].register_forward_pre_hook(hook, with_kwargs=True)
                    stack.callback(handle.remove)
            yield

    def _guarded(
        self, moments: Mapping[str, InputMoments], add: Callable[..., None]
    ) -> Callable[[nn.Module, Any, Any], None]:
        """A forward pre-hook that never makes the model's own call fail."""

        def look(module: nn.Module, args: Any, kwargs: Any) -> None:
            failure = None
            if torch.compiler.is_compiling():
                failure = "it was called in a compiled graph"
            else:
                try:
                    with torch.inference_mode(False), torch.no_grad(), _without_autocast():
                        add(module, args, kwargs, self.batches)
                except _UnknownWeightError:  # the kind of layer is wrong, whatever the data
                    raise
                except Exception as error:  # of any kind: it must not reach the user's model, which did nothing wrong
                    failure = brief(error)
            for each in moments.values() if failure else ():
                each.failure = failure

        return look


class InputMoments:
    """Moments of what one weight of a layer is multiplied with.

    Args:
        parts: of the rows, see :meth:`~tinyq_lightning.layers.kind.Kind.row_parts`.
        columns: of the weight.

    Attributes:
        chosen_by: of the inputs that codes are chosen by; None until there were some.
        held_out: of those that codes are judged by; likewise.
        parts: of the rows, see :meth:`~tinyq_lightning.layers.kind.Kind.row_parts`.
        taken_apart: whether it is a joint projection of attention whose rows had inputs of their own.
        failure: why a call could not be summed up, or None.
    """

    def __init__(self, parts: int, columns: int) -> None:
        self._columns, self.parts = columns, parts
        self.chosen_by: Moments | None = None
        self.held_out: Moments | None = None
        self.taken_apart = False
        self.failure: str | None = None

    def take_apart(self) -> None:
        """Have moments for the rows of queries, of keys and of values."""
        self.taken_apart = True
        self.in_parts(APART)

    def in_parts(self, parts: int, device: torch.device | str = "cpu") -> None:
        """Have moments for so many parts of the rows, empty ones if there are none yet."""
        chosen_by, held_out = self.chosen_by, self.held_out
        if chosen_by is None or held_out is None:
            chosen_by, held_out = (Moments(parts, self._columns, device) for _ in range(2))
        elif chosen_by.parts != parts:
            chosen_by, held_out = chosen_by.in_parts(parts), held_out.in_parts(parts)
        self.parts, self.chosen_by, self.held_out = parts, chosen_by, held_out

    def add(self, inputs: Tensor, batch: int, part: int | None = None) -> None:
        """Add inputs ``[parts, n, columns]`` of the batch of this number, from 1; those of one part, or for all."""
        self.in_parts(self.parts, inputs.device)
        assert self.chosen_by is not None
        assert self.held_out is not None
        if part is None:
            inputs = inputs.expand(self.parts, -1, -1)
        places = inputs.shape[1]
        held = places // _HELD_OUT if batch == 1 else places if batch % _HELD_OUT == 2 else 0
        for moments, some in (
            (self.chosen_by, inputs[:, : places - held]),
            (self.held_out, inputs[:, places - held :]),
        ):
            if some.shape[1]:
                moments.add(some, part or 0)


def _moments_of(layer: QuantizedLayer) -> dict[str, InputMoments]:
    kind = kind_of(layer)
    assert kind is not None
    return {name: InputMoments(kind.row_parts(layer), size.columns) for name, size in kind.sizes(layer).items()}


def _add_call(
    moments: Mapping[str, InputMoments], layer: QuantizedLayer, module: nn.Module, args: Any, kwargs: Any, batch: int
) -> None:
    """Add a call of a float layer, in the batch of this number, from 1."""
    kind = kind_of(layer)
    assert kind is not None
    for name, inputs in kind.weight_inputs(module, args, kwargs):
        if name not in moments:
            raise _UnknownWeightError(
                f"{type(kind).__name__}.weight_inputs yields {name!r}, but the layer has {', '.join(moments)}: a kind "
                "whose layers have several weights, or one of another name, overrides it"
            )
        moments[name].add(inputs, batch)


def _add_attention(moments: InputMoments, _: nn.Module, args: Any, kwargs: Any, batch: int) -> None:
    """Add a call of the attention that has a joint projection, if it multiplies the rows of that one by one."""
    given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
    inputs = [given[name] for name in ("query", "key", "value")]
    if inputs[0] is inputs[1] is inputs[2]:
        return  # it calls the projection
    moments.take_apart()
    for part, x in enumerate(inputs):
        x = torch.cat(x.unbind()) if x.is_nested else x
        if x.numel():
            moments.add(x.detach().reshape(1, -1, x.shape[-1]), batch, part)


@contextmanager
def _without_autocast() -> Iterator[None]:
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
