"""An adapter into weights that exist already, in a checkpoint or an ONNX file, without torch.

:mod:`merge` goes into a folder of weights, :mod:`patch` into an ONNX file. :mod:`adapter_arrays`
reads the adapter; :mod:`update` adds it to weights on their way from one file to the other, and
:mod:`nbits` to weights in blocks, which :mod:`block_rounding` rounds to codes again. :mod:`sites`
finds the linear layers of a graph, :mod:`homes` and :mod:`likeness` which module is which;
:mod:`verify_patch` and :mod:`feeds` prove the result in onnxruntime.
"""
