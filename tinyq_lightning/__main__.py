"""``python -m tinyq_lightning``: the command line."""

from tinyq_lightning.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
