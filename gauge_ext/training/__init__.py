"""Training with other people's loops: what transformers' Trainer needs to know of adapters.

A model with adapters is an ordinary module whose frozen parameters do not require gradients, so any
loop trains it. :mod:`checkpoints` makes the Trainer save and resume the adapters alone.
"""

from __future__ import annotations

from gauge_ext.training.checkpoints import AdapterCheckpoints

__all__ = ["AdapterCheckpoints"]
