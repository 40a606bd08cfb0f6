"""The model card of a run's adapter: README.md beside it, with the metadata that the Hugging Face Hub reads.

A card may be published with the adapter. So it names no client, and of local files and folders the last part of their
paths alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from fedsplit.corpora.tables import is_on_hub
from fedsplit.formatting import counted, perplexity, size
from fedsplit.model.sources import ON_HUB, hub_name
from fedsplit.settings.choices import PAIRS
from fedsplit.settings.config import DEFAULT_MODEL, Config
from fedsplit.settings.sections import WireSettings

CARD = "README.md"
"""Name of the card's file in an adapter's folder."""

TAGS = ("fedsplit", "federated-learning", "split-learning")


def model_card(config: Config, summary: Mapping[str, Any]) -> str:
    """Returns the model card of the adapter that a run leaves.

    Args:
        config: Settings of the run.
        summary: Content of summary.json.
    """
    base = _base_name(config.model)
    method = config.lora.method if config.prompt.kind == "off" else config.prompt.kind
    rounds = "1 round" if summary["last_round"] == 1 else f"{summary['last_round']} rounds"
    introduction = (
        f"An adapter ({method}) of {base}, trained by federated split learning: {summary['clients']} clients, "
        f"{rounds}, strategy {_code(_last(config.strategy))}. The clients held the first and the "
        f"last blocks of the model and all text; a server held the blocks {_code(config.cut)}. It is one ordinary PEFT "
        "adapter of the unsplit model."
    )
    parts = [
        f"---\n{_metadata(config, summary)}\n---",
        f"# {_title(config)}",
        introduction,
        "## Use",
        _use(config),
        "## Results",
        _table(("", "before", "after"), _results(config, summary)),
        _measured(config, summary),
        "## Data",
        _data(config),
        "## Training",
        _table(("setting", "value"), _settings(config)),
        _table(("", ""), _costs(summary)),
        "## Limits",
        _LIMITS,
        "## Versions",
        _table(("", ""), _versions(summary)),
    ]
    return "\n\n".join(parts) + "\n"


_LIMITS = (
    "The run was a simulation of a federation. Hidden states, their gradients and adapters crossed between clients and "
    "server without noise: the adapter comes with no guarantee of privacy for the training text."
)


def _title(config: Config) -> str:
    """Returns the name of the adapter: of its model, and its strategy."""
    return f"{_base_name(config.model)} tuned with {_last(config.strategy)}"


def _base_name(model: str) -> str:
    """Returns the name of a base model for readers: its id on the Hub, or the last part of its path."""
    return hub_name(model) or _last(model)


def _last(path: str) -> str:
    """Returns the last part of a path; a name is its own last part.

    Example:
        >>> _last("mine/strategies.py:Mine"), _last("fedavg")
        ('strategies.py:Mine', 'fedavg')
    """
    return os.path.basename(path.rstrip("/")) or path


def _metadata(config: Config, summary: Mapping[str, Any]) -> str:
    """Returns the metadata for the Hub, as YAML."""
    from huggingface_hub import EvalResult, ModelCardData

    is_classifier = config.data.format == "classification"
    task = "text-classification" if is_classifier else "text-generation"
    on_hub = is_on_hub(config.dataset)
    data = {"dataset_type": config.dataset if on_hub else "local", "dataset_name": _last(config.dataset)}
    results = [("loss", "held-out loss", summary["eval_loss"]["after"])]
    if is_classifier and "accuracy" in summary:
        results.append(("accuracy", "held-out accuracy", summary["accuracy"]["after"]))
    elif config.data.format != PAIRS:
        results.append(("perplexity", "held-out perplexity", perplexity(summary["eval_loss"]["after"])))
    evaluated = [
        EvalResult(task_type=task, metric_type=kind, metric_name=name, metric_value=_rounded(value), **data)
        for kind, name, value in results
    ]
    method = config.lora.method if config.prompt.kind == "off" else config.prompt.kind
    card = ModelCardData(
        # None for a model that is not on the Hub: a card names no local path.
        base_model=hub_name(config.model),
        library_name="peft",
        pipeline_tag=task,
        tags=[*TAGS, method],
        datasets=[config.dataset] if on_hub else None,
        metrics=[kind for kind, _, _ in results],
        model_name=_title(config),
        eval_results=evaluated,
    )
    return card.to_yaml().strip()


def _rounded(value: float) -> float:
    """Returns a number with six significant digits. Further ones differ between machines.

    Example:
        >>> _rounded(17.020280117655446)
        17.0203
    """
    return float(f"{value:.6g}")


def _use(config: Config) -> str:
    """Returns how to open the adapter."""
    kind = "SequenceClassification" if config.data.format == "classification" else "CausalLM"
    lines = [
        "```python",
        f"from peft import AutoPeftModelFor{kind}",
        "",
        f'model = AutoPeftModelFor{kind}.from_pretrained("path/to/this/folder", dtype="float32")',
        "```",
    ]
    code = "\n".join(lines)
    if hub_name(config.model) and config.model not in ON_HUB:
        return code
    where = "`base_model_name_or_path` in adapter_config.json names the folder of the base model"
    if config.model == DEFAULT_MODEL:
        return f"{code}\n\n{where}, which comes with the Python package fedsplit."
    return f"{code}\n\n{where} on the machine of the run; elsewhere, put the name of its folder there."


def _results(config: Config, summary: Mapping[str, Any]) -> list[Sequence[str]]:
    """Returns rows of what was measured before and after training."""
    before, after = summary["eval_loss"]["before"], summary["eval_loss"]["after"]
    rows: list[Sequence[str]] = [("held-out loss (nats)", f"{before:.4f}", f"{after:.4f}")]
    if "accuracy" in summary:
        rows.append(("accuracy", f"{summary['accuracy']['before']:.2%}", f"{summary['accuracy']['after']:.2%}"))
    elif config.data.format != PAIRS:
        rows.append(("perplexity", f"{perplexity(before):.2f}", f"{perplexity(after):.2f}"))
    for name, ends in summary.get("metrics", {}).items():
        cells = ["-" if ends[when] is None else f"{ends[when]:.4g}" for when in ("before", "after")]
        rows.append((name, *cells))
    return rows


def _measured(config: Config, summary: Mapping[str, Any]) -> str:
    """Returns sentences on what the results are measured on: a loss on few sequences says little."""
    clients = counted(summary["eval_clients"], "client", "clients")
    sequences = counted(config.eval.samples, "sequence", "sequences")
    return (
        f"Measured by {clients} on at most {sequences} each of the text that they held out (`eval.samples`), with the "
        "model split as in training."
    )


def _data(config: Config) -> str:
    """Returns a sentence on the data."""
    known = f"[{config.dataset}](https://huggingface.co/datasets/{config.dataset})"
    name = known if is_on_hub(config.dataset) else _code(_last(config.dataset))
    kind = "" if config.data.format == "auto" else f", of the format {_code(config.data.format)}"
    way = "owner where there are enough" if config.partition == "auto" else _code(config.partition)
    return f"{name}{kind}, divided among the clients by {way}."


def _settings(config: Config) -> list[Sequence[str]]:
    """Returns rows of the settings that decide the most."""
    train, lora = config.train, config.lora
    local = f"{train.epochs:g} epochs a round" if train.epochs else f"{train.steps} steps a round"
    rows = {
        "seed": config.seed,
        "clients that train in a round": config.sampled,
        "local training": f"{local}, batches of {train.batch_size} sequences of up to {train.max_length} tokens",
        "optimiser": f"{train.optimizer}, learning rate {train.lr:g} ({train.schedule})",
        "objective": _last(config.objective),
        "trunk": config.trunk.schedule,
        "codec": _codec(config.wire),
        "base weights": f"{config.dtype} {config.quantization}".strip(),
    }
    if config.prompt.kind == "off":
        ranks = ",".join(map(str, lora.rank))
        rows["adapter"] = f"{lora.method}, rank {ranks}, alpha {lora.alpha:g}, dropout {lora.dropout:g}"
    else:
        rows["adapter"] = f"{config.prompt.kind}, {config.prompt.tokens} tokens"
    return [(name, str(value)) for name, value in rows.items()]


def _codec(wire: WireSettings) -> str:
    """Returns the codec of all roles, or each role with its codec where the codecs differ."""
    if len({*wire.codecs.values()}) == 1:
        return next(iter(wire.codecs.values()))
    return "; ".join(f"{kind} {direction} {text}" for (kind, direction), text in wire.codecs.items())


def _costs(summary: Mapping[str, Any]) -> list[Sequence[str]]:
    """Returns rows of what the run cost."""
    crossed = {name: count for name, count in summary["bytes"].items() if not name.startswith("evaluation_")}
    return [
        ("tokens trained", f"{summary['tokens']:,}"),
        ("bytes of training", size(sum(crossed.values()))),
        ("time", f"{summary['wall_seconds']:,.0f} s on {summary['host']['cores']} cores"),
    ]


def _versions(summary: Mapping[str, Any]) -> list[Sequence[str]]:
    """Returns rows of date and versions."""
    return [("date", summary["date"]), *summary["versions"].items()]


def _code(value: str) -> str:
    """Returns a value as code, which Markdown shows as it is."""
    return "`" + value.replace("`", "'") + "`"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    # A bar would end the cell, and Markdown would take `<` for the beginning of HTML.
    cells = []
    for line in lines:
        cells.append([cell.replace("|", "\\|").replace("<", "&lt;") for cell in line])
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
