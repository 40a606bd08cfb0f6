"""Injects PEFT adapters into the layers of a part: PEFT's configuration, and initial values independent of the cut."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraLayer
from peft.utils.peft_types import PeftType

from fedsplit.adaptation.methods import fields_of, method_of, options_of
from fedsplit.errors import SettingError
from fedsplit.model.families import Family
from fedsplit.model.head import HEAD
from fedsplit.model.parts import Part
from fedsplit.model.sources import config_folder
from fedsplit.model.unsplit import empty_model
from fedsplit.seeds import derive_seed
from fedsplit.settings.config import Config
from fedsplit.settings.documents import suggest
from fedsplit.settings.sections import LoraSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "default"
"""PEFT's name of the single adapter of a part."""


def make_config(
    settings: LoraSettings,
    family: Family,
    blocks: Sequence[int] | None = None,
    seed: int = 0,
    head: str = "frozen",
) -> PeftConfig:
    """Returns PEFT's configuration of adapters by settings.

    Args:
        settings: Method, rank, alpha, dropout, targets and further fields.
        family: Record of the model family.
        blocks: Numbers of the adapted blocks of the unsplit model; None for all.
        seed: Seed of the run, for values that are drawn and not trained.
        head: Training of the head, a name in `fedsplit.settings.choices.HEADS`; "frozen" for a part without a head.

    Raises:
        SettingError: A further field does not exist for the method, or has an impossible value.

    Example:
        >>> from fedsplit.model.derivation import family_of, text_config
        >>> from fedsplit.settings.config import BUNDLED_MODEL
        >>> config = make_config(LoraSettings(rank=(4,)), family_of(text_config(BUNDLED_MODEL)))
        >>> config.r, sorted(config.target_modules)
        (4, ['c_attn', 'c_fc', 'c_proj'])
    """
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method_of(settings).kind)]
    known = {entry.name for entry in dataclasses.fields(cls) if entry.init}
    if method_of(settings).allocates:
        known.discard("target_parameters")  # AdaLoRA inherits the field from LoRA, and PEFT ignores it there
    for name in options_of(settings):
        if name not in known:
            raise SettingError("lora.options", name, f"a field of PEFT's {cls.__name__}; {suggest(name, known)}")

    values = fields_of(settings, seed)
    values |= _adapted_layers(settings, family, blocks, known, head)
    values["task_type"] = "CAUSAL_LM"
    if "fan_in_fan_out" in known:
        values["fan_in_fan_out"] = family.transposed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cls(**values)
    except (TypeError, ValueError) as error:
        raise _refused(settings, error) from None


def chosen_targets(settings: LoraSettings, family: Family) -> tuple[str, ...]:
    """Returns the names of the layers that get adapters: those in the settings, or the defaults for the method.

    Args:
        settings: Method and targets.
        family: Names of the model's modules.
    """
    usual = family.norms if method_of(settings).norms else family.targets
    return tuple(settings.targets) or usual


def _refused(settings: LoraSettings, error: Exception) -> SettingError:
    """Converts an error from PEFT to an error of one line."""
    reason = " ".join(str(error).split()) or type(error).__name__
    allowed = f"what PEFT takes ({reason})"
    if settings.options:
        return SettingError("lora.options", settings.options, allowed)
    return SettingError("lora.method", settings.method, allowed)


def _adapted_layers(
    settings: LoraSettings,
    family: Family,
    blocks: Sequence[int] | None,
    known: set[str],
    head: str,
) -> dict[str, Any]:
    """Returns the fields of PEFT's configuration that select the adapted layers."""
    is_for_norms = method_of(settings).norms
    names_feedforward = "feedforward_modules" in known  # IA3 has the field
    chosen = chosen_targets(settings, family)
    names = [name for name in chosen if name not in family.parameters]
    if head == "lora":
        has_blocks = blocks is None or len(blocks) > 0
        names = [*names, HEAD] if has_blocks else [HEAD]
    where: dict[str, Any] = {"modules_to_save": [HEAD]} if head == "full" else {}

    asked = family.asked(chosen)
    if asked:
        if "target_parameters" not in known:
            allowed = (
                f"{','.join(family.targets)} with adapters of the kind {settings.method}, which sit on modules only"
            )
            raise SettingError("lora.targets", asked[0], allowed)
        paths = [family.parameters[name] for name in asked]
        if blocks is not None:  # `layers_to_transform` selects blocks for modules only
            paths = [f"{family.blocks}.{block}.{path}" for block in blocks for path in paths]
        where["target_parameters"] = paths
    can_select_blocks = blocks is None or {"layers_to_transform", "layers_pattern"} <= known
    if can_select_blocks and not is_for_norms and not names_feedforward:
        where["target_modules"] = names
        if blocks is not None:
            where |= {"layers_to_transform": list(blocks), "layers_pattern": family.blocks}
        return where

    # All further methods get a pattern: a bare name may match modules outside the blocks, or in both MLP and attention.
    numbers = r"\d+" if blocks is None else "|".join(map(str, blocks))
    where["target_modules"] = rf".*\.{family.blocks}\.({numbers})\.(.*\.)?({_either(names)})"
    if names_feedforward:
        where["feedforward_modules"] = rf".*\.({_either(family.narrows)})"
    return where


