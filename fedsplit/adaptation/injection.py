"""Adapters put into the layers of a part by PEFT: its configuration, and a start that depends on no cut."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraLayer
from peft.utils.peft_types import PeftType

from fedsplit.adaptation.methods import fields_of, method_of, options_of
from fedsplit.allowed import SettingError
from fedsplit.config import Config, LoraSettings
from fedsplit.documents import suggest
from fedsplit.model.families import Family
from fedsplit.model.head import HEAD
from fedsplit.model.parts import Part
from fedsplit.model.sources import config_folder
from fedsplit.model.unsplit import empty_model
from fedsplit.seeds import derive_seed

ADAPTER = "default"
"""What PEFT calls the one adapter that a part has."""


def make_config(
    settings: LoraSettings,
    family: Family,
    blocks: Sequence[int] | None = None,
    seed: int = 0,
    head: str = "frozen",
) -> Any:
    """PEFT's configuration of our adapters.

    Args:
        settings: The kind of adapter, rank, alpha, dropout, targets and further fields.
        family: The model's family.
        blocks: The blocks of the unsplit model that are adapted; all where None.
        seed: The run's seed, from which follows what is drawn and not trained.
        head: What trains of the head, one of `fedsplit.allowed.HEADS`; "frozen" for a part without it.

    Raises:
        SettingError: Among the further fields is one that this kind does not have, or with an impossible value.
    """
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method_of(settings).kind)]
    known = {entry.name for entry in dataclasses.fields(cls) if entry.init}
    if method_of(settings).allocates:
        known.discard("target_parameters")  # LoRA's, of which PEFT's AdaLoRA can make nothing
    for name in options_of(settings):
        if name not in known:
            raise SettingError("lora.options", name, f"a field of PEFT's {cls.__name__}; {suggest(name, known)}")
    given = {**fields_of(settings, seed), **_where(settings, family, blocks, known, head), "task_type": "CAUSAL_LM"}
    if "fan_in_fan_out" in known:
        given["fan_in_fan_out"] = family.transposed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cls(**given)
    except (TypeError, ValueError) as error:
        raise _refused(settings, error) from None


def _refused(settings: LoraSettings, error: Exception) -> SettingError:
    """What PEFT says, as the one line to show."""
    reason = " ".join(str(error).split()) or type(error).__name__
    setting, value = ("lora.options", settings.options) if settings.options else ("lora.method", settings.method)
    return SettingError(setting, value, f"what PEFT takes ({reason})")


def _where(
    settings: LoraSettings, family: Family, blocks: Sequence[int] | None, known: set[str], head: str
) -> dict[str, Any]:
    """The fields that say which layers are adapted."""
    norms, feeds = method_of(settings).norms, "feedforward_modules" in known
    chosen = settings.targets or (family.norms if norms else family.targets)
    names = [name for name in chosen if name not in family.parameters]
    if head == "lora":
        names = [*(names if blocks is None or len(blocks) else []), HEAD]
    where: dict[str, Any] = {"modules_to_save": [HEAD]} if head == "full" else {}
    if asked := family.asked(chosen):
        if "target_parameters" not in known:
            words = f"{','.join(family.targets)} with adapters of the kind {settings.method}, which sit on modules only"
            raise SettingError("lora.targets", asked[0], words)
        paths = [family.parameters[name] for name in asked]
        if blocks is not None:  # PEFT chooses blocks for modules only
            paths = [f"{family.blocks}.{block}.{path}" for block in blocks for path in paths]
        where["target_parameters"] = paths
    if not (norms or feeds) and (blocks is None or {"layers_to_transform", "layers_pattern"} <= known):
        numbered = {} if blocks is None else {"layers_to_transform": list(blocks), "layers_pattern": family.blocks}
        return {**where, "target_modules": names, **numbered}
    # Else as a pattern: a name may also be that of something outside the blocks, or of an MLP and of attention.
    numbers = r"\d+" if blocks is None else "|".join(map(str, blocks))
    where["target_modules"] = rf".*\.{family.blocks}\.({numbers})\.(.*\.)?({_either(names)})"
    if feeds:
        where["feedforward_modules"] = rf".*\.({_either(family.narrows)})"
    return where


def _either(names: Sequence[str]) -> str:
    """A pattern of any of some names, which matches nothing where there are none."""
    return "|".join(map(re.escape, names)) or "(?!)"


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def inject(part: Any, config: Any, seed: int) -> None:
    """Puts adapters into a part, in place, and freezes everything else.

    What a layer draws depends on the seed and its name in the unsplit model alone, so that it is the same for every
    client and every cut.

    Args:
        part: A part, or a whole model of the library's; its base weights must be frozen already.
        config: PEFT's configuration.
        seed: The run's seed.

    Raises:
        ValueError, TypeError: A layer does not suit the configuration.
    """
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    unsplit_name = part.unsplit_name if isinstance(part, Part) else str

    class Seeded(tuner):  # type: ignore[misc, valid-type]  # PEFT has no types
        def _create_and_replace(self, config: Any, name: str, *args: Any, current_key: str, **more: Any) -> None:
            with _seeded(derive_seed(seed, "adapter", unsplit_name(current_key))):
                super()._create_and_replace(config, name, *args, current_key=current_key, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Seeded(part, config, adapter_name=ADAPTER)


def exported(name: str) -> str:
    """The name of an adapter's parameter in a file, as PEFT has it, by its name in the module."""
    if name.endswith(f".lora_magnitude_vector.{ADAPTER}.weight"):
        return name.removesuffix(f".{ADAPTER}.weight")
    return name.replace(f".{ADAPTER}.", ".").removesuffix(f".{ADAPTER}")


def check_injection(config: Config, family: Family) -> None:
    """Tries a run's adapters on the model's layers, without their weights.

    Raises:
        SettingError: A layer of the model does not suit them, such as one whose size a block size does not divide.
    """
    if method_of(config.lora).residual:
        _check_rank(config, family)
    adapted = make_config(config.lora, family, seed=config.seed)
    try:
        with torch.device("meta"):
            inject(empty_model(config_folder(config)), adapted, config.seed)
    except (ValueError, TypeError, AssertionError, ZeroDivisionError) as error:
        raise _refused(config.lora, error) from None
    except (NotImplementedError, RuntimeError):
        return  # it looks at the weights themselves; whether it can, shows when they are there


def _check_rank(config: Config, family: Family) -> None:
    """Makes sure that a factorisation of every weight has as many columns as the rank that is asked for.

    Raises:
        SettingError: One has fewer; PEFT would give that layer a smaller rank, and the parties would not fit.
    """
    rank = config.lora.top_rank
    plain = make_config(dataclasses.replace(config.lora, method="lora", options=""), family, seed=config.seed)
    with torch.device("meta"):
        inject(whole := empty_model(config_folder(config)), plain, config.seed)
    for name, module in whole.named_modules():
        if isinstance(module, LoraLayer) and (least := min(module.in_features, module.out_features)) < rank:
            words = f"1 to {least} with the method {config.lora.method}, which decomposes the weights of {name}"
            raise SettingError("lora.rank", rank, words)


def trained_names(part: Part) -> frozenset[str]:
    """The parameters of a part that adapters have just brought and that train, by their names in the part."""
    return frozenset(name for name, parameter in part.named_parameters() if parameter.requires_grad)
