"""What a finished run left, for Python: losses as a table and as a picture, the model, the summary."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fedsplit.errors import InputError
from fedsplit.report import perplexity
from fedsplit.results.finished import Run
from fedsplit.settings.config import Config

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

ALL = "all"
"""Name under which the table of losses has the loss over all clients."""

SPLITS = {"train": "train", "evaluate": "held_out"}
"""Name of a split in the table of losses, by the event that tells its loss."""

COLUMNS = ("round", "client", "split", "loss", "perplexity", "accuracy", "tokens", "elapsed")
"""Columns of the table of losses."""


class Result:
    """A run that came to its end.

    Attributes:
        folder: Folder of the run.
        config: Settings of the run.
        summary: Content of `summary.json`.
    """

    def __init__(self, run: Run) -> None:
        """Wraps a run; `fedsplit.open` makes one from a folder."""
        self._run = run
        self.folder = run.path
        self.config: Config = run.config
        self.summary: dict[str, Any] = dict(run.summary)

    def __repr__(self) -> str:
        loss = self.summary["eval_loss"]
        return f"<Result of {self.folder}: held-out loss {loss['before']:.4f} -> {loss['after']:.4f}>"

    @property
    def losses(self) -> pandas.DataFrame:
        """Losses by round, client and split, as `metrics.jsonl` has them.

        The client `all` stands for the loss over all clients. Columns:

        - `round`: 0 is before training.
        - `client`: Name of the client.
        - `split`: "train" or "held_out".
        - `loss`: Mean loss in nats a token, or a text where texts are sorted into classes.
        - `perplexity`: exp(loss) where tokens are predicted; missing where the loss has other terms.
        - `accuracy`: Share of texts whose class was found; for `all` under classification.
        - `tokens`: Tokens that the loss is of; for `all`.
        - `elapsed`: Seconds since the run began.
        """
        import pandas

        table = pandas.DataFrame(list(self._rows()), columns=list(COLUMNS))
        return table.astype({"perplexity": "float64", "accuracy": "float64", "tokens": "Int64"})

    def _rows(self) -> Iterator[dict[str, Any]]:
        """Yields the rows of `losses`."""
        text = (self.folder / "metrics.jsonl").read_text(encoding="utf-8")
        for line in text.splitlines():
            event = json.loads(line)
            if event["event"] in SPLITS and event["loss"] is not None:
                yield from self._rows_of(event)

    def _rows_of(self, event: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yields the rows of an event: one over all clients, and one for each client."""
        is_plain = self.config.data.format != "classification" and "router_aux_loss" not in event

        def row(client: str, loss: float, **more: Any) -> dict[str, Any]:
            shared = {"round": event["round"], "split": SPLITS[event["event"]], "elapsed": event["elapsed"]}
            measured = {"loss": loss, "perplexity": perplexity(loss) if is_plain else None}
            return {**shared, **measured, "client": client, **more}

        yield row(ALL, event["loss"], tokens=event["tokens"], accuracy=event.get("accuracy"))
        for client, loss in event["clients"].items():
            name = f"{client} (client)" if client == ALL else client
            yield row(name, loss)

    def plot(self) -> Figure:
        """Draws the losses of all rounds: held-out of each client, and of all together with the training loss.

        Returns:
            A matplotlib figure. `figure.savefig("losses.png")` writes it.

        Raises:
            InputError: matplotlib is not installed.
        """
        try:
            from matplotlib import pyplot
        except ImportError:
            raise InputError("plot: matplotlib is not installed; 'pip install fedsplit[plots]' brings it") from None

        losses = self.losses
        figure, axes = pyplot.subplots(layout="constrained")
        held_out = losses[losses.split == "held_out"]
        for _, rows in held_out[held_out.client != ALL].groupby("client", sort=False):
            axes.plot(rows["round"], rows["loss"], color="C0", alpha=0.25, linewidth=1)
        for split, colour in (("held_out", "C0"), ("train", "C1")):
            rows = losses[(losses.split == split) & (losses.client == ALL)]
            axes.plot(rows["round"], rows["loss"], color=colour, marker="o", label=split.replace("_", "-"))
        axes.set_xlabel("round")
        axes.set_ylabel("loss (nats)")
        axes.set_title(f"{self._run.name}: {self.config.strategy}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
        pyplot.close(figure)  # or a notebook would show it twice: as what a cell returns, and as an open figure
        return figure

    def model(self, client: int | None = None) -> Any:
        """Opens the unsplit model with the run's adapter.

        Args:
            client: Number of the client whose own adapter it is to be; None for the adapter that all share.

        Returns:
            A `peft.PeftModel` on the CPU, in evaluation mode, with base weights as the run held them.

        Raises:
            InputError: The client has no adapter of its own, or the base model is not there any more.
        """
        from fedsplit.results.whole import attach, open_held

        adapter = self._run.adapter(client)
        base = open_held(adapter, classes=len(adapter.classes), seed=self.config.seed)
        return attach(base, adapter)

    def tokenizer(self) -> Any:
        """Opens the tokenizer of the run's model.

        Raises:
            InputError: The base model is not there any more.
        """
        from fedsplit.model.sources import config_folder
        from fedsplit.model.vocabulary import load_tokenizer

        return load_tokenizer(config_folder(self.config.model))
