"""Putting adapters on a model's layers, and taking them off again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from torch import nn

from gauge_ext.adapters import AdaptedLayer, LoRAConfig, adapt, variant_for
from gauge_ext.adapters.embedding import LoRAEmbedding
from gauge_ext.adapters.many import DEFAULT
from gauge_ext.adapters.parameter import LoRAHolder, adapt_parameter
from gauge_ext.adapters.whole import whole_modules
from gauge_ext.errors import ConfigError
from gauge_ext.models import fast_path, whole
from gauge_ext.models.adapted import KEY, Attachment, attachment, lora_layers, record, unwrap
from gauge_ext.models.roster import active_pairs, require_new_name, require_unmerged
from gauge_ext.models.row_names import accept_row_names, refuse_row_names
from gauge_ext.models.shared_inputs import Sample, group_shared_inputs, require_sample
from gauge_ext.models.targets import find_targets, nearest_hint
from gauge_ext.models.tied import named_by_embedding, require_same_ties
from gauge_ext.models.tokens import train_tokens

ModelT = TypeVar("ModelT", bound=nn.Module)


def attach(
    model: ModelT,
    config: LoRAConfig,
    name: str = DEFAULT,
    *,
    group_inputs: bool | Sample = False,
) -> ModelT:
    """Put LoRA adapters on the layers that ``config`` means, in place.

    Everything but the adapters is frozen; :func:`detach` restores the former ``requires_grad``.
    A model that has adapters gets further ones under another name: on other layers or the same, of
    any kind, rank and scale. They are trainable and, since there are others, not active: see
    :func:`gauge_ext.set_adapters`.

    Args:
        model: Any module; one compiled by ``torch.compile`` counts as what it wraps.
        config: Which layers, which rank, which scale.
        name: Not empty, without a dot or a slash.
        group_inputs: Compute layers together that read one tensor, see
            :func:`gauge_ext.models.group_shared_inputs`: a sample of the model's inputs, on which
            it is called to see which do; True: those that are known by their names; False: none.

    Returns:
        ``model``. :func:`attachment` tells what was adapted and what was left out,
        :func:`gauge_ext.models.shared_input_groups` what was grouped.

    Raises:
        TargetError: No layer is meant, or one that is meant cannot carry an adapter.
        AdapterStateError: There is an adapter of that name, or the adapters are merged, or only a
            part of the model has adapters.
        ConfigError: ``config`` is no :class:`LoRAConfig`, or the name cannot be used, or a further
            adapter asks for trained biases (``bias``), or to be grouped; or ``group_inputs`` is no
            sample of the model's inputs.
    """
    if not isinstance(config, LoRAConfig):
        raise ConfigError(f"config must be a LoRAConfig, got a {type(config).__name__}.")
    sample = None if isinstance(group_inputs, bool) else group_inputs
    require_sample("group_inputs", sample)
    inner = unwrap(model)
    grouped = group_inputs is not False
    if grouped and KEY in vars(inner):
        raise ConfigError(
            "group_inputs is for the first adapter: with several, layers run one by one.",
            hint="Leave it out.",
        )
    require_new_name(inner, name)
    require_unmerged(inner)
    match = find_targets(inner, config)
    if match.unmatched:
        warnings.warn(
            f"target_modules {list(match.unmatched)} match no module and were passed over. "
            + nearest_hint(inner, match.unmatched),
            stacklevel=2,
        )
    if experts := match.bare_experts:
        warnings.warn(
            f'"all-linear" leaves out {len(experts)} weights of experts and routers, which are no '
            f"linear layers here, the first of them {experts[0]!r}. To adapt them, name them in "
            f"target_parameters: {sorted({'.'.join(path.split('.')[-2:]) for path in experts})}.",
            stacklevel=2,
        )
    config = named_by_embedding(inner, config, match.tied)
    put_on(inner, config, match.layers, match.skipped, match.parameters, name, match.tied)
    if grouped:
        try:
            group_shared_inputs(inner, sample)
        except BaseException:
            detach(inner)
            raise
    return model


def put_on(
    model: nn.Module,
    config: LoRAConfig,
    layers: Mapping[str, nn.Module],
    skipped: Mapping[str, str],
    parameters: Mapping[str, nn.Module],
    name: str,
    tied: Mapping[str, str],
) -> None:
    """Adapt exactly ``layers`` and ``parameters`` of ``model``: all, or on failure none.

    The layers ``tied`` to an embedding (path -> the embedding's) get its adapter.
    """
    require_same_ties(layers, tied, name)
    before: Attachment | None = vars(model).get(KEY)
    trainable = frozenset(n for n, p in model.named_parameters() if p.requires_grad)
    active = [(name, 1.0)] if before is None else active_pairs(model)
    if before is not None:
        _require_no_bias(config)
    fresh: list[AdaptedLayer] = []
    beside: list[AdaptedLayer] = []
    try:
        for path, layer in layers.items():
            variant = variant_for(layer)
            spec = config.spec_for(path if variant is None else config.name_for(path, variant.kind))
            if isinstance(layer, AdaptedLayer):
                layer.add(name, spec)
                beside.append(layer)
            else:
                fresh.append(adapt(layer, spec, name))
        for path, table in tied.items():
            embedding, head = model.get_submodule(table), model.get_submodule(path)
            if isinstance(embedding, LoRAEmbedding) and type(head) is nn.Linear:
                embedding.tie(head)
        for path, holder in parameters.items():
            last, spec = path.rpartition(".")[2], config.spec_for(path)
            present = (
                holder.parameter_adapters().get(last) if isinstance(holder, LoRAHolder) else None
            )
            if present is not None:
                present.add(name, spec)
                beside.append(present)
            else:
                fresh.append(adapt_parameter(holder, last, spec, name))
        taken = (*layers.values(), *parameters.values())
        chosen = whole.chosen(model, config, layers)
        tokens, further_tokens = train_tokens(model, config, taken, chosen, name)
        fresh += tokens
        beside += further_tokens
        saved = whole.save_modules(model, config, name)
    except BaseException:
        for done in fresh:
            done.to_base()
        for done in beside:
            done.remove(name)
        raise
    for layer in (*fresh, *saved):
        layer.set_active(active)
    if before is not None or name != DEFAULT:
        accept_row_names(model)
    switches = fast_path.suspend(model, layers)
    names = tuple(lora_layers(model)) if before or parameters else tuple(layers)
    if before is not None:
        now = replace(
            before,
            configs={**before.configs, name: config},
            names=names,
            switches=before.switches + switches,
        )
        record(model, now)
        return
    own = {id(p) for layer in (*fresh, *saved) for p in layer.adapter_parameters().values()}
    for parameter in model.parameters():
        if id(parameter) not in own:
            parameter.requires_grad_(False)
    copied = {f"{path}.{key}" for path, m in whole_modules(model).items() for key in m.trained()}
    own_whole = whole.replace(model, [path for path in chosen if path not in copied])
    record(model, Attachment({name: config}, names, dict(skipped), trainable, switches, own_whole))


def _require_no_bias(config: LoRAConfig) -> None:
    """Refuse a further adapter that wants biases of the base for itself."""
    if config.bias != "none":
        raise ConfigError(
            f"bias={config.bias!r} is for the first adapter on a model: a trained bias stands in "
            "the base, for all adapters that share it, so one adapter at most has any, as in PEFT.",
            hint="Attach this one first and give the others bias='none', or name the modules in "
            "modules_to_save, of which each adapter has copies of its own, or use a copy of the "
            "model.",
        )


def detach(model: ModelT) -> ModelT:
    """Take the adapters off and leave the model as it was before :func:`attach`, bit for bit.

    Weights, classes of the layers and ``requires_grad`` are as before. Of a model that was merged
    with ``keep_base=False`` the base is gone: what stays is the merged model, in plain layers.

    Raises:
        AdapterStateError: No adapters were attached.
    """
    inner = unwrap(model)
    done = attachment(inner)
    for layer in lora_layers(inner).values():
        if layer.can_unmerge:
            layer.unmerge()
        layer.to_base()
    whole.restore(inner, done.whole)
    for module in whole_modules(inner).values():
        module.put_back()
    for name, parameter in inner.named_parameters():
        parameter.requires_grad_(name in done.trainable)
    forget(inner)
    return model


def forget(model: nn.Module) -> None:
    """Undo :func:`record` on the model and below it, and switch fused paths on again."""
    for module in model.modules():
        refuse_row_names(module)
        if (done := vars(module).pop(KEY, None)) is not None:
            fast_path.restore(module, done.switches)
