"""A short text of a finished run's model, and of its base model, from the same beginning."""

from __future__ import annotations

from pathlib import Path

import torch

from fedsplit.results.finished import open_run
from fedsplit.results.whole import attach, open_held


def sample(folder: Path, prompt: str, tokens: int) -> tuple[str, str]:
    """Writes on after a prompt, with the base model and with the run's adapter.

    Each token is the most probable one, so that the same call gives the same texts.

    Args:
        folder: Folder of a finished run, whose clients share an adapter.
        prompt: Beginning of both texts.
        tokens: Number of tokens to write.

    Returns:
        The text of the base model, and the text of the run's model, both with the prompt.

    Raises:
        InputError: The run did not end, or its adapter does not fit the model.
    """
    from fedsplit.model.vocabulary import load_tokenizer

    run = open_run(folder)
    adapter = run.adapter()
    tokenizer = load_tokenizer(adapter.about_path)
    base = open_held(adapter, seed=run.config.seed)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    longest = getattr(base.config, "max_position_embeddings", None)
    if longest:
        tokens = max(1, min(tokens, longest - ids.shape[1]))

    def write(model: torch.nn.Module) -> str:
        # One text needs no padding, and any padding token keeps the library from asking for one.
        ends = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)  # type: ignore[operator]
        text: str = tokenizer.decode(ends[0], skip_special_tokens=True)
        return text

    before = write(base)  # first, since `attach` changes the base in place
    return before, write(attach(base, adapter))
