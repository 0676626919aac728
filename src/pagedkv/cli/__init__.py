"""The command line: `pagedkv demo`, `generate`, `size`, `info`, `inspect`. It needs the extra `cli`: typer, rich."""

from __future__ import annotations

import sys

__all__ = ["main"]

_EXTRA_PACKAGES = ("typer", "rich")


def main() -> None:
    """The entry point `pagedkv`: runs a command, or says what to install when typer or rich is missing."""
    try:
        # Only here: a core install has the entry point, but neither typer nor rich.
        from .app import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA_PACKAGES:
            raise
        sys.exit(f"pagedkv: the command line needs {missing}, which is not installed. Run: pip install 'pagedkv[cli]'")
    app()
