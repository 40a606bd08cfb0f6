"""Pretrains the bundled base model on the addresses before 1946.

    python experiments/base_model/train.py --out fedsplit/base

Writes the tokenizer and the model (fp16 safetensors); and, beside this file, `curve.csv` (step, tokens,
losses) and `result.json` (what was read, what was kept out, the losses reached).
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
import tomllib
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from fedsplit.corpora.corpus import Document, pack, sotu

HERE = Path(__file__).parent
END = "<|endoftext|>"


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE, so that every text has an encoding; id 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=256
    )


def split_documents(documents: list[Document], every: int) -> tuple[list[Document], list[Document]]:
    """Keeps every n-th address, by date, for validation."""
    held_out = documents[every // 2 :: every]
    return [d for d in documents if d not in held_out], held_out


class Batches:
    """Random windows of the training stream: each pass over it starts at another offset."""

    def __init__(self, stream: torch.Tensor, length: int, batch_size: int, seed: int) -> None:
        self._stream, self._length, self._batch_size = stream, length, batch_size
        self._rng = torch.Generator().manual_seed(seed)
        self._starts = torch.empty(0, dtype=torch.long)

    def __next__(self) -> torch.Tensor:
        if len(self._starts) < self._batch_size:
            offset = int(torch.randint(self._length, (1,), generator=self._rng))
            starts = torch.arange(offset, len(self._stream) - self._length, self._length)
            self._starts = starts[torch.randperm(len(starts), generator=self._rng)]
        batch, self._starts = self._starts[: self._batch_size], self._starts[self._batch_size :]
        return torch.stack([self._stream[s : s + self._length] for s in batch])


def optimizers(model: GPT2LMHeadModel, settings: dict[str, Any]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings, norms and biases."""
    matrices = [p for n, p in model.named_parameters() if ".h." in n and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=settings["muon_lr"], momentum=0.95, weight_decay=settings["weight_decay"]),
        torch.optim.AdamW(rest, lr=settings["lr"], betas=(0.9, 0.95), weight_decay=0.0),
    ]


def schedule(step: int, steps: int, warmup: int, final: float) -> float:
    """Linear warm-up, then cosine to `final` of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def validation_loss(model: GPT2LMHeadModel, blocks: torch.Tensor) -> float:
    """Mean cross-entropy (nats a token) over the held-out blocks, fp32."""
    model.eval()
    losses = [model(input_ids=b, labels=b).loss.item() * len(b) for b in blocks.split(32)]
    model.train()
    return sum(losses) / len(blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where model and tokenizer go")
    parser.add_argument("--record", type=Path, default=HERE, help="where curve.csv and result.json go")
    parser.add_argument("--steps", type=int, help="optimiser steps, in place of the configuration's")
    parser.add_argument("--config", type=Path, default=HERE / "config.toml")
    parser.add_argument("--evaluate-every", type=int, default=250)
    parser.add_argument("--validate", type=int, help="held-out blocks to validate on; all by default")
    args = parser.parse_args()
    config = tomllib.loads(args.config.read_text())
    config["train"]["steps"] = steps = args.steps or config["train"]["steps"]
    settings, length = config["train"], config["model"]["n_positions"]
    torch.manual_seed(config["seed"])

    train_docs, held_out_docs = split_documents(sotu(last_year=config["last_year"]), config["held_out_every"])
    tokenizer = train_tokenizer([d.text for d in train_docs], config["tokenizer"]["vocab_size"])
    train_ids, held_out_ids = (
        tokenizer([document.text for document in documents], verbose=False)["input_ids"]
        for documents in (train_docs, held_out_docs)
    )
    stream = torch.tensor([t for ids in train_ids for t in (*ids, 0)])
    held_out = torch.tensor(pack(held_out_ids, length, 0))[: args.validate]
    held_out_bytes = sum(len(d.text.encode()) for d in held_out_docs)
    bits_a_byte = sum(map(len, held_out_ids)) / held_out_bytes / math.log(2)
    batches = Batches(stream, length, settings["batch_size"], config["seed"])

    model = GPT2LMHeadModel(
        GPT2Config(
            **config["model"],
            vocab_size=len(tokenizer),
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    parts = optimizers(model, settings)
    scheduler = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda s: schedule(s, steps, settings["warmup"], settings["final_lr"]))
        for o in parts
    ]
    print(f"{len(stream):,} training tokens, {held_out.numel():,} held out, {model.num_parameters():,} parameters")

    args.out.mkdir(parents=True, exist_ok=True)
    start, recent = time.perf_counter(), []
    with open(args.record / "curve.csv", "w", newline="") as file:
        curve = csv.writer(file)
        curve.writerow(["step", "tokens", "train_loss", "validation_loss", "seconds"])
        for step in range(1, steps + 1):
            ids = next(batches)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, rate in zip(parts, scheduler, strict=True):
                optimizer.step()
                rate.step()
                optimizer.zero_grad()
            recent.append(loss.item())
            if step % args.evaluate_every == 0 or step == steps:
                reached = validation_loss(model, held_out)
                seconds = time.perf_counter() - start
                row = [step, step * ids.numel(), f"{sum(recent) / len(recent):.4f}", f"{reached:.4f}", f"{seconds:.0f}"]
                curve.writerow(row)
                file.flush()
                print(*row, flush=True)
                recent.clear()

    half = model.half()
    half.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    reloaded = GPT2LMHeadModel.from_pretrained(args.out, dtype=torch.float32)
    shipped = validation_loss(reloaded, held_out)
    result = {
        "config": config,
        "parameters": model.num_parameters(),
        "training_tokens": len(stream),
        "epochs": round(steps * settings["batch_size"] * length / len(stream), 2),
        "validation_loss": round(shipped, 4),
        "validation_bits_per_byte": round(shipped * bits_a_byte, 4),
        "seconds": round(time.perf_counter() - start),
        "torch": torch.__version__,
        "trained_on": [d.name for d in train_docs],
        "validated_on": [d.name for d in held_out_docs],
    }
    (args.record / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"validation loss {shipped:.4f}, {shipped * bits_a_byte:.4f} bits a byte")


if __name__ == "__main__":
    main()
