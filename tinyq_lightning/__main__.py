"""``python -m tinyq_lightning``: the command line."""

from __future__ import annotations

from tinyq_lightning.command import main

__all__ = []

if __name__ == "__main__":
    raise SystemExit(main())
