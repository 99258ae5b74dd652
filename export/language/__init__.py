"""Models that generate: their graphs with a key-value cache, and the loop that runs them.

:mod:`causal_lm` and :mod:`seq2seq` say what a model becomes, with inputs of any sizes from
:mod:`causal_inputs` and :mod:`seq2seq_inputs`; :mod:`cached` gives a model tensors for a cache,
:mod:`folder` writes the graphs, :mod:`loop` runs them against torch, and :mod:`model_folder` and
:mod:`genai` write what lies beside them.

:mod:`generate` is the loop in onnxruntime: :mod:`graphs` holds the sessions and their adapters,
:mod:`decoder` the cache, :mod:`prompt`, :mod:`choose` and :mod:`sampling` the tokens.
"""
