"""The unsplit model after a run: opens the base model, attaches or merges an adapter, and measures the result."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from fedsplit.adaptation import lora
from fedsplit.corpora.sequences import Sequences
from fedsplit.demands import MASK, REFERENCE
from fedsplit.errors import InputError, SettingError
from fedsplit.metrics.metric import Metric, asked_by, measure
from fedsplit.metrics.preference import pair_score
from fedsplit.model.checkpoint_reader import CheckpointReader, check_checkpoint
from fedsplit.model.devices import CPU, TYPES, device_of
from fedsplit.model.facts import read_facts, read_pad
from fedsplit.model.head import HEAD, HEAD_WEIGHT
from fedsplit.model.kernels import IGNORED
from fedsplit.model.parts import SCORE
from fedsplit.model.quantization import check_quantization
from fedsplit.model.stored_bits import bits_in, quantization_of
from fedsplit.model.unsplit import empty_model, load_unsplit, quantize_unsplit, unsplit_with
from fedsplit.objectives.objective import Objective, demands_of
from fedsplit.results.finished import Adapter
from fedsplit.results.fitting import classes_in, read_fitting, reason_of
from fedsplit.scores import Score
from fedsplit.settings.config import Config
from fedsplit.updates import Adapters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def open_base(
    model_path: Path,
    dtype: str,
    device: torch.device = CPU,
    classes: int = 0,
    seed: int = 0,
    dense: bool = False,
) -> PreTrainedModel:
    """Opens the base model in the type of a run.

    Args:
        model_path: Folder of the model.
        dtype: Type of the weights, a name in `fedsplit.settings.choices.DTYPES`.
        device: Device of the model.
        classes: Number of classes, for a classifier of sequences with the run's initial head; 0 for a causal LM.
        seed: Seed of the run, for the initial head.
        dense: True to decode weights that the checkpoint keeps in 4 or 8 bits.

    Raises:
        SettingError: The folder holds no model, or a broken model.

    Example:
        >>> from fedsplit.settings.config import BUNDLED_MODEL
        >>> open_base(BUNDLED_MODEL, "fp32").config.model_type
        'gpt2'
    """
    pad = read_pad(model_path, read_facts(model_path).end)
    check_checkpoint(model_path, dtype, classes)
    if dense and bits_in(quantization_of(model_path)):
        weights = _decoded_weights(model_path, TYPES[dtype], classes)
        base = unsplit_with(weights, model_path, TYPES[dtype], classes, pad).eval()
    else:
        base = load_unsplit(model_path, TYPES[dtype], classes, pad).eval()
    if classes:
        restore_head(base, seed)
    return base.to(device)


def _decoded_weights(model_path: Path, dtype: torch.dtype, classes: int) -> dict[str, Tensor]:
    """Reads all weights of a checkpoint, and decodes the quantised ones. For the arguments see `open_base`."""
    model = empty_model(model_path, classes)
    checkpoint = CheckpointReader(model_path, model, dtype)
    names = [name for name in model.state_dict() if name.partition(".")[0] != SCORE]
    return {name: checkpoint.parameter(name) for name in names}


def restore_head(base: PreTrainedModel, seed: int) -> None:
    """Replaces a classifier's head by the initial head of a run with the given seed."""
    head = base.get_submodule(SCORE)
    initial = lora.fresh_score(head.weight.shape, lora.spread_of(base.config), seed)
    head.weight = torch.nn.Parameter(initial)


def check_same_head(adapters: Mapping[Path, Adapters]) -> int:
    """Checks that one base model with one head suits several adapters.

    Args:
        adapters: Tensors of each adapter, by folder.

    Returns:
        The number of classes; 0 if the adapters predict tokens.

    Raises:
        InputError: The adapters have different numbers of classes.

    Example:
        >>> check_same_head({Path("a"): Adapters({"score.weight": torch.zeros(3, 8)}, {})})
        3
    """
    by_folder = {folder: classes_in(tensors) for folder, tensors in adapters.items()}
    (first, classes), *others = by_folder.items()
    for folder, other_classes in others:
        if other_classes != classes:
            both = f"{first} {_task(classes)}, {folder} {_task(other_classes)}"
            raise InputError(f"the adapters belong on models with different heads: {both}")
    return classes


def _task(classes: int) -> str:
    return f"tells {classes} classes" if classes else "predicts tokens"


