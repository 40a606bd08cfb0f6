"""Proofs that are kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from fedsplit.proving import kept
from fedsplit.proving.kept import proof_of
from fedsplit.proving.proof import CHECKS, Proof

NOTHING_COMPARED = '{"model_type": "llama", "cuts": [], "equal": {}, "faults": {}, "seconds": 1}'
_NO_MEMORY = Proof("llama", ((0, 1),), dict.fromkeys(CHECKS, 1), {"loss": "no memory"}, 0.5)
REFUSED = json.dumps(dataclasses.asdict(_NO_MEMORY))


@pytest.fixture
def proved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An empty cache; the types that are proved anew."""
    types: list[str] = []

    def prove(config: object, classifies: bool = False) -> Proof:
        types.append(config.model_type)  # type: ignore[attr-defined]
        return Proof(types[-1], ((0, 1),), dict.fromkeys(CHECKS, 1), {}, 0.5, classifies=classifies)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kept, "prove", prove)
    return types


def changed(model: Path, folder: Path, **says: object) -> Path:
    folder.mkdir()
    document = json.loads((model / "config.json").read_text()) | says
    (folder / "config.json").write_text(json.dumps(document))
    return folder


def test_a_type_is_proved_once(proved: list[str], tiny_models: dict[str, Path], tmp_path: Path) -> None:
    lines: list[str] = []
    first = proof_of(tiny_models["llama"], lines.append)
    assert proof_of(tiny_models["llama"], lines.append) == first
    assert lines == ["llama: cut proved at 2 places (0.5 s)"]
    assert proof_of(changed(tiny_models["llama"], tmp_path / "wide", intermediate_size=128)) == first
    assert proved == ["llama"]


def test_other_switches_are_proved_anew(proved: list[str], tiny_models: dict[str, Path], tmp_path: Path) -> None:
    proof_of(tiny_models["llama"])
    proof_of(changed(tiny_models["llama"], tmp_path / "biased", attention_bias=True))
    proof_of(tiny_models["qwen2"])
    assert proved == ["llama", "llama", "qwen2"]


def test_other_libraries_and_other_code_prove_anew(
    proved: list[str], tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    proof_of(tiny_models["llama"])
    with monkeypatch.context() as patch:
        patch.setattr(kept, "version", lambda name: "0")
        proof_of(tiny_models["llama"])
    monkeypatch.setattr(kept, "_digest_of_code", lambda: "0")
    proof_of(tiny_models["llama"])
    assert proved == ["llama"] * 3


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"model_type": "llama", "cuts": 3}', NOTHING_COMPARED, REFUSED])
def test_a_damaged_file_counts_as_none(
    proved: list[str], tiny_models: dict[str, Path], tmp_path: Path, content: str
) -> None:
    first = proof_of(tiny_models["llama"])
    (file,) = (tmp_path / "cache" / "fedsplit" / "proofs").iterdir()
    file.write_text(content)
    assert proof_of(tiny_models["llama"]) == first
    assert proved == ["llama"] * 2


def test_a_refusal_is_not_kept(
    proved: list[str], tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason may have been a full disk."""
    with monkeypatch.context() as patch:
        refused = Proof("llama", ((0, 1),), {}, {"logits": "no space left"}, 0.5)
        patch.setattr(kept, "prove", lambda config, classifies: refused)
        assert not proof_of(tiny_models["llama"]).trains
    assert proof_of(tiny_models["llama"]).trains


def test_a_proof_of_one_cut_alone_is_not_kept(
    proved: list[str], tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        alone = Proof("llama", ((0, 4),), dict.fromkeys(CHECKS, 1), {}, 0.5, inner="logits: no space left")
        patch.setattr(kept, "prove", lambda config, classifies: alone)
        assert proof_of(tiny_models["llama"]).inner
    assert not proof_of(tiny_models["llama"]).inner


def test_a_classifier_is_proved_by_itself(proved: list[str], tiny_models: dict[str, Path]) -> None:
    for _ in range(2):
        assert not proof_of(tiny_models["llama"]).classifies
        assert proof_of(tiny_models["llama"], classifies=True).classifies
    assert proved == ["llama"] * 2


def test_a_cache_folder_that_cannot_be_written_does_not_end_a_run(
    proved: list[str], tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    lines: list[str] = []
    assert proof_of(tiny_models["llama"], lines.append).trains
    assert lines[-1].startswith("the proof is not kept, and is repeated at the next run: ")


def test_a_user_without_a_home_can_run(
    proved: list[str], tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    lines: list[str] = []
    assert proof_of(tiny_models["llama"], lines.append).trains
    assert lines[-1].endswith("Could not determine home directory.")
