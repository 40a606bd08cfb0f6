"""Text that is generated through the split is the unsplit model's, with what every party remembers and without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BLOCKS, VOCABULARY
from split_models import NEW, Here, ends_of, parts_of, shape_of, walked, whole_of
from torch import Tensor

from fedsplit.generation.decoding import ClientHalf, DecodingSession, Throughput, decode, depends_on_neighbours, padded
from fedsplit.generation.sampling import Chooser, Sampling
from fedsplit.seeds import derive_seed
from fedsplit.wire.packets import StepKey

CUTS = [(0, 1), (1, 2), (2, BLOCKS)]
GREEDY = Sampling()


def _prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


RAGGED = _prompts(13, 6, 9)
"""Longer than a window of 5; the second outgrows Phi-3's 8 positions while it is written."""


def _library(whole: Any, prompts: list[list[int]], count: int = NEW, **how: Any) -> tuple[Tensor, Tensor]:
    """What the unsplit model generates: logits (B, count, V), and the new tokens (B, count)."""
    ids, mask = padded(prompts)
    mask = torch.ones_like(ids) if mask is None else mask.long()
    how = {"do_sample": False, **how}
    made = whole.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=count,
        output_logits=True,
        return_dict_in_generate=True,
        **how,
    )
    return torch.stack(made.logits, 1), made.sequences[:, ids.shape[1] :]


def _decode(
    ends: ClientHalf, prompts: list[list[int]], count: int = NEW, how: Sampling = GREEDY, **more: Any
) -> list[Any]:
    """The new tokens of each text."""
    numbers, stops = more.get("numbers", range(len(prompts))), more.get("stops", [])
    steps = decode(ends, prompts, count, stops, Chooser(how, numbers), more.get("pace", Throughput()))
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]


def test_every_step_is_the_unsplit_models_to_the_bit(any_model_path: Path) -> None:
    """Prompts of one length, ragged ones as a batch, and one alone, at several cuts."""
    whole = whole_of(any_model_path, parts_of(any_model_path, (1, 2)))
    cases = [RAGGED, RAGGED[1:2]]
    references = [_library(whole, prompts) for prompts in cases]
    for cut in CUTS:
        ends, here = ends_of(parts_of(any_model_path, cut))
        for prompts, (logits, tokens) in zip(cases, references, strict=True):
            found = walked(ends, prompts)
            assert torch.equal(found, logits), f"cut {cut}, {len(prompts)} prompts"
            assert torch.equal(found.argmax(-1), tokens)
        assert len(here.sessions) == 0


def test_what_is_remembered_changes_nothing(any_model_path: Path) -> None:
    """Against the parts on the whole text at every step, which remember nothing."""
    bottom, trunk, top = parts = parts_of(any_model_path, (1, 2), size=0.05)
    ends, _ = ends_of(parts)
    (text,) = prompts = RAGGED[:1]
    found = walked(ends, prompts)
    for step in range(NEW):
        ids = torch.tensor([text])
        with torch.no_grad():
            expected = top.logits(trunk(bottom(ids)))[:, -1]
        torch.testing.assert_close(found[:, step], expected, rtol=1e-3, atol=1e-4)
        assert torch.equal(found[:, step].argmax(-1), expected.argmax(-1))
        text = [*text, int(expected.argmax())]


def test_without_caches_the_text_is_the_same(model_path: Path) -> None:
    """For types of models whose keys and values cannot be kept: each token computes the whole text, in no session."""
    parts = parts_of(model_path, (1, 2), size=0.05)
    ends, _ = ends_of(parts)
    keys = []

    class Evaluating:
        def evaluate(self, hidden: Tensor, key: StepKey) -> Tensor:
            keys.append(key)
            return parts[1](hidden)

    plain = replace(ends, caches=False, link=Evaluating())
    prompts = RAGGED[:1]
    torch.testing.assert_close(walked(plain, prompts), walked(ends, prompts), rtol=1e-3, atol=1e-4)
    assert keys == [StepKey(0, 0, step) for step in range(NEW)]


