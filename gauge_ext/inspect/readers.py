"""Which servers and runtimes would refuse a saved adapter, and which would misread it in silence.

PEFT's file says more than most readers look at. Each rule below is about what a reader is known to
do with one field; the sources are public, and named. A reader changes: the rules say what was so
when they were written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from gauge_ext.errors import ConfigError

Effect = Literal["refused", "misread"]


@dataclass(frozen=True)
class Finding:
    """One thing that a reader does wrong, or does not do, with this adapter.

    Attributes:
        reader: A key of :data:`READERS`.
        effect: "refused": it says so and stops. "misread": it loads and computes something else.
        reason: Which field, and what happens.
        remedy: What to do.
    """

    reader: str
    effect: Effect
    reason: str
    remedy: str


@dataclass(frozen=True)
class _Rule:
    applies: Callable[[Mapping[str, Any], frozenset[int]], bool]
    effect: Effect
    reason: str
    remedy: str


_PORTABLE = "Save it with portable=True: the scaling goes into lora_B, and all ranks become one."
_MERGE = "Merge it into the base and serve that."


def _on(field: str) -> Callable[[Mapping[str, Any], frozenset[int]], bool]:
    return lambda config, ranks: bool(config.get(field))


def _bias(config: Mapping[str, Any], ranks: frozenset[int]) -> bool:
    return config.get("bias") not in (None, "none")


def _several_ranks(config: Mapping[str, Any], ranks: frozenset[int]) -> bool:
    return len(ranks) > 1


_DORA = _Rule(_on("use_dora"), "refused", "use_dora: DoRA's magnitudes are not supported", _MERGE)
_SAVED = _Rule(
    _on("modules_to_save"), "refused", "modules_to_save: whole modules are not supported", _MERGE
)
_RSLORA = _Rule(
    _on("use_rslora"),
    "misread",
    "use_rslora is not read: the update comes out sqrt(r) times too weak",
    _PORTABLE,
)
_ALPHAS = _Rule(
    _on("alpha_pattern"),
    "misread",
    "alpha_pattern is not read: those layers get the scaling of all others",
    _PORTABLE,
)
_ONE_SCALE = _Rule(
    _several_ranks,
    "misread",
    "ranks differ between layers, and the scaling is taken from r alone",
    _PORTABLE,
)

#: Reader -> (what it is, where its rules come from).
READERS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "vllm": ("vLLM", "vllm/lora/peft_helper.py, which reads seven fields; vllm issue 32599"),
        "sglang": ("SGLang", "sglang issue 40835"),
        "llama.cpp": ("llama.cpp", "convert_lora_to_gguf.py, which keeps alpha and the factors"),
        "olive": ("ONNX Runtime by way of Olive", "tried with olive-ai 0.13"),
    }
)

_RULES: Mapping[str, Sequence[_Rule]] = MappingProxyType(
    {
        "vllm": (
            _DORA,
            _SAVED,
            _Rule(_bias, "refused", "bias: trained biases of the base are not supported", _MERGE),
            _ALPHAS,
            _Rule(
                _several_ranks,
                "misread",
                "ranks differ between layers, and alpha / r is taken from the config's r for all",
                _PORTABLE,
            ),
        ),
        "sglang": (_RSLORA,),
        "llama.cpp": (_DORA, _SAVED, _RSLORA, _ALPHAS),
        "olive": (_ALPHAS,),
    }
)


def find_misreadings(
    config: Mapping[str, Any], ranks: Sequence[int], readers: Sequence[str] | None = None
) -> tuple[Finding, ...]:
    """Say what each reader would get wrong.

    Args:
        config: ``adapter_config.json`` as it is.
        ranks: The ranks that occur in the file.
        readers: Keys of :data:`READERS`; None for all.

    Returns:
        The findings, by reader; none: nothing is known to go wrong.

    Raises:
        ConfigError: There is no such reader.
    """
    for name in readers or ():
        if name not in READERS:
            raise ConfigError(f"reader must be one of {', '.join(READERS)}, got {name!r}.")
    return tuple(
        Finding(name, rule.effect, rule.reason, rule.remedy)
        for name in (READERS if readers is None else readers)
        for rule in _RULES[name]
        if rule.applies(config, frozenset(ranks))
    )
