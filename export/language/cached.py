"""Language models whose cache is a flat list of tensors, which a graph can take and give back.

transformers keeps keys and values in objects that grow in place. A *step* is the same model with
another ``forward``: the past comes in as tensors, the present goes out as tensors, and the cache
object lives only inside. It shares its parameters with the model and has its names, so adapters,
merging and hashes work on it as on the model itself.

Names are those of optimum and onnxruntime-genai: ``past_key_values.N.key``, ``present.N.key``, each
``(batch, key/value heads, length, head size)``; with an encoder ``past_key_values.N.decoder.key``
and ``past_key_values.N.encoder.key``.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gauge_ext.errors import ConfigError, ExportError
from gauge_ext.models.adapted import unwrap

Pair = dict[str, Tensor]  # "key" and "value"


def causal_step(model: nn.Module) -> nn.Module:
    """A decoder-only model as ``step(input_ids, attention_mask[, position_ids], past_key_values)``.

    Returns:
        The step. It returns ``logits (batch, sequence, vocabulary)`` and ``present``, a list like
        ``past_key_values``: a dict of ``key`` and ``value`` for each layer.

    Raises:
        ConfigError: the model does not take token ids, an attention mask and a cache.
    """
    inner = unwrap(model)
    cls, cache_name = _cached_class(inner, ("input_ids", "attention_mask"))

    def forward(
        self: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        past_key_values: Sequence[Pair] = (),
    ) -> dict[str, Any]:
        cache = _filled(past_key_values)
        given = {} if position_ids is None else {"position_ids": position_ids}
        arguments = {"use_cache": True, "return_dict": True, cache_name: cache, **given}
        result = cls.forward(self, input_ids=input_ids, attention_mask=attention_mask, **arguments)
        return {"logits": result.logits, "present": _pairs(cache)}

    return _with_forward(inner, forward)


def takes_positions(model: nn.Module) -> bool:
    """Whether a model's forward has ``position_ids``."""
    return "position_ids" in inspect.signature(type(unwrap(model)).forward).parameters


def cache_shapes(model: nn.Module) -> list[dict[str, tuple[int, int]]]:
    """Heads and head size of each layer's key and value, found by running one token.

    Raises:
        ConfigError: the model has no output layer.
        ExportError: a layer keeps something else than one key and one value, as state-space models
            and models that share keys between layers do.
    """
    inner = unwrap(model)
    cls, cache_name = _cached_class(inner, ("input_ids", "attention_mask"))
    from transformers import DynamicCache

    wanted = getattr(_config(inner).get_text_config(), "num_hidden_layers", None)
    other_kind = ExportError(
        f"{cls.__name__} does not keep one key and one value for each of its {wanted} layers.",
        hint="Only attention caches can be exported; export it without a cache by export_onnx.",
    )
    cache = DynamicCache()
    one = torch.zeros(1, 1, dtype=torch.int64, device=next(inner.parameters()).device)
    given = {"use_cache": True, "return_dict": True, cache_name: cache}
    try:
        with torch.no_grad():
            result = cls.forward(inner, input_ids=one, attention_mask=torch.ones_like(one), **given)
    # What a model says to a cache that lacks the states it looks for.
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise other_kind from error
    if not hasattr(result, "logits"):
        raise ConfigError(
            f"{cls.__name__} gives no logits, so it cannot generate.",
            hint="Load it with its language-model head (AutoModelForCausalLM).",
        )
    layers = _pairs(cache)
    if not layers or len(layers) != (wanted or len(layers)) or not all(map(_is_pair, layers)):
        raise other_kind
    return [{name: (t.shape[1], t.shape[3]) for name, t in pair.items()} for pair in layers]


def encoder_step(model: nn.Module) -> nn.Module:
    """The encoder of an encoder-decoder model, with what every step of the decoder reads of it.

    Returns:
        ``step(input_ids, attention_mask)`` or ``step(input_features)``. It returns
        ``last_hidden_state (batch, source, width)`` and ``present``, for each layer of the decoder
        ``{"encoder": {"key", "value"}}``: the keys and values of its cross attention. With these
        the decoder is one graph for the first step and all others, and stores no weight twice.

    Raises:
        ConfigError: the model is no encoder-decoder model of transformers.
    """
    inner = unwrap(model)
    cls, cache_name = _cached_class(inner, ("decoder_input_ids", "encoder_outputs"))

    def states(self: nn.Module, source: Tensor, mask: Tensor | None) -> dict[str, Any]:
        from transformers import DynamicCache, EncoderDecoderCache

        held: Any = self
        encode = held.get_encoder()
        given = {} if mask is None else {"attention_mask": mask}
        hidden = encode(source, return_dict=True, **given).last_hidden_state
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        # One token, whatever it is: only the keys and values of the cross attention stay.
        token = torch.zeros(source.shape[0], 1, dtype=torch.int64, device=source.device)
        cls.forward(self, **_decoder_arguments(hidden, mask, token, cache_name, cache))
        present = [{"encoder": pair} for pair in _pairs(cache.cross_attention_cache)]
        return {"last_hidden_state": hidden, "present": present}

    if inner.main_input_name == "input_ids":

        def from_tokens(
            self: nn.Module, input_ids: Tensor, attention_mask: Tensor
        ) -> dict[str, Any]:
            return states(self, input_ids, attention_mask)

        return _with_forward(inner, from_tokens)

    def from_features(self: nn.Module, input_features: Tensor) -> dict[str, Any]:
        return states(self, input_features, None)

    return _with_forward(inner, from_features)


