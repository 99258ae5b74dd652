"""The proof of an export: every runtime against torch, speed, memory, text, and the page of it.

:mod:`subject` is what is proven, :mod:`runtimes` what runs it, :mod:`measure` times and weighs,
:mod:`prove` does it all, :mod:`page` shows it.
"""
