"""The command that writes text: the unsplit model's with the exported adapter, through processes of their own."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import tomli_w
import torch
import warm_command
from conftest import with_added_token
from peft import PeftModel
from split_models import Here, server_of

from fedsplit.adaptation import adapter_files, lora, run_adapters
from fedsplit.client.link import Link
from fedsplit.commands import generate, generation_job
from fedsplit.generation.decoding import ClientHalf, Throughput, decode
from fedsplit.generation.sampling import Chooser, Sampling
from fedsplit.model.split import load_parts
from fedsplit.model.token_ids import end_tokens
from fedsplit.model.unsplit import load_unsplit
from fedsplit.model.vocabulary import load_tokenizer
from fedsplit.results.finished import Run, open_run
from fedsplit.trunk.schedules import SCHEDULES
from fedsplit.trunk.status import Bytes, Traffic
from fedsplit.wire.codecs import make_codec

PROMPTS = ["ann wrote", "bob", "text number 3"]
TEMPLATE = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}{% if add_generation_prompt %}:{% endif %}"


Talking = Callable[..., Path]


@pytest.fixture(scope="session")
def talking(
    tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, finished_run: Callable[..., Path]
) -> Talking:
    """Makes finished runs of a family, whose tokenizer reads and writes characters; the newline ends a text.

    Llama's knows conversations, too.
    """
    models: dict[str, Path] = {}

    def make(family: str, strategy: str = "fedavg", **settings: object) -> Path:
        if family not in models:
            models[family] = folder = tmp_path_factory.mktemp("talking") / f"talking-{family}"
            shutil.copytree(tiny_models[family], folder)
            words = {"tokenizer_class": "TokenizersBackend", "eos_token": "\n"}
            words |= {"chat_template": TEMPLATE} if family == "llama" else {}
            (folder / "tokenizer_config.json").write_text(json.dumps(words))
            (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [96, 95]}))
            file = folder / "tokenizer.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"decoder": {"type": "Fuse"}}))
        return finished_run(str(models[family]), strategy, **settings)

    return make


def _unsplit(run: Run, adapter: Path, text: str, count: int) -> list[int]:
    """The new tokens of the unsplit model with an exported adapter."""
    tokenizer = load_tokenizer(run.config.model_path)
    model = PeftModel.from_pretrained(load_unsplit(run.config.model_path), str(adapter)).eval()
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return made[0, ids.shape[1] :].tolist()


def _through_parts(run: Run, adapter: Path, tokens: list[list[int]], count: int) -> list[list[int]]:
    """As the command, without its processes."""
    config, stops = run.config, end_tokens(run.config.model_path)
    parts = load_parts(config.model_path, config.bounds, ["bottom", "trunk", "top"])
    for part in parts:
        lora.add(part, config.lora, config.seed)
    lora.adopt(adapter_files.load(adapter), *parts)
    here = Here(parts[1])
    here.server = server_of(parts[1])
    ends = ClientHalf(0, parts[0], parts[2], Link(here, make_codec("raw"), SCHEDULES["copies"], "run", "first"))
    chooser = Chooser(Sampling(), range(len(tokens)))
    steps = decode(ends, tokens, count, stops, chooser, Throughput())
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]


def _folded(talking: Talking) -> Path:
    """A run whose adapter has ranks and scalings of its own for every layer, trained with dropout."""
    return talking("llama", "flora", lora__rank=[1, 4], lora__dropout=0.5)


@pytest.mark.parametrize("client", [None, 2])
def test_texts_are_those_of_the_exported_adapter(client: int | None, talking: Talking) -> None:
    """What was folded included; under FedSA each client has an adapter of its own. Nothing is dropped meanwhile."""
    run = open_run(_folded(talking) if client is None else talking("gpt2", "fedsa"))
    folder = run.adapter(client).folder
    pattern = json.loads((folder / "adapter_config.json").read_text())["alpha_pattern"]
    assert bool(pattern) == (client is None)
    tokenizer = load_tokenizer(run.config.model_path)
    tokens = [list(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    found = _through_parts(run, folder, tokens, 12)
    assert found == [_unsplit(run, folder, prompt, 12) for prompt in PROMPTS]


def test_the_client_holds_its_parts_as_the_run_did(talking: Talking, monkeypatch: pytest.MonkeyPatch) -> None:
    """In as many bits: otherwise it would write with another model than the one that was trained."""
    run, asked = open_run(_folded(talking)), {}

    def load(*_: object, **how: object) -> list[object]:
        asked.update(how)
        return load_parts(run.config.model_path, run.config.bounds, ["bottom", "top"])

    monkeypatch.setattr(run_adapters, "load_parts", load)
    config = replace(run.config, quantization="bottom:4,trunk:4,top:8")
    job = generation_job.Job(config, run.adapter(), 0, None, [], [], 1, [], Sampling(), 1)
    generate._load_client_parts(job)
    assert asked["bits"] == {"bottom": 4, "trunk": 4, "top": 8}


def test_prompts_become_tokens(talking: Talking) -> None:
    model = open_run(_folded(talking)).config.model_path
    tokenizer = load_tokenizer(model)
    plain, said = (generation_job.tokenise(tokenizer, ["ab", "c"], chat, "m") for chat in (False, True))
    assert [tokenizer.decode(ids) for ids in plain] == ["ab", "c"]
    assert ["".join(tokenizer.convert_ids_to_tokens(ids)) for ids in said] == ["<ab>:", "<c>:"]
    assert end_tokens(model) == [96, 95]


def test_what_went_by_is_told() -> None:
    pace = Throughput(read=10, read_seconds=0.5, written=40, written_seconds=2.0, passes=20, texts=2)
    sent = Traffic(prompt=Bytes(up=1300, down=1280), token=Bytes(up=5120, down=5120))
    assert generate.lines(pace, sent) == [
        "            tokens  seconds  a second  bytes a token up   down",
        "prompts         10     0.50        20             130 B  128 B",
        "after them      40     2.00        20             128 B  128 B",
    ]
    line = generate.lines(Throughput(read=1, read_seconds=1.0), Traffic())[2]
    assert line.split()[:5] == ["after", "them", "0", "0.00", "-"]


def test_what_is_asked_for_wrongly_gets_one_line(
    talking: Talking,
    finished_run: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, own = str(_folded(talking)), str(talking("gpt2", "fedsa"))
    shutil.copytree(run, tmp_path / "unfinished")
    (tmp_path / "unfinished" / "summary.json").unlink()
    shutil.copytree(run, tmp_path / "broken")
    (tmp_path / "broken" / "adapter" / "adapter_model.safetensors").write_bytes(b"no")
    (tmp_path / "none.txt").write_text("\n \n")
    hello = ["--prompt", "Hello"]
    added = str(with_added_token(open_run(Path(run)).config.model_path, tmp_path / "added", "Hello"))
    sorts = str(finished_run("gpt2", dataset="synthetic", data__format="classification", train__max_length=32))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    def changed(**values: object) -> str:
        """A run that had another setting."""
        folder = tmp_path / "".join(values)
        shutil.copytree(run, folder)
        file = folder / "config.toml"
        file.write_text(tomli_w.dumps(tomllib.loads(file.read_text()) | values))
        return str(folder)

    for argv, words in (
        (hello, "the following arguments are required: --run; see --help"),
        (["--run", "nowhere", *hello], "nowhere is no folder of a run: there is no such folder"),
        (["--run", str(tmp_path / "unfinished"), *hello], f"the run in {tmp_path}/unfinished did not end"),
        (["--run", str(tmp_path / "broken"), *hello], f"the adapter in {tmp_path}/broken/adapter cannot be read"),
        (["--run", run], "no prompt is given: say --prompt TEXT, or --prompts FILE"),
        (["--run", run, "--prompt", " "], "prompt: nothing is not possible"),
        (["--run", run, "--prompts", "nowhere.txt"], "prompts: nowhere.txt is not possible; allowed: a text file"),
        (["--run", run, "--prompts", f"{tmp_path}/none.txt"], f"prompts: {tmp_path}/none.txt (nothing in it)"),
        (["--run", run, "--prompt", "x" * 32], "prompt: number 1 (32 tokens) is not possible; allowed: up to 31"),
        (["--run", run, "--max-new-tokens", "28", *hello], "max_new_tokens: 28 is not possible; allowed: 1 to 27"),
        (["--run", run, "--max-new-tokens", "0", *hello], "max_new_tokens: 0 is not possible"),
        (["--run", run, "--temperature", "-1", *hello], "temperature: -1.0 is not possible; allowed: 0, which"),
        (["--run", run, "--temperature", "nan", *hello], "temperature: nan is not possible"),
        (["--run", run, "--temperature", "1", "--top-p", "0", *hello], "top_p: 0.0 is not possible"),
        (["--run", run, "--temperature", "1", "--top-k", "-1", *hello], "top_k: -1 is not possible"),
        (["--run", run, "--top-k", "5", *hello], "top_k: 5 is not possible; allowed: none without --temperature"),
        (["--run", run, "--seed", "5", *hello], "seed: 5 is not possible; allowed: none without --temperature"),
        (["--run", run, "--batch-size", "0", *hello], "batch_size: 0 is not possible"),
        (["--run", run, "--kernels", "none", *hello], "kernels: none is not possible; allowed: fused | library"),
        (["--run", run, "--client", "0", *hello], "client: 0 is not possible; allowed: none: in this run all"),
        (["--run", own, "--client", "3", *hello], "client: 3 is not possible; allowed: one of 0, 1, 2"),
        (["--run", own, *hello], f"in the run in {own} every client has an adapter of its own: say --client, one of 0"),
        (["--run", sorts, *hello], f"the run in {sorts} sorts texts into classes"),
        (["--run", own, "--client", "0", "--chat", *hello], "chat: the tokenizer of"),
        (["--run", run, "--model", "./nowhere", *hello], "model: ./nowhere is not possible"),
        (["--run", run, "--model", added, *hello], f"model: {added} (its texts have token 97 (Hello), its embedding"),
        (["--run", run, "--trunk.device", "gpu", *hello], "trunk.device: gpu is not possible; allowed: auto | cpu"),
        (["--run", changed(device="cuda:77"), *hello], "trunk.device: cuda:77 is not possible; allowed: auto | cpu"),
        (["--run", changed(quantization="top:4"), *hello], "quantization: top:4 is not possible; allowed: none with"),
        (["--run", changed(data={"format": "classification"}), *hello], f"the run in {tmp_path}/data sorts texts"),
    ):
        assert generate.main(argv) == 2, argv
        said = capsys.readouterr()
        assert said.err.startswith(f"fedsplit: {words}") and said.err.count("\n") == 1, said.err
        assert said.out == ""


def _command(run: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "fedsplit.generate", "--run", str(run), *flags]


@pytest.mark.slow
def test_the_command_writes_what_the_unsplit_model_writes(talking: Talking, tmp_path: Path) -> None:
    """Ragged prompts, a conversation, and end tokens, with Ray and a trunk that is gone afterwards."""
    folder = _folded(talking)
    run = open_run(folder)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[1:]))
    flags = ["--prompt", PROMPTS[0], "--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", "12"]
    done = warm_command.command("fedsplit.generate", "--run", folder, *flags, "--kernels", "library", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tokenizer = load_tokenizer(run.config.model_path)
    tokens = [_unsplit(run, run.adapter().folder, prompt, 12) for prompt in PROMPTS]
    texts = [prompt + "".join(_shown(tokenizer, ids)) for prompt, ids in zip(PROMPTS, tokens, strict=True)]
    assert done.stdout == "\n\n".join(texts) + "\n"
    prompts, after = (line.split() for line in done.stderr.splitlines()[-2:])
    assert prompts[1] == str(sum(map(len, PROMPTS))) and after[2] == str(sum(len(ids) - 1 for ids in tokens))
    # The longest of them decides how many passes there are, and all of them take part in each.
    passes = max(map(len, tokens)) - 1
    assert re.search(rf"{round(3 * passes * 128 / int(after[2]))} B", done.stderr), done.stderr


def _shown(tokenizer: object, ids: list[int]) -> list[str]:
    """What is to be seen of tokens; the newline is an end token here, and special."""
    return [tokenizer.decode([token], skip_special_tokens=True) for token in ids]  # type: ignore[attr-defined]


@pytest.mark.slow
def test_ctrl_c_ends_the_trunk_too(talking: Talking) -> None:
    folder = _folded(talking)
    many = [word for number in range(400) for word in ("--prompt", f"text {number}")]
    process = subprocess.Popen(
        _command(folder, *many, "--batch-size", "1", "--max-new-tokens", "20"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline()
    children = psutil.Process(process.pid).children(recursive=True)
    assert any("TrunkActor" in " ".join(child.cmdline()) for child in children)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert process.stderr.read().splitlines()[-1] == "fedsplit: stopped"
    for _ in range(100):
        if not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children):
            return
        time.sleep(0.1)
    raise AssertionError("something of it still runs")
