"""What a LoRA adapter is: its rank, its scale, and the modules that it belongs to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from gauge_ext.adapters import config_values as values
from gauge_ext.adapters import patterns
from gauge_ext.adapters.spec import INITS, AdapterSpec, Init, is_init
from gauge_ext.errors import ConfigError

if TYPE_CHECKING:  # an adapter is read, and merged into a file, without torch
    import torch

    from gauge_ext.adapters.protocol import Kind

ALL_LINEAR = "all-linear"

Bias = Literal["none", "all", "lora_only"]


@dataclass(frozen=True)
class LoRAConfig:
    r"""The description of a LoRA adapter (arXiv:2106.09685); it checks itself.

    The adapter adds :math:`\Delta W = s\,B A` to the weight of each module that it targets, with
    ``lora_A`` = A of shape (rank, in), ``lora_B`` = B of shape (out, rank) and the scaling s.

    Args:
        rank: r, at least 1.
        alpha: s = alpha / rank.
        dropout: Probability, in [0, 1), with which training zeroes an input of the branch.
        target_modules: Which modules: names (each a module's path or the end of it after a dot),
            one regular expression for whole paths, or "all-linear": every ``nn.Linear`` but the
            output embeddings, and no stacked weights of experts.
        exclude_modules: Names, or an expression, of modules that are left out all the same.
        target_parameters: Bare parameters that get an adapter beside, each by its path or the end
            of it, such as "experts.down_proj": matrices, or stacks of them as MoE experts have.
            With ``target_modules=[]`` they alone do.
        trainable_token_indices: Tokens whose rows are trained whole: of the input embedding, or by
            the name of each embedding. Layers tied to it follow.
        use_rslora: s = alpha / sqrt(rank) instead (rank-stabilised, arXiv:2312.03732).
        use_dora: Whether the length of each weight's rows is trained apart from their direction
            (DoRA, arXiv:2402.09353).
        lora_bias: Whether the branch of each adapted layer has a bias of its own.
        fan_in_fan_out: Whether the base weights lie transposed, (in, out), as in transformers'
            ``Conv1D``. On a model each layer knows that itself; a file says it to those who merge
            without a model, and is written with it.
        bias: Which biases of the base are trained: "none", those of adapted layers ("lora_only"),
            or "all".
        modules_to_save: Names of modules that are trained whole, such as a fresh classifier.
        ensure_weight_tying: Whether what is tied to a parameter of ``modules_to_save`` is trained
            with it, and stays tied; of ``trainable_token_indices`` it always is. Of an embedding
            and the output layer that has its weight, where ``target_modules`` mean either, both
            have one adapter then, and one merged weight.
        rank_pattern: Ranks of modules that differ from ``rank``: expression for the end of a path
            -> rank; the first that matches wins.
        alpha_pattern: The same for ``alpha``.
        layers_to_transform: Index or indices of the layers that get an adapter; None for all. Only
            with a list of names.
        layers_pattern: Name or names of the list that holds those layers, such as ``layers``.
        init: How the factors start; a fresh adapter changes nothing with any of them. "kaiming": A
            uniform in ±1/sqrt(in), B zero. "gaussian": A normal with deviation 1/rank, B zero.
            "orthogonal", "pissa", "pissa_niter_4" (randomized), "olora": see
            :func:`gauge_ext.adapters.inits.start`. Starts that need data are functions of
            :mod:`gauge_ext.models.starting`.
        adapter_dtype: Dtype of A and B. None: float32 on half-precision bases, else the base's own.
        task_type: PEFT's name of the task, such as "CAUSAL_LM"; "SEQ_CLS" keeps the classifier's
            head out of "all-linear".
        base_model_name_or_path: Where the base comes from, kept for others.
        extra: Fields of PEFT's config that mean nothing here and are written back as they came.

    Raises:
        ConfigError: A value cannot be used; the message names the field and what was expected.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: str | Sequence[str] | None = None
    target_parameters: Sequence[str] | None = None
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    bias: Bias = "none"
    modules_to_save: Sequence[str] | None = None
    ensure_weight_tying: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    init: Init = "kaiming"
    adapter_dtype: torch.dtype | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def keep(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        keep("rank", values.rank("rank", self.rank))
        keep("alpha", values.finite("alpha", self.alpha))
        keep("dropout", values.finite("dropout", self.dropout))
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout must lie in [0, 1), got {self.dropout}.")
        if isinstance(self.target_parameters, str):
            raise values.wrong(
                "target_parameters", "a list of names or None", self.target_parameters
            )
        keep("target_parameters", values.selector("target_parameters", self.target_parameters))
        keep("trainable_token_indices", values.tokens(self.trainable_token_indices))
        targets = values.selector("target_modules", self.target_modules)
        if targets is None and self.target_parameters and self.target_modules is not None:
            targets = ()
        if targets is None:
            raise ConfigError(
                f"target_modules must name at least one module, got {self.target_modules!r}.",
                hint=f'Give names such as ["query", "value"], or "{ALL_LINEAR}".',
            )
        keep("target_modules", targets)
        keep("exclude_modules", values.selector("exclude_modules", self.exclude_modules))
        for name in ("task_type", "base_model_name_or_path"):
            if not isinstance(getattr(self, name), str | None):
                raise values.wrong(name, "a string or None", getattr(self, name))
        for name in (
            *("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"),
            "ensure_weight_tying",
        ):
            if not isinstance(getattr(self, name), bool):
                raise values.wrong(name, "True or False", getattr(self, name))
        keep("rank_pattern", values.table("rank_pattern", self.rank_pattern, values.rank))
        keep("alpha_pattern", values.table("alpha_pattern", self.alpha_pattern, values.finite))
        if self.use_dora and self.lora_bias:
            raise ConfigError(
                "use_dora and lora_bias cannot both be on.",
                hint='PEFT refuses it too; bias="lora_only" trains the bias of the base instead.',
            )
        self._check_layers(keep)
        if not is_init(self.init):
            choices = (*INITS, "pissa_niter_4 (or another number)")
            raise values.wrong("init", " or ".join(choices), self.init)
        if self.bias not in get_args(Bias):
            raise values.wrong("bias", " or ".join(map(repr, get_args(Bias))), self.bias)
        if isinstance(self.modules_to_save, str):
            raise values.wrong("modules_to_save", "a list of names or None", self.modules_to_save)
        keep("modules_to_save", values.selector("modules_to_save", self.modules_to_save))
        if self.adapter_dtype is not None:
            from gauge_ext.adapters.dtypes import FLOAT_DTYPES

            if self.adapter_dtype not in FLOAT_DTYPES:
                raise values.wrong(
                    "adapter_dtype", f"one of {FLOAT_DTYPES} or None", self.adapter_dtype
                )
        if not isinstance(self.extra, Mapping):
            raise values.wrong("extra", "a mapping", self.extra)
        keep("extra", dict(self.extra))

    def _check_layers(self, keep: Any) -> None:
        keep("layers_pattern", values.selector("layers_pattern", self.layers_pattern))
        layers: Any = self.layers_to_transform
        if isinstance(layers, Iterable):
            layers = tuple(layers) or None
        keep("layers_to_transform", layers)
        indices = layers if isinstance(layers, tuple) else () if layers is None else (layers,)
        for index in indices:
            if not isinstance(index, int) or isinstance(index, bool) or index < 0:
                raise values.wrong("layers_to_transform", "an index or indices from 0 up", index)
        if layers is None and self.layers_pattern is not None:
            raise ConfigError(
                f"layers_pattern ({self.layers_pattern!r}) needs layers_to_transform, got None."
            )
        if layers is not None and isinstance(self.target_modules, str):
            raise ConfigError(
                "layers_to_transform needs a list of names as target_modules, got the string "
                f"{self.target_modules!r}.",
                hint="Say the layers in the expression itself, or list names.",
            )

    def selects(self, name: str) -> bool:
        """Say whether the module at path ``name`` is a target, whatever its type.

        For "all-linear" every module is one that is not excluded: the types are the model's matter.
        """
        if self.exclude_modules is not None and patterns.selects(self.exclude_modules, name):
            return False
        if isinstance(self.target_modules, str):
            return self.is_all_linear or patterns.selects(self.target_modules, name)
        if name in self.target_modules:
            return True
        return patterns.selects(self.target_modules, name) and self._in_chosen_layer(name)

    def selects_parameter(self, name: str) -> bool:
        """Say whether the parameter at path ``name`` is a target."""
        return patterns.selects(self.target_parameters or (), name)

    def _in_chosen_layer(self, name: str) -> bool:
        layers = self.layers_to_transform
        if layers is None:
            return True
        holders = self.layers_pattern or ()
        index = patterns.layer_index(name, (holders,) if isinstance(holders, str) else holders)
        return index is not None and index in ((layers,) if isinstance(layers, int) else layers)

    @property
    def is_all_linear(self) -> bool:
        """Whether the targets are every ``nn.Linear`` but the output embeddings."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    @staticmethod
    def name_for(path: str, kind: Kind) -> str:
        """Return the path by which patterns mean the adapter at ``path``.

        The output projection of an attention goes by the attention's own, and the adapter on a
        parameter by the parameter's.
        """
        if kind == "parameter":
            holder, _, child = path.rpartition(".")
            return f"{holder}.{child.removeprefix('lora_')}"
        return path.rpartition(".")[0] if kind == "out_proj" else path

    def rank_for(self, name: str) -> int:
        """Return the rank of the adapter on the module at path ``name``."""
        return patterns.lookup(self.rank_pattern, name, self.rank)

    def alpha_for(self, name: str) -> float:
        """Return alpha of the adapter on the module at path ``name``."""
        return patterns.lookup(self.alpha_pattern, name, self.alpha)

    def scaling_for(self, name: str) -> float:
        """Return s of the adapter on the module at path ``name``: alpha/r, or alpha/sqrt(r)."""
        rank = self.rank_for(name)
        return self.alpha_for(name) / (math.sqrt(rank) if self.use_rslora else rank)

    def spec_for(self, name: str) -> AdapterSpec:
        """Return what the adapter on the module at path ``name`` is to be."""
        return AdapterSpec(
            rank=self.rank_for(name),
            scaling=self.scaling_for(name),
            dropout=self.dropout,
            init=self.init,
            dtype=self.adapter_dtype,
            use_dora=self.use_dora,
            lora_bias=self.lora_bias,
        )
