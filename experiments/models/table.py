"""Which types of causal language models of transformers can be cut exactly.

    python -m experiments.models.table                       # writes types.json and docs/types.md, in half an hour
    python -m experiments.models.table granite cohere        # proves these types anew, and keeps the others

Every type is proved with its default switches (`fedsplit.proving.proof`). Some of the library's classes have no default
of some value: `USUAL` has values of published models.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils.logging import disable_progress_bar

from fedsplit.errors import SettingError, one_line
from fedsplit.proving.proof import Proof, prove

HERE = Path(__file__).parent
RESULTS = HERE / "types.json"
PAGE = HERE.parents[1] / "docs" / "types.md"

USUAL: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 6, "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy"},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "nemotron": {"num_key_value_heads": 8, "head_dim": 128},
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "jamba": {"num_hidden_layers": 8},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        }
    },
    "gemma4": {"text_config": {"hidden_size_per_layer_input": 0}},
    "gemma4_text": {"hidden_size_per_layer_input": 0},
}
"""Values of published models for classes that have no default of them."""

SOME = "proved at some cuts"

HEAD = """# Types of models

What `fedsplit prove` finds out about every type of causal language model that transformers has
([how it is proved](models.md#types)).

- **proved**: logits without padding, with padding on the left and on the right, loss, the gradient of every adapter,
  and generation with caches are equal to the bit. The exported adapter, which PEFT loads into the uncut model, gives
  equal logits up to 1e-5, and the default kernels (`--kernels fused`) give equal loss and gradients up to rounding.
- **proved, no cache**: as above, but text is generated without caches: every new token computes the whole text.
- **proved at some cuts**: as above, but only with all blocks in the trunk (`--cut 0:N`), since states pass from block
  to block beside the hidden states. A run with another cut ends before it begins, and names the cut that works.
- **refused**: a run on such a model ends before it begins, with the reason.
- **classifier**: the same for the type's sequence classifier (`--data.format classification`), if transformers has one.

A type with other switches than the library's defaults is proved anew when it is first used. Gemma 4 is proved without
embeddings by block (`hidden_size_per_layer_input` 0), as its larger models are. Of a model in which blocks share keys
and values (`num_kv_shared_layers`), every cut is proved that does not part these blocks.

The table is written by `python -m experiments.models.table`"""


def config_of(model_type: str) -> Any:
    """Returns the configuration of a type's text decoder, with default switches."""
    config = CONFIG_MAPPING[model_type](**USUAL.get(model_type, {}))
    return config.get_text_config(decoder=True)


def result_of(model_type: str) -> dict[str, Any]:
    """Proves a type; returns its row."""
    try:
        proof = prove(config_of(model_type))
    except SettingError as error:
        return {"result": "refused", "reason": _reason(str(error))}
    except Exception as error:  # noqa: BLE001  # the library's classes raise many kinds
        return {"result": "refused", "reason": f"the library's own defaults fail: {one_line(error)}"}
    row: dict[str, Any] = {"seconds": round(proof.seconds, 1), "equal": dict(proof.equal)}
    if model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES and proof.trains:
        row["classifier"] = _classifier_of(model_type)
    verdict = verdict_of(proof)
    if verdict == SOME:
        return {"result": SOME, "reason": f"all blocks in the trunk; elsewhere {proof.inner}", **row}
    return {"result": verdict, **row} if proof.trains else {"result": "refused", "reason": verdict, **row}


def verdict_of(proof: Proof) -> str:
    """Returns the result of a proof in words; of a refused model the reason."""
    if not proof.trains:
        return ": ".join(proof.first_fault)
    if proof.inner:
        return SOME
    return "proved" if proof.generates or proof.classifies else "proved, no cache"


def _classifier_of(model_type: str) -> str:
    """Proves the sequence classifier of a type; returns "proved", or the reason why not."""
    try:
        return verdict_of(prove(config_of(model_type), classifies=True))
    except SettingError as error:
        return _reason(str(error))


def _reason(message: str) -> str:
    """Returns the reason in an error of a setting, without the name of the type and without advice."""
    words = message.removeprefix("model: ").partition(" is not possible; allowed:")[0]
    inner = words.partition("(")[2].rpartition(")")[0]
    return inner or words.partition(", ")[2]


def page(results: dict[str, Any]) -> str:
    """Returns docs/types.md."""
    types = results["types"]
    counts = Counter(row["result"] for row in types.values())
    classifiers = sum(row.get("classifier") == "proved" for row in types.values())
    lines = [
        f"{HEAD} with transformers {results['transformers']}: {len(types)} types, "
        f"{counts['proved']} proved, {counts['proved, no cache']} proved without caches, {counts[SOME]} proved at some "
        f"cuts; {classifiers} classifiers proved.",
        "",
        "| type | result | reason | classifier |",
        "|---|---|---|---|",
    ]
    for name, row in sorted(types.items()):
        reason = row.get("reason", "").replace("|", "\\|")
        lines.append(f"| {name} | {row['result']} | {reason} | {row.get('classifier', '')} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Proves types, and writes the results after each."""
    parser = argparse.ArgumentParser(description="proves types of models")
    parser.add_argument("types", nargs="*", metavar="TYPE", help="types to prove anew (default: all)")
    asked = parser.parse_args().types
    disable_progress_bar()
    known = json.loads(RESULTS.read_text())["types"] if RESULTS.is_file() else {}
    for model_type in asked or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        known[model_type] = result_of(model_type)
        print(model_type, known[model_type]["result"], known[model_type].get("reason", ""), sep=" | ", flush=True)
        results = {name: version(name) for name in ("transformers", "torch", "peft")} | {"types": known}
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
