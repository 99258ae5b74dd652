"""A graph in fewer bits, and what that costs.

:mod:`quantize` does it, :mod:`quantize_methods` knows how, with :mod:`fp16`, :mod:`linear_form`
(the form that methods for integers know) and :mod:`adapter_nodes` (what takes factors and stays as
it is); :mod:`quantize_loss` measures what is lost in each layer and on the outputs, and
:mod:`quantize_report` says it.
"""