def open_held(
    adapter: Adapter,
    device: torch.device = CPU,
    dense: bool = False,
    classes: int = 0,
    seed: int = 0,
) -> PreTrainedModel:
    """Opens the base model of an adapter's run. The same parts are quantised as in the run.

    Args:
        adapter: The adapter.
        device: Device of the model.
        dense: True to decode quantised weights to the run's type, so that an adapter can be added to the weights.
        classes: As in `open_base`.
        seed: As in `open_base`.

    Raises:
        SettingError: As in `open_base`; or the model has fewer blocks than the run's cut, or cannot be quantised here.
    """
    run = Config(
        cut=adapter.cut,
        quantization=adapter.quantization,
        dtype=adapter.dtype,
        device=str(device),
    )
    if not run.bits:
        return open_base(adapter.model_path, adapter.dtype, device, classes, seed)
    if bits_in(quantization_of(adapter.model_path)):  # quantised before the run, as a whole
        check_quantization(run)
        return open_base(adapter.model_path, adapter.dtype, device, classes, seed, dense)

    _, high = run.bounds
    if high > read_facts(adapter.model_path).blocks:
        needed = f"a model that can be cut as that of {adapter.folder} was, {adapter.cut}"
        raise SettingError("model", adapter.model, needed)
    check_quantization(run)
    base = open_base(adapter.model_path, adapter.dtype, device, classes, seed)
    return quantize_unsplit(base, run.bounds, run.bits, device, dense)


def attach(base: PreTrainedModel, adapter: Adapter) -> PeftModel:
    """Attaches an adapter to a base model by PEFT, and returns the PEFT model.

    Raises:
        InputError: The adapter does not fit the model.
    """
    read_fitting(adapter)
    with warnings.catch_warnings():
        # PEFT warns of missing tensors, but `read_fitting` has checked: only tensors drawn from a seed may be missing.
        warnings.simplefilter("ignore")
        try:
            return PeftModel.from_pretrained(base, str(adapter.folder)).eval()
        except (RuntimeError, ValueError, TypeError, NotImplementedError, LookupError) as error:
            raise InputError(f"the adapter in {adapter.folder} does not fit the model ({reason_of(error)})") from None


