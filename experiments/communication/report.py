"""The tables of the experiment, and its claims beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.speed.report import conditions, table

GPT2 = "GPT-2 small"
Records = Mapping[tuple[Any, ...], Mapping[str, Any]]


def text(result: Mapping[str, Any]) -> str:
    """All tables."""
    records = {}
    for one in result["records"]:
        records[one["model"], one["training"], one.get("rank"), one.get("where"), one["party"]] = one
    models = list(dict.fromkeys(one["model"] for one in result["records"]))
    pieces = [conditions(result["machine"])]
    for model in models:
        pieces += [f"### {model}", _parties(model, records), _crossing(model, records)]
    if GPT2 in models:
        pieces += ["### Claims beside measurements", _claims(records)]
    return "\n\n".join(pieces)


def _trainings(model: str, records: Records) -> list[tuple[Any, ...]]:
    """Keys of what is trained, in the order of the records."""
    return list(dict.fromkeys(key[1:4] for key in records if key[0] == model))


def _named(training: Sequence[Any]) -> str:
    """What is trained, in words."""
    kind, rank, where = training
    if kind == "full":
        return "all weights"
    return f"LoRA r={rank}, {'attention' if where == 'attention' else 'with MLP'}"


def _megabytes(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.1f}"


def _parties(model: str, records: Records) -> str:
    """What each party trains and holds."""
    rows = []
    for training in _trainings(model, records):
        for party, words in (("whole", "no cut"), ("client", "client"), ("trunk", "trunk")):
            one = records.get((model, *training, party))
            if one is None:  # not measured yet
                continue
            share = one["trainable"] / one["parameters"]
            numbers = [_megabytes(one[key]) for key in ("file", "gradients", "moments", "peak")]
            rows.append([_named(training), words, f"{one['trainable']:,}", f"{share:.2%}", *numbers])
    head = ["trained", "party", "trained parameters", "of its own", "file", "gradients", "moments", "peak"]
    return "\n".join(table(head, rows))


def _crossing(model: str, records: Records) -> str:
    """What crosses at a step and in a round, for one client, in both directions."""
    rows = []
    for training in _trainings(model, records):
        whole = records.get((model, *training, "whole"))
        client = records.get((model, *training, "client"))
        if whole is None or client is None:
            continue
        rows.append([_named(training), "no cut", "0", "0", _megabytes(2 * whole["message"])])
        run = records.get((model, *training, "run"))
        if run is None:  # hidden states have the same size whatever is trained
            run = next(one for key, one in records.items() if key[0] == model and key[4] == "run")
            adapters = 2 * client["message"]
        else:
            adapters = 2 * run["bytes"]["adapter_up"] / run["steps"]
        crossed = run["bytes"]
        per_step = [
            (crossed[f"{kind}_up"] + crossed[f"{kind}_down"]) / run["steps"] for kind in ("activation", "gradient")
        ]
        rows.append([_named(training), "split", *map(_megabytes, per_step), _megabytes(adapters)])
    head = ["trained", "federation", "activations a step", "gradients a step", "trained tensors a round"]
    return "\n".join(table(head, rows))


def _claims(records: Records) -> str:
    """Each claim, what was measured, and why they differ."""

    def one(training: str, rank: int | None, where: str | None, party: str) -> Mapping[str, Any]:
        return records[GPT2, training, rank, where, party]

    small = one("lora", 8, "attention", "whole")
    large = one("lora", 16, "everything", "whole")
    eight = one("lora", 8, "everything", "whole")
    full = one("full", None, None, "whole")
    step = one("lora", 8, "attention", "run")
    crossed = sum(step["bytes"][f"{kind}_{way}"] for kind in ("activation", "gradient") for way in ("up", "down"))
    state = {name: found["gradients"] + found["moments"] for name, found in (("small", small), ("full", full))}
    weights = 4 * full["parameters"]
    lines = [
        (
            "294,912 trainable parameters at r=8 on attention, 0.24 %",
            f"{small['trainable']:,}, {small['trainable'] / small['parameters']:.2%}",
            "Equal. Attention is c_attn alone; the output projection of attention has no adapter.",
        ),
        (
            "an adapter of 1.2 MB at r=8, attention only",
            f"{small['file'] / 1e6:.2f} MB",
            "Equal: four bytes for each parameter, and a header.",
        ),
        (
            "an adapter of 4.8 MB at r=16 with MLP",
            f"{large['file'] / 1e6:.2f} MB",
            f"The claim is half of it, and what r=8 with MLP has: {eight['file'] / 1e6:.2f} MB. Adapters are float32.",
        ),
        (
            "0.39 % of a 4096 x 4096 layer",
            f"{2 * 4096 * 8 / 4096**2:.2%} at r=8, by arithmetic",
            "Equal, and true of square layers alone: the share is r (I + O) / (I O).",
        ),
        (
            "12 MB against 1.2 GB a step",
            f"{crossed / step['steps'] / 1e6:.1f} MB a step, whatever is trained",
            "Neither crosses a cut. Hidden states and gradients cross at a step: four times 4 x 128 x 768 values. "
            f"Without a cut nothing crosses at a step; in a round {2 * full['message'] / 1e9:.2f} GB against "
            f"{2 * small['message'] / 1e6:.1f} MB cross, up and down together.",
        ),
        (
            "48 MB against 4.8 GB of training state",
            f"{state['small'] / 1e6:.1f} MB against {state['full'] / 1e9:.2f} GB of gradients and moments",
            "The claimed figures are of a larger model. The ratio is that of the trained parameters, here "
            f"{full['trainable'] / small['trainable']:.0f}, not 100. The frozen weights, {weights / 1e6:.0f} MB, stay.",
        ),
    ]
    return "\n".join(table(["claimed", "measured", "difference"], [list(line) for line in lines]))