def _either(names: Sequence[str]) -> str:
    """Returns a pattern that matches any of the names; for no names, a pattern that matches nothing."""
    return "|".join(map(re.escape, names)) or "(?!)"


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds torch's generator inside the context, and restores the generator's state after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def inject(part: Part | PreTrainedModel, config: PeftConfig, seed: int) -> None:
    """Injects adapters into a part, in place, and freezes all parameters except the adapters' parameters.

    The random values of a layer depend only on the seed and the layer's name in the unsplit model, so that all clients
    have equal values under every cut.

    Args:
        part: A part, or an unsplit model, with frozen base weights.
        config: PEFT's configuration.
        seed: Seed of the run.

    Raises:
        ValueError, TypeError: A layer does not suit the configuration.
    """
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    unsplit_name = part.unsplit_name if isinstance(part, Part) else str

    class Seeded(tuner):  # type: ignore[misc, valid-type]  # PEFT has no types
        # PEFT calls this method once for each layer, and draws the layer's initial values in it.
        def _create_and_replace(
            self,
            config: PeftConfig,
            name: str,
            *args: Any,
            current_key: str,
            **more: Any,
        ) -> None:
            with _seeded(derive_seed(seed, "adapter", unsplit_name(current_key))):
                super()._create_and_replace(config, name, *args, current_key=current_key, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Seeded(part, config, adapter_name=ADAPTER)


def exported(name: str) -> str:
    """Returns PEFT's name of an adapter's parameter in a file.

    Example:
        >>> exported("transformer.h.0.attn.c_attn.lora_A.default.weight")
        'transformer.h.0.attn.c_attn.lora_A.weight'
    """
    if name.endswith(f".lora_magnitude_vector.{ADAPTER}.weight"):
        return name.removesuffix(f".{ADAPTER}.weight")
    return name.replace(f".{ADAPTER}.", ".").removesuffix(f".{ADAPTER}")


def check_injection(config: Config, family: Family) -> None:
    """Checks that a run's adapters suit the layers of the model, by injecting them into a model without weights.

    Args:
        config: Settings of the run.
        family: Record of the model family.

    Raises:
        SettingError: A layer does not suit the adapters, for example if a block size does not divide the layer's size.
    """
    if method_of(config.lora).residual:
        _check_rank(config, family)
    adapted = make_config(config.lora, family, seed=config.seed)
    try:
        with torch.device("meta"):
            inject(empty_model(config_folder(config.model, weights=False)), adapted, config.seed)
    except (ValueError, TypeError, AssertionError, ZeroDivisionError) as error:
        raise _refused(config.lora, error) from None
    except (NotImplementedError, RuntimeError):
        return  # the method reads the weights, and no weight is loaded yet


def _check_rank(config: Config, family: Family) -> None:
    """Checks that every adapted weight can be factorised at the rank of the run.

    Raises:
        SettingError: A weight has fewer rows or columns than the rank. PEFT would give the layer a smaller rank, and
            the parties would not fit together.
    """
    rank = config.lora.top_rank
    plain_settings = dataclasses.replace(config.lora, method="lora", options="")
    plain = make_config(plain_settings, family, seed=config.seed)  # without any read of weights
    with torch.device("meta"):
        model = empty_model(config_folder(config.model, weights=False))
        inject(model, plain, config.seed)
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        largest = min(module.in_features, module.out_features)
        if largest < rank:
            allowed = f"1 to {largest} with the method {config.lora.method}, which decomposes the weights of {name}"
            raise SettingError("lora.rank", rank, allowed)


def trained_names(part: Part) -> frozenset[str]:
    """Returns the names of a part's trainable parameters. Right after `inject`, only adapters are trainable."""
    return frozenset(name for name, parameter in part.named_parameters() if parameter.requires_grad)
