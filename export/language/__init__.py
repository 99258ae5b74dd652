"""Models that generate: their graphs with a key-value cache, and the loop that runs them.

:mod:`causal_lm` and :mod:`seq2seq` write them, :mod:`cached` gives a model tensors for a cache.
:mod:`generate`, :mod:`choose` and :mod:`sampling` are the loop in onnxruntime; :mod:`model_folder`
and :mod:`genai` write what lies beside the graphs.
"""
