"""Text that runs with virtual tokens and prefixes write is that of plain PEFT with the adapter they export."""

from __future__ import annotations

import contextlib
import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_command
from conftest import BLOCKS, CONFIGS, VOCABULARY, WINDOW
from peft import PeftModel
from split_models import NEW, RAW, Here, ends_of, shape_of, walked
from torch import Tensor

from fedsplit.adaptation import lora, prompts, run_adapters
from fedsplit.commands import generate, generation_job
from fedsplit.generation.decoding import ClientHalf, depends_on_neighbours, padded
from fedsplit.generation.transcript import Detokeniser
from fedsplit.model.caches import Past
from fedsplit.model.split import load_parts
from fedsplit.model.token_ids import end_tokens
from fedsplit.model.unsplit import load_unsplit
from fedsplit.model.vocabulary import load_tokenizer
from fedsplit.results.finished import open_run
from fedsplit.results.measuring import evaluate
from fedsplit.settings.documents import build
from fedsplit.settings.sections import PromptSettings
from fedsplit.trunk.sessions import Sessions
from fedsplit.wire.packets import Packet, StepKey
from fedsplit.wire.steps import SpoiledStep

KINDS = ("bottom", "trunk", "top")
TOKENS = 3
SETTINGS = {
    "prompt": PromptSettings(kind="prompt", tokens=TOKENS),
    "ptuning": PromptSettings(kind="ptuning", tokens=TOKENS, hidden=20),
    "prefix": PromptSettings(kind="prefix", tokens=TOKENS),
    "projected": PromptSettings(kind="prefix", tokens=TOKENS, projection=True, hidden=12),
}


def _prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


RAGGED = _prompts(13, 6, 9)
"""Longer than a window of 5."""

SHORT = _prompts(4)
"""Outgrows Phi-3's 8 positions while it is written, with what was trained and without."""


def exported(path: Path, name: str, folder: Path, size: float = 0.3) -> list[Any]:
    """Trains nothing, but exports an adapter that is far from its start; the parts that it was on."""
    parts = load_parts(path, (1, 2), KINDS, kernels="library")
    for part in parts:
        prompts.add(part, SETTINGS[name], 0, path)
        for key, parameter in lora.parameters(part).items():
            generator = torch.Generator().manual_seed(sum(map(ord, key)))
            parameter.data = torch.randn(parameter.shape, generator=generator) * size
        part.eval()
    prompts.save(folder, lora.read(*parts).tensors, SETTINGS[name], path, str(path))
    return parts


def adopted(path: Path, name: str, folder: Path, cut: tuple[int, int], kernels: str = "library") -> list[Any]:
    """Parts with what was exported, as `generate` makes them."""
    config = replace(build({"model": str(path)}), prompt=SETTINGS[name])
    parts = load_parts(path, cut, KINDS, kernels=kernels)
    run_adapters.adopt(folder, config, *parts)
    return [part.eval() for part in parts]


def opened(path: Path, folder: Path) -> Any:
    """The unsplit model with what was exported, by PEFT; nothing ends a text of it."""
    base = load_unsplit(path)
    base.generation_config.eos_token_id, base.generation_config.pad_token_id = None, 0
    return PeftModel.from_pretrained(base, str(folder)).eval()


def generated(whole: Any, texts: list[list[int]], count: int = NEW) -> tuple[Tensor, Tensor]:
    """What PEFT generates: logits (B, count, V), and the new tokens (B, count)."""
    ids, mask = padded(texts)
    mask = torch.ones_like(ids) if mask is None else mask.long()
    how = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    made = whole.generate(input_ids=ids, attention_mask=mask, max_new_tokens=count, **how)
    return torch.stack(made.logits, 1), made.sequences[:, ids.shape[1] :]


