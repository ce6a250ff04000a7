"""Unknown keyword arguments are refused with the name that was meant."""

from __future__ import annotations

import inspect

import pytest
from torch import nn

from tinyq_lightning import Quantizer, TinyQCallback


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: TinyQCallback(excludes=["head"]), "TinyQCallback has no argument 'excludes'. Did you mean 'exclude'?"),
        (
            lambda: TinyQCallback(method="w8a8"),
            "'method'. It is a key of the spec, which is the first argument: TinyQCallback({'method': ...}).",
        ),
        (lambda: Quantizer(nn.Linear(4, 4), log=None), "Quantizer has no argument 'log'. Did you mean 'logger'?"),
        (
            lambda: Quantizer(nn.Linear(4, 4)).quantize(method="w8a8"),
            "Quantizer.quantize has no argument 'method'. Did you mean 'q_method'? Arguments are: q_method, ",
        ),
    ],
)
def test_an_unknown_argument_is_refused_with_the_one_that_was_meant(call, said):
    with pytest.raises(TypeError) as raised:
        call()
    assert said in str(raised.value)


def test_the_signature_is_the_functions_own():
    names = list(inspect.signature(TinyQCallback).parameters)
    assert names[:3] == ["spec", "exclude", "kinds"]
    with pytest.raises(TypeError, match="positional argument"):
        TinyQCallback("w8a32", ["head"])
