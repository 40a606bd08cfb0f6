"""What a user may get wrong, through the command: one line each, exit code 2, and nothing is lost."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from conftest import with_added_token, write_corpus
from safetensors.torch import load_file, save_file

from fedsplit.commands import checks, simulate
from fedsplit.errors import InputErrors, SettingError
from fedsplit.proving.kept import proof_of
from fedsplit.settings.config import Config
from fedsplit.settings.documents import build


def bad_inputs(tmp_path: Path, model: Path) -> list[tuple[list[str], str]]:
    """What a user may get wrong that only a look at the disk, the model or the data can tell."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "words.jsonl").write_text('{"words": "x"}\n')
    (tmp_path / "void.jsonl").write_text("")
    (tmp_path / "bent.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "bert" / "model.safetensors").write_bytes(b"")
    (tmp_path / "torn").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "torn" / name).write_text((model / name).read_text())
    (tmp_path / "torn" / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-100])
    copies = {name: shutil.copytree(model, tmp_path / name) for name in ("nan", "stray", "ends", "endless")}
    weights = load_file(model / "model.safetensors")
    weights["transformer.h.1.mlp.c_fc.weight"][0, 0] = math.nan
    save_file(weights, copies["nan"] / "model.safetensors", metadata={"format": "pt"})
    (copies["stray"] / "model.safetensors").rename(copies["stray"] / "model_before.safetensors")
    copies["added"] = with_added_token(model, tmp_path / "added", "wrote")
    copies["prompted"] = with_added_token(model, tmp_path / "prompted", "dear")
    config = json.loads((model / "config.json").read_text())
    for name, end in (("ends", 97), ("endless", None)):
        (copies[name] / "generation_config.json").unlink()
        (copies[name] / "config.json").write_text(json.dumps({**config, "eos_token_id": end}))
    (copies["endless"] / "tokenizer.json").unlink()
    tiny = ["--cut", "1:2", "--max-length", "16", "--dataset", str(write_corpus(tmp_path / "corpus.jsonl"))]
    prompted = ["--prompt.kind", "prompt", "--prompt.init", "text", "--prompt.text", "dear you"]
    return [
        (
            ["--model", str(copies["nan"]), *tiny],
            f"model: {copies['nan']} (transformer.h.1.mlp.c_fc.weight in model.safetensors holds values that are not",
        ),
        (
            ["--model", str(copies["stray"]), *tiny],
            f"model: {copies['stray']} (neither model.safetensors nor model.safetensors.index.json in it, only model_",
        ),
        (
            ["--model", str(copies["added"]), *tiny],
            f"model: {copies['added']} (its texts have token 97 (wrote), its embedding has 97 rows)",
        ),
        (
            ["--model", str(copies["prompted"]), *tiny, *prompted],
            f"model: {copies['prompted']} (its texts have token 97 (dear), its embedding has 97 rows)",
        ),
        (
            ["--model", str(copies["ends"]), *tiny],
            f"model: {copies['ends']} (its texts have token 97 (eos_token_id), its embedding has 97 rows)",
        ),
        (["--model", str(copies["endless"]), *tiny], f"model: {copies['endless']} (no eos_token_id in generation_"),
        (["--clientz", "8"], "there is no flag --clientz; did you mean --clients"),
        (["--clients", "0"], "clients: 0 is not possible"),
        (["--clients", "10000"], "clients: 10000 is not possible; allowed: 1 to "),
        (["--lora-rank", "0"], "lora.rank: 0 is not possible"),
        (["--lr", "-1"], "train.lr: -1 is not possible"),
        (["--lr", "nan"], "train.lr: nan is not possible"),
        (["--cut", "2:2"], "cut: 2:2 is not possible"),
        (["--cut", "1:7"], "cut: 1:7 is not possible; allowed: LO:HI with 0 <= LO < HI <= 6"),
        (["--cut", "5:6", "--trunk.schedule", "forward-only"], "cut: 5:6 is not possible; allowed: a cut that leaves"),
        (["--cut", "0:6", "--trunk.schedule", "frozen"], "cut: 0:6 is not possible; allowed: a cut that leaves"),
        (["--max-length", "100000"], "train.max_length: 100000 is not possible; allowed: 8 to 256"),
        (["--peft", "loraa"], "lora.method: loraa is not possible; allowed: lora | rslora"),
        (["--peft", "xlora"], "lora.method: xlora (a router reads the hidden states of the whole model"),
        (["--peft", "oft"], "lora.method: oft is not possible; allowed: lora | rslora | dora"),
        (
            ["--peft", "adalora", "--peft-config", '{"tinit": 50}'],
            "lora.options: tinit 50 and tfinal 0 is not possible",
        ),
        (
            ["--peft", "adalora", "--peft-config", '{"init_r": 8}'],
            "lora.options: target_r 8 is not possible; allowed: 1",
        ),
        (["--peft", "adalora", "--epochs", "1"], "train.epochs: 1 is not possible; allowed: 0 with adalora"),
        (["--peft", "adalora", "--strategy", "ffa"], "strategy: ffa is not possible; allowed: fedadagrad"),
        (["--peft", "ia3", "--lora-rank", "4"], "lora.rank: 4 is not possible; allowed: the default with the method"),
        (["--peft", "dora", "--strategy", "flora"], "strategy: flora is not possible; allowed: fedadagrad"),
        (["--peft-config", "nowhere.json"], "lora.options: nowhere.json is not possible; allowed: a JSON object"),
        (["--peft-config", '{"rr": 1}'], "lora.options: rr is not possible; allowed: a field of PEFT's LoraConfig"),
        (["--peft", "ln_tuning", "--lora.targets", "c_fc"], "lora.targets: c_fc is not possible; allowed: ln_1,ln_2"),
        (["--lora.targets", "q_proj"], "lora.targets: q_proj is not possible; allowed: c_attn,c_proj,c_fc"),
        (
            ["--model", "./nowhere"],
            "model: ./nowhere is not possible; allowed: the name of the bundled model, or a folder",
        ),
        (["--model", "org/nowhere"], "model: org/nowhere (no such folder; not all of it is in the Hub's cache"),
        (["--model", "nowhere.gguf"], "model: nowhere.gguf is not possible"),
        (["--model", str(tmp_path / "bert")], "model: a model of type bert, which is an encoder: its tokens"),
        (["--model", str(tmp_path / "torn"), "--cut", "1:2", "--max-length", "32"], f"model: {tmp_path}/torn ("),
        (["--dataset", "nowhere.txt"], "dataset: nowhere.txt is not possible"),
        (
            ["--dataset", str(tmp_path / "short.txt")],
            "dataset: a text of 0 sequences (short, 1 in all) is not possible",
        ),
        (["--dataset", str(tmp_path / "words.jsonl")], "dataset: "),
        (["--partition", "natural", "--clients", "15"], "clients: 15 is not possible; allowed: 1 to 14"),
        (["--strategy", "fedavgg"], "strategy: fedavgg is not possible; allowed: "),
        (["--strategy", f"{tmp_path}/empty.py:Mine"], "strategy: "),
        (["--strategy", "flwr.serverapp.strategy:FedNone"], "strategy: "),
        (["--strategy.eta", "1"], "strategy.eta: 1 is not possible; allowed: no option at all"),
        (["--out", str(tmp_path / "full")], "out: "),
        (["--out", "/proc/run"], "out: /proc/run"),
        (
            ["--trunk.schedule", "none"],
            "trunk.schedule: none is not possible; allowed: shared | batched | accumulate | copies",
        ),
        (["--trunk.memory", "800"], "trunk.memory: 800 is not possible; allowed: bytes with a unit"),
        (["--deterministic", "--trunk.group", "9"], "trunk.group: 9 is not possible; allowed: 1 to "),
        (
            ["--deterministic", "--trunk.group", "2", "--workers", "2", "--trunk.memory", "2GB"],
            "trunk.memory: 2GB is not possible; allowed: none with --deterministic and groups",
        ),
        (
            ["--data.at", "label"],
            "data.at: label is not possible; allowed: driver | shared without a cluster of several",
        ),
        (["--wire.tls", "/nowhere"], "wire.tls: /nowhere is not possible; allowed: a folder with ca.pem, cert.pem and"),
        (["--deterministic", "--trunk.lanes", "2"], "trunk.lanes: 2 is not possible; allowed: 0 or 1 with --determin"),
        (["--trunk.memory", "2GB", "--trunk.lanes", "2"], "trunk.lanes: 2 is not possible; allowed: 0 or 1 with --d"),
        (["--trunk.lanes", "3"], "trunk.lanes: 3 is not possible; allowed: "),
        (["--trunk.stages", "1:3"], "trunk.stages: 1:3 is not possible; allowed: LO:MID:HI with LO < MID < HI"),
        (["--trunk.stages", "2:3:5"], "trunk.stages: 2:3:5 is not possible; allowed: 1:…:5, from end to end"),
        (["--trunk.replicas", "9"], "trunk.replicas: 9 is not possible; allowed: 1 to 8, the number of clients"),
        (["--trunk.replicas", "2", "--trunk.sync", "step"], "trunk.sync: step is not possible; allowed: round under"),
        (
            ["--trunk.schedule", "batched", "--trunk.sync", "step"],
            "trunk.sync: step is not possible; allowed: round, ex",
        ),
        (
            ["--trunk.replicas", "2", "--trunk.weights", "1"],
            "trunk.weights: 1 is not possible; allowed: 2 numbers",
        ),
        (
            ["--trunk.weights", "1,0"],
            "trunk.weights: 1,0 is not possible; allowed: speed, or a",
        ),
        (
            ["--trunk.weights", "speed", "--deterministic"],
            "trunk.weights: speed is not possible; allowed: numbers",
        ),
        (["--peft", "adalora", "--trunk.stages", "1:3:5"], "trunk.stages: 1:3:5 is not possible; allowed: none with"),
        (["--peft", "adalora", "--trunk.replicas", "2"], "trunk.replicas: 2 is not possible; allowed: 1 with adalora"),
        (["--deterministic", "perhaps"], "deterministic: perhaps is not possible; allowed: true | false"),
        (["--trunk.schedule", "batched", "--micro-batches", "2"], "train.micro_batches: 2 is not possible; allowed: 1"),
        (
            ["--trunk.schedule", "batched", "--train.accumulation", "2"],
            "train.accumulation: 2 is not possible; allowed: 1 under the trunk schedule batched",
        ),
        (["--trunk.schedule", "batched", "--train.clip", "1"], "train.clip: 1.0 is not possible; allowed: 0 under"),
        (["--train.clip", "-1"], "train.clip: -1 is not possible; allowed: a number of at least 0"),
        (["--train.accumulation", "0"], "train.accumulation: 0 is not possible"),
        (["--train.schedule", "steps"], "train.schedule: steps is not possible; allowed: constant | linear | cosine"),
        (["--train.warmup", "1.5"], "train.warmup: 1.5 is not possible; allowed: a whole number of steps, or a share"),
        (
            ["--train.warmup", "51"],
            "train.warmup: 51 is not possible; allowed: up to 50, a client's steps in all rounds",
        ),
        (["--train.momentum", "0.9"], "train.momentum: 0.9 is not possible; allowed: 0 under adamw"),
        (["--train.momentum", "1", "--train.optimizer", "sgd"], "train.momentum: 1 is not possible"),
        (["--train.beta1", "0.5", "--train.optimizer", "sgd"], "train.beta1: 0.5 is not possible; allowed: 0.9, the"),
        (
            ["--train.optimizer-state", "keep", "--train.optimizer", "sgd"],
            "train.optimizer_state: keep is not possible; allowed: reset under sgd without momentum",
        ),
        (["--min-delta", "0.1"], "min_delta: 0.1 is not possible; allowed: 0 without --patience"),
        (["--config", "nowhere.toml"], "config: nowhere.toml is not possible"),
        (["--dtype", "fp8"], "dtype: fp8 is not possible; allowed: fp32 | bf16 | fp16"),
        (
            ["--dtype", "fp16", "--wire.codec", "bf16"],
            "wire.codec: bf16 is not possible; allowed: raw with --dtype fp16",
        ),
        (["--device", "tpu"], "device: tpu is not possible; allowed: auto | cpu | cuda | cuda:N"),
        (["--quantization", "trunk:5"], "quantization: trunk:5 is not possible; allowed: PART:BITS"),
        (
            ["--quantization", "trunk:4", "--peft", "dora"],
            "quantization: trunk:4 is not possible; allowed: none with adapters of the kind dora",
        ),
        (["--lm-head", "half"], "lm_head: half is not possible; allowed: frozen | lora | full"),
        (["--lm-head", "lora", "--peft", "ia3"], "lm_head: lora is not possible; allowed: frozen | full with adapters"),
        (["--prompt.kind", "soft"], "prompt.kind: soft is not possible; allowed: off | prompt | ptuning | prefix"),
        (["--prompt.tokens", "4"], "prompt.tokens: 4 is not possible; allowed: its default, except with"),
        (["--prompt.kind", "prompt", "--lora-rank", "4"], "lora.rank: "),
        (["--prompt.kind", "prompt", "--prompt.tokens", "200"], "prompt.tokens: 200 is not possible; allowed: at most"),
        (["--prompt.kind", "prefix", "--strategy", "fedex"], "strategy: fedex is not possible; allowed: "),
        (
            ["--prompt.kind", "prompt", "--trunk.schedule", "forward-only"],
            "trunk.schedule: forward-only is not possible",
        ),
        (["--router-aux-loss", "0.1"], "router_aux_loss: 0.1 is not possible; allowed: 0 for a model without"),
        (["--partition", "pathological:0"], "partition: pathological:0 is not possible; allowed: auto | natural"),
        (["--dataset", str(tmp_path / "void.jsonl")], f"dataset: {tmp_path}/void.jsonl is not possible; allowed: "),
        (["--dataset", str(tmp_path / "bent.jsonl")], f"dataset: {tmp_path}/bent.jsonl is not possible; allowed: "),
        (["--data.format", "chat", "--dataset", str(tmp_path / "words.jsonl")], "data"),
        (["--data.format", "classification", "--data.packing", "true"], "data.packing: true is not possible"),
        (["--resume", "nowhere"], "resume: nowhere is not possible; allowed: the folder of a run"),
        (["--trunk.every", "2"], "trunk.every: 2 is not possible; allowed: 0 under the trunk schedule shared"),
        (["--share", "top"], "share: top is not possible; allowed: trunk among them"),
        (["--share", "top,top"], "share: top,top is not possible; allowed: parts among"),
        (["--micro-batches", "5"], "train.micro_batches: 5 is not possible; allowed: 0 to 4"),
        (["--fraction", "0"], "fraction: 0 is not possible; allowed: a number above 0, up to 1"),
        (["--lora.rank", "4,8"], "lora.rank: 4,8 is not possible; allowed: one rank under the strategy fedavg"),
    ]


