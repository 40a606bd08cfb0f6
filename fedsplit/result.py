"""The result of a finished run, for Python: losses as a table and as a picture, the model, the summary."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fedsplit.formatting import perplexity
from fedsplit.results.finished import Run
from fedsplit.settings.choices import PAIRS
from fedsplit.settings.config import Config

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

ALL = "all"
"""Name of the row, in the table of losses, for the loss over all clients."""

SPLITS = {"train": "train", "evaluate": "held_out"}
"""Name of the split in the table of losses, by the event that reports the loss."""

COLUMNS = ("round", "client", "split", "loss", "perplexity", "accuracy", "tokens", "elapsed")
"""Columns of the table of losses."""


class Result:
    """A finished run. `fedsplit.run` and `fedsplit.open` return it.

    Attributes:
        folder: Folder of the run.
        config: Settings of the run.
        summary: Content of `summary.json`.
    """

    def __init__(self, run: Run) -> None:
        """Wraps a finished run."""
        self._run = run
        self.folder = run.path
        self.config: Config = run.config
        self.summary: dict[str, Any] = dict(run.summary)

    def __repr__(self) -> str:
        loss = self.summary["eval_loss"]
        return f"<Result of {self.folder}: held-out loss {loss['before']:.4f} -> {loss['after']:.4f}>"

    @property
    def losses(self) -> pandas.DataFrame:
        """Losses of `metrics.jsonl` as a table, one row for each round, client and split.

        The client `all` stands for the loss over all clients. Columns:

        - `round`: 0 is before training.
        - `client`: Name of the client.
        - `split`: "train" or "held_out".
        - `loss`: Mean loss in nats a token; under classification, in nats a text; of pairs, the objective's.
        - `perplexity`: exp(loss) of predicted tokens; missing under classification, of pairs, and for a mixture of
          experts, whose loss has further terms.
        - `accuracy`: Share of texts with the right class, in rows of `all` under classification.
        - `tokens`: Number of tokens behind the loss, in rows of `all`.
        - `elapsed`: Seconds since the run began.
        """
        import pandas

        table = pandas.DataFrame(list(self._rows()), columns=list(COLUMNS))
        # Without this, a column of missing values alone would have the type of objects.
        return table.astype({"perplexity": "float64", "accuracy": "float64", "tokens": "Int64"})

    def _rows(self) -> Iterator[dict[str, Any]]:
        """Yields the rows of `losses`."""
        text = (self.folder / "metrics.jsonl").read_text(encoding="utf-8")
        for line in text.splitlines():
            event = json.loads(line)
            # In a round in which nobody trained there is no loss.
            if event["event"] in SPLITS and event["loss"] is not None:
                yield from self._rows_of(event)

    def _rows_of(self, event: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yields the rows of an event: a row over all clients, and a row for each client."""
        is_of_tokens = self.config.data.format not in ("classification", PAIRS)
        has_perplexity = is_of_tokens and "router_aux_loss" not in event

        def row(client: str, loss: float) -> dict[str, Any]:
            return {
                "round": event["round"],
                "client": client,
                "split": SPLITS[event["event"]],
                "loss": loss,
                "perplexity": perplexity(loss) if has_perplexity else None,
                "elapsed": event["elapsed"],
            }

        of_all = row(ALL, event["loss"])
        yield {**of_all, "tokens": event["tokens"], "accuracy": event.get("accuracy")}
        for client, loss in event["clients"].items():
            name = f"{client} (client)" if client == ALL else client  # a client may be called as the row of all clients
            yield row(name, loss)

    def plot(self) -> Figure:
        """Draws the losses of all rounds: a thin line for each client, thick lines for all clients together.

        Returns:
            A matplotlib figure. `figure.savefig("losses.png")` writes the figure to a file.
        """
        from matplotlib import pyplot

        losses = self.losses
        figure, axes = pyplot.subplots(layout="constrained")
        held_out = losses[losses.split == "held_out"]
        for _, rows in held_out[held_out.client != ALL].groupby("client", sort=False):
            axes.plot(rows["round"], rows["loss"], color="C0", alpha=0.25, linewidth=1)
        for split, colour in (("held_out", "C0"), ("train", "C1")):
            rows = losses[(losses.split == split) & (losses.client == ALL)]
            label = split.replace("_", "-")
            axes.plot(rows["round"], rows["loss"], color=colour, marker="o", label=label)
        axes.set_xlabel("round")
        axes.set_ylabel("loss (nats)")
        axes.set_title(f"{self._run.name}: {self.config.strategy}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
        pyplot.close(figure)  # a notebook shows open figures, and would show this one twice
        return figure

    def model(self, client: int | None = None) -> PeftModel:
        """Opens the unsplit model with the run's adapter.

        Args:
            client: Number of a client, for the client's personal adapter; None for the adapter that all clients share.

        Returns:
            A `peft.PeftModel` on the CPU, in evaluation mode, with base weights as in the run.

        Raises:
            InputError: The client has no personal adapter, or the base model does not exist any more.
        """
        from fedsplit.results.whole import attach, open_held

        adapter = self._run.adapter(client)
        base = open_held(adapter, classes=len(adapter.classes), seed=self.config.seed)
        return attach(base, adapter)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Opens the tokenizer of the run's model.

        Raises:
            InputError: The base model does not exist any more.
        """
        from fedsplit.model.sources import config_folder
        from fedsplit.model.vocabulary import load_tokenizer

        return load_tokenizer(config_folder(self.config.model))
