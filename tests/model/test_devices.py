"""Devices: what a name stands for, who is refused, and that nothing is left on the CPU that belongs elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_corpus
from safetensors.torch import load_file

from fedsplit.commands import evaluate, simulate
from fedsplit.errors import SettingError
from fedsplit.model import devices
from fedsplit.settings.documents import build

PLACES = ("cpu", "pretended")
"""Ends of the names of the folders of `elsewhere.py`."""


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_auto_is_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 0)
    assert [devices.resolve(name) for name in ("auto", "cpu")] == [devices.CPU] * 2
    with_gpus(monkeypatch, 2)
    found = [str(devices.resolve(name)) for name in ("auto", "cuda", "cuda:1", "cpu")]
    assert found == ["cuda:0", "cuda:0", "cuda:1", "cpu"]


def test_the_trunk_may_be_elsewhere() -> None:
    config = build({"device": "cuda:1", "trunk.device": "cpu"})
    assert [config.device_of(part) for part in ("bottom", "trunk", "top")] == ["cuda:1", "cpu", "cuda:1"]
    assert build({"device": "auto"}).device_of("trunk") == "auto"


@pytest.mark.parametrize(
    ("gpus", "values", "message"),
    [
        (0, {"device": "cuda"}, "device: cuda is not possible; allowed: auto | cpu ("),
        (0, {"trunk.device": "cuda:0"}, "trunk.device: cuda:0 is not possible; allowed: auto | cpu ("),
        (
            2,
            {"device": "cuda:2"},
            "device: cuda:2 is not possible; allowed: auto | cpu | cuda | cuda:0 | cuda:1, w",
        ),
        (1, {"device": "auto", "trunk.memory": "2GB"}, "trunk.memory: 2GB is not possible; allowed: none where"),
        (2, {"trunk.devices": "auto", "trunk.memory": "2GB"}, "trunk.memory: 2GB is not possible; allowed: none where"),
        (0, {"trunk.devices": "auto"}, "trunk.devices: auto is not possible; allowed: GPUs of this machine; auto | "),
        (1, {"trunk.devices": "cuda:0,cuda:1"}, "trunk.devices: cuda:1 is not possible; allowed: auto | cpu | cuda | "),
        (
            9,
            {"trunk.devices": "auto"},
            "trunk.devices: auto (9 devices) is not possible; allowed: at most 4 devices, as many as the trunk has",
        ),
        (
            2,
            {"trunk.devices": "auto", "trunk.device": "cuda:1"},
            "trunk.device: cuda:1 is not possible; allowed: none with --trunk.devices auto, which",
        ),
        (
            2,
            {"trunk.devices": "auto", "quantization": "trunk:4"},
            "quantization: trunk:4 is not possible; allowed: parts without the trunk with --trunk.devices",
        ),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    gpus: int, values: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus(monkeypatch, gpus)
    with pytest.raises(SettingError) as caught:
        devices.check_devices(build(values))
    assert str(caught.value).startswith(message)
    devices.check_devices(build({"device": "auto", "trunk.device": "cpu", "trunk.memory": "2GB"}))


def test_a_trunk_may_be_on_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 3)
    named = build({"trunk.devices": "cuda:2,cuda:0", "quantization": "top:4"})
    devices.check_devices(named)
    assert [device.index for device in devices.trunk_devices(named)] == [2, 0]
    assert [device.index for device in devices.trunk_devices(build({"trunk.devices": "auto"}))] == [0, 1, 2]
    for wrong in ("cuda:0,cuda:0", "cuda", "cpu,cuda:0", "cuda:0,"):
        with pytest.raises(SettingError, match=r"trunk\.devices: .* allowed: auto \| cuda:N,cuda:N and so"):
            build({"trunk.devices": wrong})


def test_commands_refuse_it_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with_gpus(monkeypatch, 0)
    monkeypatch.chdir(tmp_path)
    for device, words in (("cuda:3", "auto | cpu ("), ("gpu", "auto | cpu | cuda | cuda:N\n")):
        assert simulate.main(["--device", device]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"fedsplit: device: {device} is not possible; allowed: {words}")
        assert said.count("\n") == 1
        if device == "gpu":
            assert evaluate.main(["--run", "nowhere", "--device", device]) == 2
            assert capsys.readouterr().err.startswith(f"fedsplit: device: {device} is not possible; allowed: {words}")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("family", "spread"), [("gpt2", []), ("gpt2", ["spread"]), ("llama", ["spread"])])
def test_a_whole_federation_elsewhere(
    family: str, spread: list[str], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """On a device that exists in this test alone, and refuses to compute with anything that was left on the CPU.

    Spread, the trunk has a block on the CPU and a block on the device.
    """
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    script = Path(__file__).parents[1] / "elsewhere.py"
    arguments = [str(tiny_models[family]), str(corpus), str(tmp_path / "runs"), *spread]
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    here, there = found["texts"]
    assert here == there
    for name, (here, there) in found["losses"].items():
        assert there == pytest.approx(here, abs=1e-5), name
        assert here[1] < here[0], name
        files = [tmp_path / "runs" / f"{name}-{place}/adapter/adapter_model.safetensors" for place in PLACES]
        of_cpu, elsewhere = map(load_file, files)
        assert of_cpu.keys() == elsewhere.keys()
        for tensor, value in of_cpu.items():
            torch.testing.assert_close(elsewhere[tensor], value, atol=1e-4, rtol=0, msg=f"{name} {tensor}")
