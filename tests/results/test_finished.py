"""What finished runs left is found, and what is no finished run is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsplit.errors import InputError, SettingError
from fedsplit.results.finished import as_tasks, check_same_base, find_adapter, open_run


def test_a_run_knows_its_adapters(finished_run: Callable[..., Path]) -> None:
    run = open_run(finished_run("gpt2"))
    assert run.personal == [] and run.config.clients == 3 and run.summary["strategy"] == "fedavg"
    assert run.adapter().folder == run.path / "adapter"
    with pytest.raises(SettingError, match=r"^client: 0 is not possible; allowed: none: in this run"):
        run.adapter(0)
    own = open_run(finished_run("gpt2", "fedsa"))
    assert own.personal == [0, 1, 2]
    assert own.adapter(1).folder.name == "0001" and own.adapter(1).name.endswith("-client-0001")
    with pytest.raises(SettingError, match=r"^client: 3 is not possible; allowed: one of 0, 1, 2"):
        own.adapter(3)


def test_an_adapter_by_itself_is_found_too(finished_run: Callable[..., Path]) -> None:
    run = finished_run("gpt2")
    assert find_adapter(run / "adapter").model_path == find_adapter(run).model_path
    with pytest.raises(InputError, match="is an adapter, not a run"):
        find_adapter(run / "adapter", 1)


def test_what_is_no_finished_run_is_refused(finished_run: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(InputError, match="there is no such folder"):
        open_run(run)
    shutil.copytree(finished_run("gpt2"), run)
    (run / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"is no adapter: there is no adapter_model\.safetensors"):
        open_run(run).adapter()
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "rounds": 1}))
    with pytest.raises(InputError, match=r"did not end \(1 of its 2 rounds are summed up\); --resume \S+ goes on"):
        open_run(run)
    (run / "summary.json").unlink()
    with pytest.raises(InputError, match=r"did not end \(there is no summary\.json"):
        open_run(run)
    (run / "config.toml").unlink()
    with pytest.raises(InputError, match=r"there is no config\.toml in it"):
        open_run(run)


def test_a_base_model_is_known_by_its_weights(
    finished_run: Callable[..., Path], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """A copy elsewhere is the same model; another of the same size is not."""
    shutil.copytree(tiny_models["gpt2"], tmp_path / "copy")
    first, copy = find_adapter(finished_run("gpt2")), find_adapter(finished_run(str(tmp_path / "copy")))
    assert first.model != copy.model
    (tmp_path / "copy" / "extra.safetensors").write_bytes(b"not a file that the model is loaded from")
    check_same_base([first, copy])
    weights = bytearray((tmp_path / "copy" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "copy" / "model.safetensors").write_bytes(weights)
    for other in (copy, find_adapter(finished_run("llama"))):
        with pytest.raises(InputError, match="belong to different base models"):
            check_same_base([first, other])
    with pytest.raises(InputError, match=r"base models of different types: .* in fp32, .* in bf16"):
        check_same_base([first, find_adapter(finished_run("gpt2", dtype="bf16"))])


def test_names_of_tasks_are_such_as_peft_takes(finished_run: Callable[..., Path]) -> None:
    adapters = [find_adapter(finished_run("gpt2", seed=seed)) for seed in (1, 2)]
    assert list(as_tasks(adapters)) == ["gpt2_fedavg_seed-1", "gpt2_fedavg_seed-2"]
    assert as_tasks(adapters, ["a", "b"])["b"] == adapters[1]
    for names, words in ((["a"], "1 for 2 adapters"), (["a", "a"], "a is there twice"), (["a", "b.c"], "not possible")):
        with pytest.raises(InputError, match=words):
            as_tasks(adapters, names)
