"""The demo: teach a sentence-embedding model to search the Python standard library, offline.

Read in this order: :mod:`corpus` (the data), :mod:`text` (its tokens), :mod:`encoder` (the base
model), :mod:`train`, :mod:`metrics`, :mod:`search` (what a user ships), :mod:`latency`,
:mod:`threads`, :mod:`run` (all of it in one function), :mod:`result` (what it found). Needs the
extra ``gauge-ext[demo]`` when run, not when imported.
"""

from __future__ import annotations

from gauge_ext.demo.result import DemoResult
from gauge_ext.demo.run import run_demo

__all__ = ["DemoResult", "run_demo"]
