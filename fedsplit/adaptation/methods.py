"""Adapter methods: PEFT's methods that work on a part, and PEFT's fields for fedsplit's settings.

This module contains PEFT's names and no PEFT code, so that settings can be checked before any library is loaded.
`fedsplit.adaptation.injection` creates the adapters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from fedsplit.errors import SettingError
from fedsplit.settings.choices import PROMPTED
from fedsplit.settings.config import Config
from fedsplit.settings.sections import LoraSettings


@dataclass(frozen=True)
class Method:
    """An adapter method of PEFT.

    Attributes:
        kind: PEFT's type of the adapter.
        rank: PEFT's field for `lora.rank`; None for a method without a rank.
        alpha: PEFT's field for `lora.alpha`; None for a method without alpha.
        dropout: PEFT's field for `lora.dropout`; None for a method without dropout.
        seed: PEFT's field for the seed of values that are drawn and not trained; None for a method without such values.
            The field gets the seed of the run, so that all parties draw equal values.
        preset: Fields of PEFT's configuration that the method's name implies.
        transposed: True if the method works on `Conv1D`, which stores weights as (in, out).
        factors: True if the method only adds s * B @ A to a layer.
        norms: True if the method trains the norms of the blocks instead of projections.
        residual: True if the method moves the principal part of the base weight into the factors.
        allocates: True if the method reallocates ranks during training (`fedsplit.adaptation.rank_budget`).

    Example:
        >>> ADAPTER_METHODS["pissa"].residual, ADAPTER_METHODS["lora"].factors
        (True, True)
    """

    kind: str
    rank: str | None = "r"
    alpha: str | None = None
    dropout: str | None = None
    seed: str | None = None
    preset: Mapping[str, object] = field(default_factory=dict)
    transposed: bool = False
    factors: bool = False
    norms: bool = False
    residual: bool = False
    allocates: bool = False


def _lora(
    factors: bool = True,
    residual: bool = False,
    transposed: bool = True,
    **preset: object,
) -> Method:
    return Method(
        kind="LORA",
        rank="r",
        alpha="lora_alpha",
        dropout="lora_dropout",
        preset=preset,
        transposed=transposed,
        factors=factors,
        residual=residual,
    )


ADAPTER_METHODS: Mapping[str, Method] = {
    "lora": _lora(),
    "rslora": _lora(use_rslora=True),
    "dora": _lora(factors=False, use_dora=True),
    "pissa": _lora(residual=True, init_lora_weights="pissa"),
    "olora": _lora(residual=True, transposed=False, init_lora_weights="olora"),
    # Its ranks are the options init_r and target_r.
    "adalora": Method(
        "ADALORA", rank=None, alpha="lora_alpha", dropout="lora_dropout", transposed=True, allocates=True
    ),
    "ia3": Method("IA3", rank=None, transposed=True),
    "loha": Method("LOHA", alpha="alpha", dropout="rank_dropout"),
    "lokr": Method("LOKR", alpha="alpha", dropout="rank_dropout"),
    "oft": Method("OFT", rank=None),
    "boft": Method("BOFT", rank=None, dropout="boft_dropout"),
    "hra": Method("HRA"),
    "road": Method("ROAD", rank=None),
    # Every party draws the projections from the run's seed, so that no file has to hold them.
    "vera": Method(
        "VERA",
        dropout="vera_dropout",
        seed="projection_prng_key",
        preset={"save_projection": False},
        transposed=True,
    ),
    "pvera": Method(
        "PVERA",
        dropout="pvera_dropout",
        seed="projection_prng_key",
        preset={"save_projection": False},
        transposed=True,
    ),
    "randlora": Method(
        "RANDLORA",
        alpha="randlora_alpha",
        dropout="randlora_dropout",
        seed="projection_prng_key",
        preset={"save_projection": False},
        transposed=True,
    ),
    "fourierft": Method("FOURIERFT", rank=None, seed="random_loc_seed", transposed=True),
    "waveft": Method("WAVEFT", rank=None, seed="random_loc_seed", transposed=True),
    "c3a": Method("C3A", rank=None),
    "shira": Method("SHIRA", seed="random_seed"),
    "supertuning": Method("SUPERTUNING", rank=None, preset={"save_precomputed_indices": False}),
    "miss": Method("MISS", dropout="miss_dropout"),
    # PEFT has Bone as a variant of MiSS.
    "bone": Method("MISS", dropout="miss_dropout", preset={"init_weights": "bat"}),
    "gralora": Method("GRALORA", alpha="alpha", dropout="gralora_dropout", transposed=True),
    "delora": Method("DELORA", dropout="module_dropout"),
    "hira": Method("HIRA", dropout="hira_dropout", transposed=True),
    "deft": Method("DEFT", alpha="alpha", dropout="deft_dropout", transposed=True),
    "glora": Method("GLORA"),
    "psoft": Method("PSOFT", alpha="psoft_alpha", dropout="psoft_dropout", seed="random_seed"),
    "peanut": Method("PEANUT"),
    "beft": Method("BEFT", rank=None),
    "ln_tuning": Method("LN_TUNING", rank=None, transposed=True, norms=True),
}
"""The methods, by the names for `--peft`."""

_SHARED = "which layers on both sides of the cut would have to train together, at every step"
_DATA = "start from a pass of data through the whole model, which nobody has"
_INPUT = "changes what the model reads, not its layers"

REFUSED: Mapping[str, str] = {
    "adamss": "it clusters the singular vectors of the weights, which need not come out alike at two parties",
    "frod": "it decomposes the weights of all blocks jointly, which no party has",
    "lily": f"layers share experts, {_SHARED}",
    "osf": "it projects gradients by hooks on its parameters, which a trunk whose versions never change has none of",
    "poly": "it routes by task ids, which causal language modelling has none of",
    "shadow": "a second network runs beside all blocks of the model, across the cut",
    "tinylora": "its projections depend on the number of a layer among all adapted ones",
    "unilora": f"all layers share one vector, {_SHARED}",
    "vblora": f"all layers share one bank of vectors, {_SHARED}",
    "xlora": "a router reads the hidden states of the whole model to mix adapters trained before",
    "corda": f"its factors {_DATA}",
    "eva": f"its factors {_DATA}",
    "lora_ga": f"its factors {_DATA}",
    "loftq": "its factors make up for quantised base weights",
    "trainable_tokens": "it trains embeddings, which stay frozen",
    "adaption_prompt": _INPUT,
    "cartridge": _INPUT,
    "cpt": _INPUT,
    "multitask_prompt_tuning": _INPUT,
    "p_tuning": "it is called ptuning here",
    "prefix_tuning": "it is called prefix here",
    "prompt_tuning": "it is called prompt here",
    **dict.fromkeys(PROMPTED, "it is not in the layers: prompt.kind says so"),
}
"""Reason why fedsplit does not offer a method of PEFT's, by the method's name."""

_OURS = "what fedsplit says itself"
_NUMBERED = "one for all layers"
RESERVED: Mapping[str, str] = {
    **dict.fromkeys(("peft_type", "task_type", "auto_mapping", "peft_version", "inference_mode"), _OURS),
    **dict.fromkeys(("base_model_name_or_path", "revision", "fan_in_fan_out", "layers_to_transform"), _OURS),
    **dict.fromkeys(("layers_pattern", "feedforward_modules", "save_projection", "progressbar"), _OURS),
    **dict.fromkeys(("target_modules", "exclude_modules", "target_parameters"), "lora.targets says which layers"),
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "lambda_pattern", "block_size_pattern"), _NUMBERED),
    "n_frequency_pattern": _NUMBERED,
    "proportional_parameters": _NUMBERED,
    "total_step": "it follows from rounds and train.steps",
    "use_rslora": "lora.rslora says so",
    **dict.fromkeys(("use_dora", "use_bdlora", "velora_config", "kasa_config"), "another method, not this one's"),
    **dict.fromkeys(("monteclora_config", "arrow_config", "alora_invocation_tokens"), "another method, not this one's"),
    **dict.fromkeys(("modules_to_save", "trainable_token_indices", "bias", "lora_bias"), "only adapters train"),
    **dict.fromkeys(("loftq_config", "use_qalora", "qalora_group_size"), "base weights are not quantised"),
    **dict.fromkeys(("eva_config", "corda_config", "lora_ga_config"), f"such factors {_DATA}"),
    "module_dropout": "no layer may be left out of a step",
    "generator_seed": "what is drawn in a step follows from the run's seed and the step",
    **dict.fromkeys(("megatron_config", "megatron_core", "runtime_config"), "for another runtime"),
    **dict.fromkeys(("layer_replication", "ensure_weight_tying"), "the model's own blocks, each once"),
}
"""Reason why `lora.options` may not have a field of PEFT's configurations, by the field's name."""

_STARTS = ("gaussian", "orthogonal", True, False)
"""Values of `init_lora_weights` that leave the base weights unchanged."""


def method_of(settings: LoraSettings) -> Method:
    """Returns the adapter method in settings.

    Raises:
        SettingError: The method does not exist, or cannot work on a part.

    Example:
        >>> method_of(LoraSettings(method="dora")).preset
        {'use_dora': True}
    """
    if settings.method in ADAPTER_METHODS:
        return ADAPTER_METHODS[settings.method]
    why = f" ({REFUSED[settings.method]})" if settings.method in REFUSED else ""
    raise SettingError("lora.method", f"{settings.method}{why}", " | ".join((*ADAPTER_METHODS, *PROMPTED)))


def options_of(settings: LoraSettings) -> dict[str, Any]:
    """Returns the fields of PEFT's configuration in `lora.options`.

    Example:
        >>> options_of(LoraSettings(options='{"target_r": 4}'))
        {'target_r': 4}
    """
    options: dict[str, Any] = json.loads(settings.options or "{}")
    return options


def fields_of(settings: LoraSettings, seed: int) -> dict[str, Any]:
    """Returns PEFT's fields for settings, except the fields that select layers.

    Args:
        settings: Method, rank, alpha, dropout, and further fields.
        seed: Seed of the run.

    Example:
        >>> fields_of(LoraSettings(method="vera", rank=(4,), dropout=0.0), seed=7)
        {'r': 4, 'vera_dropout': 0.0, 'projection_prng_key': 7, 'save_projection': False}
    """
    method = method_of(settings)
    values: dict[str, Any] = {}
    if method.rank is not None:
        values[method.rank] = settings.top_rank
    if method.alpha is not None:
        values[method.alpha] = settings.alpha
    if method.dropout is not None:
        values[method.dropout] = settings.dropout
    if method.kind == "LORA":
        values["use_rslora"] = settings.rslora  # the preset of the method rslora wins
    if method.seed is not None:
        values[method.seed] = seed
    options = options_of(settings)
    if method.allocates:  # PEFT requires some number; the real number is in the part's `RankBudget`
        values["total_step"] = options.get("tinit", 0) + options.get("tfinal", 0) + 1
    # Options last: `_check_options` has refused those that the method or another setting decides.
    return {**values, **method.preset, **options}


def check_method(config: Config, transposed: bool) -> None:
    """Checks that the adapter method of a run suits the model and the settings.

    Args:
        config: Settings of the run.
        transposed: True if the model's projections are `Conv1D`.

    Raises:
        SettingError: The method does not work on the model, or does not know a setting that is set.

    Example:
        >>> check_method(Config(lora=LoraSettings(method="dora")), transposed=True)
    """
    settings = config.lora
    method = method_of(settings)
    if transposed and not method.transposed:
        able = " | ".join(name for name, other in ADAPTER_METHODS.items() if other.transposed)
        allowed = f"{able} for a model whose projections store (in, out), as GPT-2's do"
        raise SettingError("lora.method", settings.method, allowed)
    _check_unused(settings, method)
    # The server pads and cuts pairs of factors only.
    mixes_ranks = len(set(settings.rank)) > 1
    if mixes_ranks and not _takes_mixed_ranks(method):
        able = ", ".join(name for name, other in ADAPTER_METHODS.items() if _takes_mixed_ranks(other))
        ranks = ",".join(map(str, settings.rank))
        raise SettingError("lora.rank", ranks, f"one rank with the method {settings.method}; {able} take several")
    if method.residual and config.dtype != "fp32":
        allowed = f"fp32 with the method {settings.method}, whose change of base weights {config.dtype} would round"
        raise SettingError("dtype", config.dtype, allowed)
    _check_options(settings, method)


def _takes_mixed_ranks(method: Method) -> bool:
    """Returns True if clients may differ in rank. A method on the base weights would change each base differently."""
    return method.factors and not method.residual


def _check_unused(settings: LoraSettings, method: Method) -> None:
    """Checks that settings without a meaning for the method have the defaults.

    Raises:
        SettingError: A setting without a meaning is set.
    """
    peft_fields = {
        "rank": method.rank,
        "alpha": method.alpha,
        "dropout": method.dropout,
        "rslora": "use_rslora" if method.kind == "LORA" else None,
    }
    for entry in fields(LoraSettings):
        is_used = peft_fields.get(entry.name, entry.name) is not None
        value = getattr(settings, entry.name)
        is_no_dropout = entry.name == "dropout" and value == 0  # true of a method without dropout, too
        if is_used or value == entry.default or is_no_dropout:
            continue
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        allowed = f"the default with the method {settings.method}, which has no such setting"
        raise SettingError(f"lora.{entry.name}", shown, allowed)


def _check_options(settings: LoraSettings, method: Method) -> None:
    """Checks that `lora.options` has no field with a different source.

    Raises:
        SettingError: A field is a setting of fedsplit's, reserved, or implied by the method.
    """
    # A field that the method lacks gives the key None, which no option has.
    setting_of = {
        method.rank: "lora.rank",
        method.alpha: "lora.alpha",
        method.dropout: "lora.dropout",
        method.seed: "seed",
    }
    for name, value in options_of(settings).items():
        if name in setting_of:
            raise SettingError("lora.options", name, f"other fields; this one is the setting {setting_of[name]}")
        if name in RESERVED or name in method.preset:
            reason = RESERVED.get(name, f"what the method {settings.method} stands for")
            raise SettingError("lora.options", name, f"other fields ({reason})")
        if name == "init_lora_weights" and value not in _STARTS:
            allowed = "gaussian | orthogonal | true | false; or --peft pissa or olora"
            raise SettingError("lora.options", f"{name} {value}", allowed)


def draws_fresh(settings: LoraSettings) -> bool:
    """Returns True if factors A start from `fedsplit.updates.fresh_factor`, and factors B from zero."""
    method = method_of(settings)
    start = options_of(settings).get("init_lora_weights", True)
    return method.kind == "LORA" and not method.residual and start is True
