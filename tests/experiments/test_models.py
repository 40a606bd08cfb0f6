"""Types of models: thirty of different build are proved in every run of the tests; the page has the results."""

from __future__ import annotations

import json

import pytest

from experiments.models.table import PAGE, RESULTS, page, result_of

TYPES = (
    *("afmoe", "apertus", "aria_text", "bamba", "bloom", "codegen", "cohere", "cohere2", "deepseek_v3", "falcon"),
    *("gemma", "gemma3", "gemma4_text", "glm4", "gpt_bigcode", "gpt_neo", "gpt_oss", "gptj", "granite", "granitemoe"),
    *("internlm3", "llama4_text", "mamba", "mpt", "nemotron", "olmo2", "phi", "qwen2_moe", "qwen3_next", "smollm3"),
)
"""Scaled embeddings, logits and residuals; parallel blocks; ALiBi and other positions; norms after the projections;
sliding, chunked and linear attention; state-space and hybrid blocks; shared experts and routers of several kinds."""


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
def test_a_type_is_still_proved(model_type: str) -> None:
    expected = json.loads(RESULTS.read_text())["types"][model_type]
    found = result_of(model_type)
    assert found["result"] == expected["result"] != "refused", found
    assert found.get("classifier") == expected.get("classifier"), found


def test_at_least_130_types_are_proved_and_the_others_have_a_reason() -> None:
    results = json.loads(RESULTS.read_text())
    rows = results["types"].values()
    assert len(rows) == 189
    assert sum(row["result"] != "refused" for row in rows) >= 130
    assert sum(row.get("classifier") == "proved" for row in rows) >= 59
    assert all(row["reason"] for row in rows if row["result"] == "refused")
    assert PAGE.read_text() == page(results)
