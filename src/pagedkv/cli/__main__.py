"""`python -m pagedkv.cli`, the same as the entry point `pagedkv`."""

from __future__ import annotations

from . import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