def merged(base: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """Merges an adapter of any kind into a base model's weights by PEFT, and returns the model. The base is changed.

    PEFT does not refuse every adapter that cannot be merged. So the merged model is compared with the attached adapter
    on a few tokens.

    Raises:
        InputError: The adapter does not fit the model, or cannot be merged.
    """
    base_names = {name for name, _ in base.named_parameters()}
    model = attach(base, adapter)
    expected = _probe(model)
    begin = f"the adapter in {adapter.folder} cannot be merged"

    was_tied = _untie(model.get_base_model())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of weights that are no longer tied
            result = model.merge_and_unload(safe_merge=True)  # safe: values that are not finite are refused
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        raise InputError(f"{begin} ({' '.join(str(error).split())})") from None
    # After LN tuning, PEFT leaves its wrappers in the model.
    for name, module in list(result.named_modules()):
        for trained in getattr(module, "modules_to_save", {}).values():
            result.set_submodule(name, trained)
    if was_tied:
        _tie_if_equal(result)

    names = {name for name, _ in result.named_parameters()}
    # A head that shared the embedding's weight had no name of its own before.
    extra = sorted(names - base_names - {HEAD_WEIGHT})
    if extra:
        raise InputError(f"{begin}: PEFT leaves {extra[0]}, which is no weight of the model")
    if not _agree(_probe(result), expected):
        raise InputError(f"{begin}: the model merged by PEFT does not compute the same as with the adapter attached")
    return result


@torch.no_grad()
def _probe(model: PreTrainedModel | PeftModel) -> Tensor:
    """Returns a model's logits for the first and last few tokens of the vocabulary."""
    size = model.get_input_embeddings().weight.shape[0]
    first = torch.arange(min(8, size))
    last = torch.arange(max(0, size - 8), size)
    ids = torch.cat([first, last])[None]
    logits: Tensor = model(input_ids=ids.to(device_of(model))).logits
    return logits.float()


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Returns True if two results differ by rounding alone."""
    largest = max(1.0, float(expected.abs().max()))
    tolerance = 1e-3 * largest  # relative to the largest logit: small logits are differences of large numbers
    if found.shape != expected.shape:
        return False
    return torch.allclose(found, expected, rtol=0.0, atol=tolerance)


def _unwrapped(module: nn.Module) -> Any:
    """Returns the base model's module inside PEFT's wrappers."""
    for name in ("base_layer", "original_module"):
        if hasattr(module, name):
            return _unwrapped(module.get_submodule(name))
    return module


def _untie(base: PreTrainedModel) -> bool:
    """Gives a tied head a copy of the embedding's weight, so that PEFT merges both separately.

    Returns:
        True if head and embedding shared a weight.
    """
    if base.get_output_embeddings() is None:
        return False
    embedding = _unwrapped(base.get_input_embeddings())
    head = _unwrapped(base.get_output_embeddings())
    if head.weight is not embedding.weight:
        return False
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    return True


def _tie_if_equal(model: PreTrainedModel) -> None:
    """Ties the head to the embedding again if both are still equal, and records the tie in the configuration."""
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    is_equal = torch.equal(embedding.weight, head.weight)
    model.config.tie_word_embeddings = is_equal
    if is_equal:
        head.weight = embedding.weight


def detach(model: PeftModel) -> PreTrainedModel:
    """Takes the adapter off a result of `attach`, and returns the base model.

    See `fedsplit.results.fitting.leaves_base` for adapters that change the base model for good.
    """
    base = model.get_base_model()
    if model.active_peft_config.is_prompt_learning:
        return base

    # PEFT's `unload` leaves a trained head, or the wrapper of the head, in the model: put the original heads back.
    original_heads = {}
    for name in (HEAD, SCORE):
        if hasattr(base, name):
            head = getattr(base, name)
            original_heads[name] = getattr(head, "original_module", head)
    base = model.unload()
    for name, head in original_heads.items():
        if not hasattr(head, "base_layer"):
            setattr(base, name, head)
    return base


@torch.no_grad()
def score(
    model: PreTrainedModel | PeftModel,
    batches: Iterable[Sequences],
    metrics: Mapping[str, Metric] | None = None,
    objective: Objective | None = None,
) -> Score:
    """Measures a causal LM, or a classifier of sequences, on text.

    Args:
        model: A model of transformers, with or without an adapter, computing in the type of its weights. A classifier's
            `pad_token_id` must be the token that pads the sequences.
        batches: Batches of sequences. Every predicted token has equal weight.
        metrics: Metrics by name; None for no metrics.
        objective: Objective over pairs, for batches of pairs: the score then counts pairs. None for cross-entropy.
    """
    metrics = metrics or {}
    asked = asked_by(*metrics.values()) | demands_of(objective).further
    device = device_of(model)
    total = Score()
    for batch in batches:
        rows = batch.to(device)
        logits = aligned_logits(model, rows)
        labels = rows.labels if rows.labels.ndim == 1 else rows.labels[:, 1:]
        further = {}
        if MASK in asked:
            if rows.mask is None:
                further[MASK] = torch.ones_like(labels, dtype=torch.bool)
            else:
                further[MASK] = rows.mask[:, 1:]
        if REFERENCE in asked:
            further[REFERENCE] = reference_logits(model, rows, logits).float()
        if objective is None:
            total += _score_of(logits, labels, metrics, further)
        else:
            total += pair_score(objective, metrics, logits.float(), labels, further)
    return total


def aligned_logits(model: PreTrainedModel | PeftModel, rows: Sequences) -> Tensor:
    """Returns the logits of a model for some sequences, aligned with the labels: (B, T - 1, V), or (B, C)."""
    dtype = next(model.parameters()).dtype
    mask = {} if rows.mask is None else {"attention_mask": rows.mask}
    # Adapters are in float32 whatever the base weights are in.
    with torch.autocast(rows.ids.device.type, dtype, enabled=dtype != torch.float32):
        logits: Tensor = model(input_ids=rows.ids, **mask).logits
    if rows.labels.ndim == 1:
        return logits
    # Each token predicts the next token. The logits of virtual tokens before the text are cut off.
    return logits[:, -rows.labels.shape[1] : -1]


def reference_logits(model: PreTrainedModel | PeftModel, rows: Sequences, logits: Tensor) -> Tensor:
    """Returns the logits of the model without its adapter.

    Args:
        model: The model.
        rows: The sequences.
        logits: The model's logits for the sequences. A model without an adapter is the base model itself.
    """
    if not isinstance(model, PeftModel):
        return logits
    with model.disable_adapter():
        return aligned_logits(model, rows)


def _score_of(
    logits: Tensor,
    labels: Tensor,
    metrics: Mapping[str, Metric],
    further: Mapping[str, Tensor],
) -> Score:
    """Returns the score of a batch.

    Args:
        logits: (B, T, V), aligned with the labels; (B, C) for a classifier.
        labels: Tokens (B, T), `IGNORED` for positions without a prediction; classes (B,) for a classifier.
        metrics: Metrics by name.
        further: Further arguments of the metrics.
    """
    sums = measure(metrics, logits.float(), labels, further) if metrics else {}
    logits = logits.flatten(0, -2)
    labels = labels.flatten()
    is_predicted = labels != IGNORED
    if not bool(is_predicted.all()):  # the copy of the logits is as large as the logits
        logits = logits[is_predicted]
        labels = labels[is_predicted]

    # Summed in float64: a float32 sum over many tokens would lose digits.
    losses = nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    nats = float(losses.double().sum())
    right = int((logits.argmax(-1) == labels).sum())
    return Score(nats, labels.numel(), right, sums)