def test_what_is_asked_for_wrongly_gets_one_line_and_loses_nothing(
    tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, one line on stderr, no model loaded, no cluster started, nothing written."""
    from fedsplit.adaptation import run_adapters
    from fedsplit.model import split
    from fedsplit.trunk import cluster

    def too_late(*_: object, **__: object) -> None:
        raise AssertionError("something was loaded or started first")

    proof_of(tiny_models["gpt2"])  # a new proof is told in a line
    cases = bad_inputs(tmp_path, tiny_models["gpt2"])
    assert len(cases) >= 80
    monkeypatch.setattr(cluster, "running", too_late)
    monkeypatch.setattr(split, "load_parts", too_late)
    monkeypatch.setattr(run_adapters, "load_parts", too_late)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for argv, message in cases:
        assert simulate.main(argv) == 2, argv
        printed = capsys.readouterr()
        assert not printed.out or " proved at " in printed.out  # of a model with other switches
        assert printed.err.startswith(f"fedsplit: {message}"), (argv, printed.err)
        assert printed.err.count("\n") == 1, printed.err
        assert [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in str(path)] == before, argv


def test_nodes_that_read_the_data_by_themselves_need_its_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts.txt").write_text("a text")
    monkeypatch.chdir(tmp_path)
    checks.check_places(pinned(str(tmp_path / "texts.txt")))
    checks.check_places(pinned("sotu"))
    with pytest.raises(SettingError, match=r"^dataset: texts.txt is not possible; allowed: an absolute path with"):
        checks.check_places(pinned("texts.txt"))


def pinned(dataset: str) -> Config:
    return build({"data.at": "label", "ray.address": "auto", "dataset": dataset})


def test_mods_need_clients_of_flowers_and_plain_adapters() -> None:
    named = {"mods": ["fixedclipping_mod"]}
    checks.check_mods(build({"engine": "local", "adapter.codec": "int8"}))
    checks.check_mods(build(named))
    with pytest.raises(InputErrors) as caught:
        checks.check_mods(build({**named, "engine": "local", "adapter.codec": "int8"}))
    assert [str(error).partition(":")[0] for error in caught.value.errors] == ["engine", "adapter.codec"]
