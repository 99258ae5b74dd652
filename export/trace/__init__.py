"""From a torch model and example inputs to an ONNX graph that keeps its names.

:mod:`inputs` brings arguments and dynamic shapes into one form, :mod:`signature` names what goes in
and comes out, :mod:`axes` names the sizes that vary, :mod:`graph` does the step to ONNX.
:mod:`cases` and :mod:`expressions` make inputs of other sizes, with which the graph is tried.
"""