def test_a_ragged_batch_is_each_text_alone(any_model_path: Path) -> None:
    ends, _ = ends_of(parts_of(any_model_path, (1, 2)))
    together = _decode(ends, RAGGED)
    alone = [_decode(ends, [prompt])[0] for prompt in RAGGED]
    if depends_on_neighbours(ends.bottom):
        assert ends.bottom.config.model_type == "phi3"  # which is therefore written one after the other
        assert together[0] == alone[0]
    else:
        assert together == alone
    assert all(len(text) == NEW for text in together)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_fused_kernels_and_narrow_types_are_close(family: str, tiny_models: dict[str, Path]) -> None:
    """Fused to rounding; in bfloat16 the library's code is the unsplit model's to the bit."""
    path = tiny_models[family]
    exact, fused = (
        walked(ends_of(parts_of(path, (1, 2), kernels=k, size=0.05))[0], RAGGED) for k in ("library", "fused")
    )
    torch.testing.assert_close(fused[:, 0], exact[:, 0], rtol=1e-3, atol=1e-4)
    narrow = parts_of(path, (1, 2), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = _library(whole_of(path, narrow, torch.bfloat16), RAGGED)
    assert torch.equal(walked(ends_of(narrow)[0], RAGGED).float(), logits.float())


def test_one_position_crosses_a_token_and_nothing_else(tiny_models: dict[str, Path]) -> None:
    ends, here = ends_of(parts_of(tiny_models["llama"], (1, 2)))
    pace = Throughput()
    _decode(ends, RAGGED, pace=pace)
    first, *others, last = here.sent
    assert shape_of(first) == (3, 13, 32) and shape_of(first, "mask") == (3, 13)
    assert [shape_of(p) for p in others] == [(3, 1, 32)] * (NEW - 1)
    assert all(set(packet.tensors) == {"hidden"} for packet in others) and not last.tensors
    assert [packet.key.step for packet in here.sent] == list(range(NEW + 1))
    traffic, position = here.server.traffic, 32 * 4
    assert traffic.token.up == traffic.token.down == 3 * (NEW - 1) * position
    assert traffic.prompt.down == 3 * 13 * position and traffic.prompt.up == 3 * 13 * (position + 1)
    assert (pace.read, pace.written, pace.passes, pace.texts) == (28, 3 * (NEW - 1), NEW - 1, 3)
    assert pace.read_seconds > 0 and pace.written_seconds > 0


def test_a_text_that_outgrows_its_positions_is_computed_anew_once(tiny_models: dict[str, Path]) -> None:
    """As the library does for Phi-3, whose positions are turned otherwise from the ninth on."""
    ends, here = ends_of(parts_of(tiny_models["phi3"], (1, 2)))
    _decode(ends, RAGGED[1:2])
    lengths = [shape_of(packet)[1] for packet in here.sent if packet.tensors]
    assert lengths == [6, 1, 1, 9, *[1] * (NEW - 4)]
    assert len({packet.key.session for packet in here.sent}) == 2 and len(here.sessions) == 0


def test_drawn_tokens_are_the_librarys(tiny_models: dict[str, Path]) -> None:
    """Each text under the seed that its number gives it, whatever is written beside it."""
    path = tiny_models["gpt2"]
    parts = parts_of(path, (1, 2))
    (ends, _), whole = ends_of(parts), whole_of(path, parts)
    how = Sampling(temperature=2.5, top_k=20, top_p=0.9, seed=5)
    together = _decode(ends, RAGGED, how=how)
    for number, prompt in enumerate(RAGGED):
        torch.manual_seed(derive_seed(5, "prompt", number))
        _, expected = _library(whole, [prompt], do_sample=True, temperature=2.5, top_k=20, top_p=0.9)
        assert together[number] == expected[0].tolist()
        assert _decode(ends, [prompt], how=how, numbers=[number])[0] == together[number]
    assert together != _decode(ends, RAGGED, how=Sampling(2.5, 20, 0.9, seed=6))


def test_a_text_ends_at_its_end_token_as_in_the_library(tiny_models: dict[str, Path]) -> None:
    path = tiny_models["llama"]
    parts = parts_of(path, (1, 2))
    (ends, here), whole = ends_of(parts), whole_of(path, parts)
    free = _decode(ends, RAGGED)
    stop = next(token for token in free[1][2:6] if token not in free[0] + free[2])
    _, expected = _library(whole, RAGGED, eos_token_id=stop, pad_token_id=stop)
    found = _decode(ends, RAGGED, stops=[stop, 10**6])
    assert found[1] == free[1][: free[1].index(stop) + 1] and len(found[0]) == NEW
    for mine, theirs in zip(found, expected.tolist(), strict=True):
        assert mine == theirs[: len(mine)] and set(theirs[len(mine) :]) <= {stop}
    here.sent.clear()
    assert _decode(ends, RAGGED[1:2], stops=[stop])[0] == found[1]
    assert len(here.sent) == len(found[1]) + 1, "what has ended is not computed"


def test_a_session_ends_with_its_text_however_that_ends(tiny_models: dict[str, Path]) -> None:
    ends, here = ends_of(parts_of(tiny_models["gpt2"], (1, 2)))
    steps = decode(ends, RAGGED, NEW, [], Chooser(GREEDY, range(3)), Throughput())
    next(steps)
    assert len(here.sessions) == 1
    steps.close()
    assert len(here.sessions) == 0
    with pytest.raises(ZeroDivisionError), DecodingSession(ends) as walk:
        walk.step(torch.tensor([RAGGED[0]]))
        raise ZeroDivisionError
    assert len(here.sessions) == 1, "the trunk is not asked again where something broke; a lease frees the session"
    with DecodingSession(ends):
        pass


def test_prompts_are_padded_on_the_left() -> None:
    ids, mask = padded([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask is not None and mask.tolist() == [[True, True, True], [False, False, True]]
    assert padded([[1, 2], [3, 4]])[1] is None


def test_a_client_speaks_to_the_trunk_of_its_own_run(tiny_models: dict[str, Path]) -> None:
    ends, here = ends_of(parts_of(tiny_models["gpt2"], (1, 2)))
    assert isinstance(here, Here)
    _decode(ends, RAGGED, 2)
    assert {(packet.key.run, packet.incarnation, packet.training) for packet in here.sent} == {("run", "first", False)}