def decoder_step(model: nn.Module) -> nn.Module:
    """The decoder of an encoder-decoder model, for the first step and every other.

    Returns:
        ``step(decoder_input_ids[, encoder_attention_mask], past_key_values)``, where each layer's
        past is ``{"decoder": {"key", "value"}, "encoder": {"key", "value"}}``; the first is empty
        at the beginning, the second comes from :func:`encoder_step`. It returns ``logits`` and
        ``present``, ``{"decoder": {"key", "value"}}`` for each layer.

    Raises:
        ConfigError: the model is no encoder-decoder model of transformers.
    """
    inner = unwrap(model)
    cls, cache_name = _cached_class(inner, ("decoder_input_ids", "encoder_outputs"))
    width = int(_config(inner).d_model)

    def forward(
        self: nn.Module,
        decoder_input_ids: Tensor,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Sequence[dict[str, Pair]] = (),
    ) -> dict[str, Any]:
        from transformers import EncoderDecoderCache

        own = _filled([layer["decoder"] for layer in past_key_values])
        cross = _filled([layer["encoder"] for layer in past_key_values])
        cache = EncoderDecoderCache(own, cross)
        cache.is_updated = dict.fromkeys(range(len(past_key_values)), True)
        key = past_key_values[0]["encoder"]["key"]
        # Asked for its shape only: the cross attention reads keys and values from the cache.
        hidden = key.new_zeros(key.shape[0], key.shape[2], width)
        arguments = _decoder_arguments(
            hidden, encoder_attention_mask, decoder_input_ids, cache_name, cache
        )
        result = cls.forward(self, **arguments)
        return {"logits": result.logits, "present": [{"decoder": pair} for pair in _pairs(own)]}

    return _with_forward(inner, forward)


def _config(model: nn.Module) -> Any:
    return model.config


def _decoder_arguments(
    hidden: Tensor, mask: Tensor | None, ids: Tensor, cache_name: str, cache: Any
) -> dict[str, Any]:
    from transformers.modeling_outputs import BaseModelOutput

    return {
        "encoder_outputs": BaseModelOutput(last_hidden_state=hidden),
        "attention_mask": mask,
        "decoder_input_ids": ids,
        "use_cache": True,
        "return_dict": True,
        cache_name: cache,
    }


def _cached_class(model: nn.Module, needed: tuple[str, ...]) -> tuple[Any, str]:
    """The class that a step calls, and its name for the cache (transformers 5.24 renamed it)."""
    cls = type(model)
    parameters = inspect.signature(cls.forward).parameters
    name = next((n for n in ("cache", "past_key_values") if n in parameters), None)
    missing = [n for n in needed if n not in parameters]
    if name is None or missing or not hasattr(model, "config"):
        raise ConfigError(
            f"{cls.__name__}.forward does not take {missing[0] if missing else 'a cache'}, so it "
            "is no generating model of transformers.",
            hint="Use export_onnx for a model without a cache.",
        )
    return cls, name


def _with_forward(model: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """The same modules and parameters with another forward, as ``attach`` does it with layers."""
    twin = copy.copy(model)
    cls = type(model)
    twin.__class__ = type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
    return twin


def _filled(past: Sequence[Pair]) -> Any:
    """A cache of transformers that holds the past, whatever its length: 0 too."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for pair in past:
        layer = DynamicLayer()
        layer.lazy_initialization(pair["key"], pair["value"])
        layer.keys, layer.values = pair["key"], pair["value"]
        cache.layers.append(layer)
    return cache


def _pairs(cache: Any) -> list[Pair]:
    return [{"key": layer.keys, "value": layer.values} for layer in cache.layers]


def _is_pair(pair: dict[str, Any]) -> bool:
    return all(isinstance(t, Tensor) and t.dim() == 4 for t in pair.values())
