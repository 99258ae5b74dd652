"""``python -m gauge_ext`` is the same as ``gauge-ext``."""

from __future__ import annotations

from gauge_ext.cli import main

if __name__ == "__main__":
    main()
