"""The proof of an export: every runtime against torch, speed, memory, text, and the page of it.

:mod:`subject` is what is proven, :mod:`runtimes` what runs it, :mod:`timed` says what is timed,
:mod:`measure` times and weighs, :mod:`perplexity` reads a text; :mod:`prove` does it all and
:mod:`page` shows it.
"""
