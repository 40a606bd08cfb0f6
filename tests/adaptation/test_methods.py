"""Which kinds of adapter there are, and what is refused before a library is loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from fedsplit.adaptation.methods import ADAPTER_METHODS, REFUSED, check_method, draws_fresh, fields_of, method_of
from fedsplit.errors import SettingError
from fedsplit.settings.choices import PROMPTED
from fedsplit.settings.documents import as_document, build, from_document
from fedsplit.settings.sections import LoraSettings


def test_every_kind_that_peft_has_is_offered_or_refused_with_a_reason() -> None:
    known = {kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    offered = {method.kind.lower() for method in ADAPTER_METHODS.values()}
    assert offered <= known
    assert known == (offered | REFUSED.keys()) & known
    assert not offered & REFUSED.keys() and not ADAPTER_METHODS.keys() & REFUSED.keys()


def test_the_registry_names_fields_that_peft_has() -> None:
    for name, method in ADAPTER_METHODS.items():
        cls = next(cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items() if kind.value == method.kind)
        named = {method.rank, method.alpha, method.dropout, method.seed, *method.preset} - {None}
        assert named <= {*cls.__dataclass_fields__}, name


def test_settings_become_fields_by_their_meaning() -> None:
    settings = LoraSettings(rank=(4,), alpha=6.0, dropout=0.2, rslora=True)
    assert fields_of(settings, 7) == {"r": 4, "lora_alpha": 6.0, "lora_dropout": 0.2, "use_rslora": True}
    assert fields_of(LoraSettings(method="rslora"), 7)["use_rslora"] is True
    vera = fields_of(LoraSettings(method="vera", options='{"d_initial": 0.2}'), 7)
    assert vera == {"r": 8, "vera_dropout": 0.1, "projection_prng_key": 7, "save_projection": False, "d_initial": 0.2}
    assert fields_of(LoraSettings(method="ia3"), 7) == {}
    assert draws_fresh(LoraSettings(method="dora")) and not draws_fresh(LoraSettings(method="pissa"))
    assert not draws_fresh(LoraSettings(options='{"init_lora_weights": "gaussian"}'))


@pytest.mark.parametrize(
    ("values", "transposed", "message"),
    [
        ({"lora.method": "lorra"}, False, "^lora.method: lorra is not possible; allowed: lora | rslora"),
        ({"lora.method": "vblora"}, False, "^lora.method: vblora .all layers share one bank of vectors, which layers"),
        ({"lora.method": "adalora", "lora.rank": 4}, False, "^lora.rank: 4 is not possible; allowed: the default with"),
        ({"lora.method": "adalora", "lora.options": '{"total_step": 9}'}, False, "^lora.options: total_step .*follows"),
        ({"lora.method": "lorra"}, True, r" \| beft \| ln_tuning \| prompt \| ptuning \| prefix$"),
        ({"lora.method": "prefix_tuning"}, False, "^lora.method: prefix_tuning .it is called prefix here"),
        ({"lora.method": "cpt"}, False, "^lora.method: cpt .changes what the model reads"),
        ({"lora.method": "loha"}, True, "^lora.method: loha is not possible; allowed: lora .* store .in, out."),
        ({"lora.method": "ia3", "lora.rank": 4}, False, "^lora.rank: 4 is not possible; allowed: the default with"),
        ({"lora.method": "hra", "lora.alpha": 4}, False, "^lora.alpha: 4.0 is not possible; .* no such setting"),
        ({"lora.method": "oft", "lora.dropout": 0.2}, False, "^lora.dropout: 0.2 is not possible"),
        ({"lora.method": "loha", "lora.rslora": True}, False, "^lora.rslora: True is not possible"),
        ({"lora.method": "dora", "lora.rank": "2,4"}, False, "^lora.rank: 2,4 .* one rank with the method dora; lora"),
        ({"lora.method": "pissa", "lora.rank": "2,4"}, False, "^lora.rank: 2,4 is not possible"),
        ({"lora.method": "pissa", "dtype": "bf16"}, False, "^dtype: bf16 is not possible; allowed: fp32 with the"),
        (
            {"lora.options": '{"r": 4}'},
            False,
            "^lora.options: r is not possible; allowed: other fields; this one is the setting lora.rank",
        ),
        ({"lora.options": '{"use_dora": true}'}, False, "^lora.options: use_dora is not possible; .* .another method"),
        (
            {"lora.options": '{"modules_to_save": ["lm_head"]}'},
            False,
            "^lora.options: modules_to_save is not .* .only adapters",
        ),
        ({"lora.options": '{"init_lora_weights": "eva"}'}, False, "^lora.options: init_lora_weights eva .* gaussian"),
        (
            {"lora.method": "bone", "lora.options": '{"init_weights": 1}'},
            False,
            "init_weights is not possible; .* the method bone stands for",
        ),
    ],
)
def test_what_cannot_be_is_said_in_one_line(values: dict[str, object], transposed: bool, message: str) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        check_method(build(values), transposed)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", PROMPTED)
def test_a_kind_of_prompt_is_none_in_the_layers(kind: str) -> None:
    """Whoever reads settings from flags or a file never gets here; one made by hand is told where it belongs."""
    with pytest.raises(SettingError, match=f"^lora.method: {kind} .it is not in the layers: prompt.kind says so"):
        method_of(LoraSettings(method=kind))


@pytest.mark.parametrize("method", ADAPTER_METHODS)
def test_defaults_suit_every_kind(method: str) -> None:
    """And no dropout, which is what those do that know none."""
    config = build({"lora.method": method})
    check_method(config, ADAPTER_METHODS[method].transposed)
    check_method(build({"lora.method": method, "lora.dropout": 0}), ADAPTER_METHODS[method].transposed)
    assert from_document(as_document(config)) == config
    assert method_of(config.lora) is ADAPTER_METHODS[method]


def test_nothing_is_imported_to_refuse() -> None:
    code = (
        "import sys\nfrom fedsplit.settings.documents import build\n"
        "from fedsplit.adaptation.methods import check_method\n"
        "check_method(build({}), True)\n"
        "assert not {'torch', 'peft', 'transformers'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
