"""How errors quote the exceptions of others."""

from __future__ import annotations

import pytest

from tinyq_lightning.errors import quoted


class TextlessError(Exception):
    """Of a class whose text needs what it was not given."""

    def __str__(self):
        return f"{self.missing}"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("no"), "ValueError: no"),
        (MemoryError(), "MemoryError"),
        (TextlessError(), "TextlessError: its text cannot be made"),
    ],
)
def test_an_exception_is_quoted_by_its_type_and_its_text_if_it_has_one(error, text):
    assert quoted(error) == text
