"""A graph in fewer bits, and what that costs.

:mod:`quantize` does it and reports, :mod:`quantize_methods` knows how, :mod:`quantize_loss`
measures what is lost in each layer and on the outputs.
"""
