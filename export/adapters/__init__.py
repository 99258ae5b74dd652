"""Graphs whose linear layers take the factors of an adapter as inputs, and what feeds them.

:mod:`layers` and :mod:`graph` make such a graph and :mod:`table` says which inputs belong to which
layer. :mod:`file` writes adapters that fit it, in the gauge that :mod:`gauges` chooses, :mod:`read`
reads them from wherever they lie, :mod:`mix` adds several up, :mod:`session` runs them, each
:mod:`bound` once.
:mod:`feeds` and :mod:`validate` prove such a graph.
"""