NEAR = ("gpt2", "llama", "mistral")
CASES = [(family, name) for family in NEAR for name in ("prompt", "ptuning", "prefix")]
CASES += [
    pytest.param(family, name, marks=pytest.mark.slow)
    for family in CONFIGS
    if family not in NEAR
    for name in ("prompt", "prefix")
]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_every_logit_is_plain_pefts_to_the_bit(
    family: str, name: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """A ragged batch, and one text; cuts that leave a part no blocks among them."""
    path = tiny_models[family]
    exported(path, name, tmp_path)
    whole, cases = opened(path, tmp_path), [RAGGED, SHORT]
    references = [generated(whole, texts) for texts in cases]
    for cut in ((0, 2), (1, BLOCKS)):
        ends, here = ends_of(adopted(path, name, tmp_path, cut))
        for texts, (logits, tokens) in zip(cases, references, strict=True):
            found = walked(ends, texts)
            assert torch.equal(found, logits), f"cut {cut}, {len(texts)} prompts"
            assert torch.equal(found.argmax(-1), tokens)
        assert len(here.sessions) == 0
    alone = load_unsplit(path).eval()(input_ids=torch.tensor(SHORT)).logits[:, -1]
    assert not torch.allclose(alone, references[1][0][:, 0], atol=0.01), "it makes no difference"


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kernels", ["library", "fused"])
def test_what_encoders_made_is_all_that_writing_takes(
    name: str, kernels: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Against the parts with their encoders on the whole text at every step, which remember nothing."""
    path = tiny_models["llama"]
    bottom, trunk, top = exported(path, name, tmp_path, size=0.1)
    ends, _ = ends_of(adopted(path, name, tmp_path, (1, 2), kernels))
    (text,) = texts = RAGGED[:1]
    found = walked(ends, texts)
    for step in range(NEW):
        with torch.no_grad():
            expected = top.logits(trunk(bottom(torch.tensor([text]))))[:, -1]
        torch.testing.assert_close(found[:, step], expected, rtol=1e-3, atol=1e-4)
        text = [*text, int(expected.argmax())]


@pytest.mark.parametrize("name", SETTINGS)
def test_what_was_exported_is_on_its_parts_and_no_more(name: str, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    path = tiny_models["gpt2"]
    whole = prompts.flattened(
        lora.read(*exported(path, name, tmp_path)).tensors, SETTINGS[name], load_unsplit(path).config
    )
    parts = adopted(path, name, tmp_path, (1, 2))
    named = {n: tensor for part in parts for n, tensor in lora.read(part).tensors.items()}
    settings, expected = prompts.embeddings(whole, SETTINGS[name], parts[1].config)
    assert settings.kind == {"ptuning": "prompt", "projected": "prefix"}.get(name, name) and settings.tokens == TOKENS
    assert named.keys() == expected.keys() and all(torch.equal(t, expected[n]) for n, t in named.items())
    assert torch.equal(prompts.flattened(named, settings, parts[0].config), whole)
    counts = [len(lora.parameters(part)) for part in parts]
    assert counts == ([1, 1, 1] if settings.kind == "prefix" else [1, 0, 0])
    assert {(part.virtual, part.ahead) for part in parts} == {(settings.virtual, TOKENS - settings.virtual)}


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_virtual_tokens_cross_once_and_a_prefix_never(name: str, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    path = tiny_models["llama"]
    exported(path, name, tmp_path)
    parts = adopted(path, name, tmp_path, (1, 2))
    ends, here = ends_of(parts)
    walked(ends, RAGGED)
    first, *others, last = here.sent
    length = 13 + SETTINGS[name].virtual
    assert shape_of(first) == (3, length, 32) and shape_of(first, "mask") == (3, length)
    assert [shape_of(packet) for packet in others] == [(3, 1, 32)] * (NEW - 1)
    assert all(set(packet.tensors) == {"hidden"} for packet in others) and not last.tensors
    past = Past(parts[1])
    past.extend(torch.zeros(3, length, 32))
    assert past.length == 13 + TOKENS, "of a prefix, the trunk has positions of its own"
    assert past.nbytes == 3 * (13 + TOKENS) * 2 * 2 * 8 * 4


@pytest.mark.parametrize(("family", "kept"), [("mistral", 13 + TOKENS), ("gemma2", WINDOW - 1)])
def test_a_prefix_keeps_windows_where_pefts_past_knows_them(
    family: str, kept: int, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    exported(tiny_models[family], "prefix", tmp_path)
    bottom, *_ = adopted(tiny_models[family], "prefix", tmp_path, (1, 2))
    past = Past(bottom)
    past.extend(torch.ones(1, 13, dtype=torch.long))
    assert [len(layer.keys[0, 0]) for layer in past._cache.layers] == [kept]  # type: ignore[union-attr]


def _step(hidden: Tensor, mask: Tensor | None = None) -> Packet:
    tensors = {"hidden": RAW.encode(hidden)} | ({} if mask is None else {"mask": RAW.encode(mask)})
    return Packet(StepKey(0, 0, 0, run="run", session="s"), tensors, training=False, incarnation="first")


def test_the_trunk_refuses_what_cannot_be_virtual_tokens(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Padding stands between them and the text; and a prefix takes positions."""
    path = tiny_models["gpt2"]
    sessions = {}
    for name in ("prompt", "prefix"):
        exported(path, name, tmp_path / name)
        sessions[name] = Here(adopted(path, name, tmp_path / name, (1, 2))[1]).sessions

    def refuses(those: Sessions, packet: Packet, words: str) -> None:
        with pytest.raises(SpoiledStep, match=words):
            those.serve(packet)
        assert len(those) == 0

    for mask in ([0, 1, 1, 1, 1], [1, 1, 0, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1]):
        hidden = torch.randn(1, len(mask), 32)
        refuses(sessions["prompt"], _step(hidden, torch.tensor([mask]).bool()), "padded on the left")
    refuses(sessions["prefix"], _step(torch.randn(1, 30, 32)), "beyond the model's 32 positions")
    for name, length in (("prompt", 32), ("prefix", 29)):
        served = sessions[name].serve(_step(torch.randn(1, length, 32)))
        assert shape_of(served) == (1, length, 32)


def test_texts_behind_virtual_tokens_are_written_one_at_a_time(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """In a batch, PEFT has padding between them and the text, which has positions: the text would depend on it."""
    path = tiny_models["gpt2"]
    for name in ("prompt", "prefix"):
        exported(path, name, tmp_path / name)
        ends, _ = ends_of(adopted(path, name, tmp_path / name, (1, 2)))
        together, alone = walked(ends, RAGGED)[1], walked(ends, RAGGED[1:2])[0]
        assert depends_on_neighbours(ends.bottom) == (name == "prompt")
        assert torch.allclose(together, alone, atol=1e-3) == (name == "prefix")


WORDS = ["ann wrote", "bob", "text number 3"]


def _asked(path: Path, **more: object) -> Namespace:
    asked = {"run": str(path), "prompt": WORDS, "prompts": "", "client": None, "chat": False, "max_new_tokens": 5}
    asked |= {"temperature": 0.0, "top_k": None, "top_p": None, "seed": None, "batch_size": 8, "kernels": "library"}
    return Namespace(**{**asked, "trunk_device": "", "model": "", **more})


def told(whole: Any, tokenizer: Any, texts: list[str], count: int, stops: list[int]) -> str:
    """What the command shows of texts that PEFT goes on with, one at a time."""
    found = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        words, pieces = Detokeniser(tokenizer, ids), [text]
        for token in generated(whole, [ids], count)[1][0].tolist():
            pieces.append(words.add(token))
            if token in stops:
                break
        found.append("".join([*pieces, words.end()]))
    return "\n\n".join(found) + "\n"


@pytest.mark.parametrize("name", [pytest.param("prompt", marks=pytest.mark.slow), "ptuning", "prefix"])
def test_a_finished_run_writes_and_is_measured_as_its_exported_adapter(
    name: str, finished_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command without its processes: trained, exported, and opened by PEFT."""
    path = finished_run("llama", prompt__kind=name, prompt__tokens=TOKENS, train__lr=0.1)
    run, said = open_run(path), []
    job = generation_job.check(_asked(path))
    parts = load_parts(run.config.model_path, run.config.bounds, KINDS, kernels="library")
    run_adapters.adopt(job.adapter.folder, job.config, *parts)
    ends, here = ends_of(parts)

    @contextlib.contextmanager
    def split(_: object) -> Iterator[tuple[ClientHalf, Any]]:
        yield ends, Namespace(status=lambda: Namespace(traffic=here.server.traffic))

    monkeypatch.setattr(generate, "_split", split)
    lines = generate.generate(job, said.append)
    tokenizer = load_tokenizer(run.config.model_path)
    whole = opened(Path(run.config.model), run.adapter().folder)
    assert "".join(said) == told(whole, tokenizer, WORDS, 5, job.stops)
    assert lines[1].split()[1] == str(sum(map(len, WORDS)))
    measured = evaluate(run)
    loss = sum(r.tuned.nats for r in measured) / sum(r.tuned.tokens for r in measured)
    assert loss == pytest.approx(run.summary["eval_loss"]["after"], abs=1e-5)


def test_positions_that_were_trained_are_not_the_texts(
    finished_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished_run("llama", prompt__kind="prefix", prompt__tokens=TOKENS, train__lr=0.1)
    taken = "32 positions, of which 3 are taken by what was trained"
    for more, words in (
        (
            ["--prompt", "x" * 29],
            f"prompt: number 1 (29 tokens) is not possible; allowed: up to 28 tokens, since the model has {taken}",
        ),
        (
            ["--prompt", "x" * 20, "--max-new-tokens", "10"],
            f"max_new_tokens: 10 is not possible; allowed: 1 to 9, with a prompt of 20 tokens and {taken}",
        ),
    ):
        assert generate.main(["--run", str(path), *more]) == 2
        assert capsys.readouterr().err == f"fedsplit: {words}\n"
    assert generation_job.check(_asked(path, prompt=["x" * 20], max_new_tokens=None)).most == 9


@pytest.mark.slow
def test_the_command_line_trains_a_prefix_and_writes_with_it(tmp_path: Path) -> None:
    """By `--peft`; what PEFT makes of the exported adapter is what was written."""
    argv = ["--peft", "prefix", "--prompt.tokens", "4", "--clients", "2", "--rounds", "1", "--train.steps", "2"]
    argv += ["--max-length", "32", "--batch-size", "2", "--eval.samples", "4", "--lr", "0.1", "--out", "run"]
    texts = ["My fellow Americans,", "The state of the Union"]
    write = [
        "--run",
        "run",
        "--prompt",
        texts[0],
        "--prompt",
        texts[1],
        "--max-new-tokens",
        "8",
        "--kernels",
        "library",
    ]

    def command(name: str, *flags: str) -> str:
        done = warm_command.command(f"fedsplit.{name}", *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    command("simulate", *argv)
    run = open_run(tmp_path / "run")
    assert run.config.prompt.kind == "prefix" and run.config.lora.method == "lora"
    written = command("generate", *write)
    tokenizer = load_tokenizer(run.config.model_path)
    whole = opened(run.config.model_path, run.adapter().folder)
    assert written == told(whole, tokenizer, texts, 8, end_tokens(run.config.model_path))
    results = evaluate(run)
    loss = sum(r.tuned.nats for r in results) / sum(r.tuned.tokens for r in results)
    assert loss == pytest.approx(
        json.loads((tmp_path / "run" / "summary.json").read_text())["eval_loss"]["after"], abs=1e-5
    )
