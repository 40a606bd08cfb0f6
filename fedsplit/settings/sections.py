"""Sections of the settings: `--lora.…`, `--prompt.…`, `--train.…`, `--checkpoint.…`, `--data.…` and so on."""

from __future__ import annotations

from dataclasses import dataclass

from fedsplit.settings.choices import (
    CODECS,
    ENCODERS,
    FORMATS,
    OPTIMIZER_STATES,
    OPTIMIZERS,
    ORDERS,
    PACKING,
    PROMPTS,
    RATES,
    SCHEDULES,
    STARTS,
)
from fedsplit.settings.fields import setting
from fedsplit.settings.parsing import parse_memory
from fedsplit.settings.validators import (
    ANYTHING,
    FIELDS,
    MEMORY,
    MOST,
    MOST_AT_ONCE,
    NAMES,
    OWN_DEVICE,
    RANKS,
    TEXT,
    WARMUP,
    YES_OR_NO,
    Validator,
    above,
    at_least,
    below,
    one_of,
)


@dataclass(frozen=True)
class LoraSettings:
    """The adapters on all three parts."""

    rank: tuple[int, ...] = setting(
        (8,),
        RANKS,
        "rank r of every adapter; of several, or of a file of them, clients take one each in turn",
        "--lora-rank",
    )
    alpha: float = setting(16.0, above(0), "adapters are scaled by alpha / rank", "--lora-alpha")
    rslora: bool = setting(False, YES_OR_NO, "scale by alpha / sqrt(rank) instead (2312.03732)")
    dropout: float = setting(0.1, below(0, 1), "dropout on the input of every adapter")
    targets: tuple[str, ...] = setting(
        (), NAMES, "projections that get an adapter (default: all of the model's family)", "--lora-target-modules"
    )
    method: str = setting(
        "lora",
        TEXT,
        "kind of adapter, by PEFT's name for it; docs/adapters.md lists them; prompt, ptuning and prefix set "
        "--prompt.kind",
        "--peft",
    )
    options: str = setting(
        "", FIELDS, "further fields of PEFT's configuration for this kind of adapter, by name", "--peft-config"
    )

    @property
    def top_rank(self) -> int:
        """The largest rank of any client; that of a trunk which all share."""
        return max(self.rank)

    def rank_of(self, client: int) -> int:
        """A client's rank."""
        return self.rank[client % len(self.rank)]


@dataclass(frozen=True)
class PromptSettings:
    """Virtual tokens or prefixes in place of LoRA; the base weights of all three parts stay frozen."""

    kind: str = setting(
        "off",
        one_of(PROMPTS),
        "prompt (2104.08691) and ptuning (2103.10385) put virtual tokens before the text, at the client; prefix "
        "(2101.00190) gives past keys and values to the attention of each part",
    )
    tokens: int = setting(
        8, at_least(1, 4096), "number of virtual tokens; text and virtual tokens must fit into the model's positions"
    )
    init: str = setting(
        "random",
        one_of(STARTS),
        "start of the virtual tokens; prompt: random, vocab (tokens of the vocabulary), text; prefix: random, zero",
    )
    text: str = setting(
        "",
        Validator("a text", lambda v: True),
        "prompt with init text: the text, which is repeated or cut to the number of virtual tokens",
    )
    encoder: str = setting("mlp", one_of(ENCODERS), "ptuning: network that produces the virtual tokens")
    hidden: int = setting(
        0,
        at_least(0, MOST_AT_ONCE),
        "ptuning, and prefix with projection: width of the network; 0: width of the virtual tokens",
    )
    layers: int = setting(2, at_least(1, 64), "ptuning with encoder lstm: number of layers")
    dropout: float = setting(0.0, below(0, 1), "ptuning with encoder lstm: dropout between the layers")
    projection: bool = setting(
        False, YES_OR_NO, "prefix: each part trains an embedding and an MLP, which produce its past keys and values"
    )

    @property
    def virtual(self) -> int:
        """Positions that cross before those of the text."""
        return self.tokens if self.kind in ("prompt", "ptuning") else 0

    @property
    def positions(self) -> int:
        """Positions of the model that are not the text's."""
        return 0 if self.kind == "off" else self.tokens


@dataclass(frozen=True)
class TrainSettings:
    """Local training; for the length of the run see --rounds and --patience."""

    steps: int = setting(10, at_least(1, MOST), "local steps a round; ignored if epochs is set")
    epochs: int = setting(
        0, at_least(0, MOST), "local passes over the client's data a round; 0: train for a number of steps", "--epochs"
    )
    batch_size: int = setting(4, at_least(1, MOST_AT_ONCE), "sequences a step", "--batch-size")
    max_length: int = setting(128, at_least(8, MOST), "tokens a sequence", "--max-length")
    samples: int = setting(0, at_least(0, MOST), "training sequences a client at most; 0: all", "--samples")
    micro_batches: int = setting(
        0,
        at_least(0, MOST_AT_ONCE),
        "parts of a batch that are under way at once, so that client and trunk work at the same time; "
        "0: chosen by the plan",
        "--micro-batches",
    )
    accumulation: int = setting(
        1, at_least(1, MOST_AT_ONCE), "batches a step; their gradients are summed as those of one large batch"
    )
    clip: float = setting(
        0.0, at_least(0), "largest norm of a step's gradient, over the adapters of all parts; 0: no clipping"
    )
    optimizer: str = setting(
        "adamw", one_of(OPTIMIZERS), "optimiser of clients and trunk; adamw8bit is AdamW of bitsandbytes"
    )
    lr: float = setting(1e-3, above(0), "learning rate of clients and trunk", "--lr")
    weight_decay: float = setting(0.0, at_least(0), "weight decay")
    momentum: float = setting(0.0, below(0, 1), "sgd: momentum")
    beta1: float = setting(0.9, below(0, 1), "adamw, adamw8bit: decay of the mean gradient")
    beta2: float = setting(0.999, below(0, 1), "adamw, adamw8bit: decay of the mean squared gradient")
    eps: float = setting(1e-8, above(0), "adamw, adamw8bit: added to the root of the mean squared gradient")
    optimizer_state: str = setting(
        "reset",
        one_of(OPTIMIZER_STATES),
        "state of a client's optimiser; reset: a new state every round; keep: the state after the client's last round",
    )
    schedule: str = setting("constant", one_of(RATES), "schedule of the learning rate over the steps of all rounds")
    warmup: float = setting(
        0.0,
        WARMUP,
        "steps over which the learning rate rises from 0: a number of steps, or below 1 a share of all steps",
    )


@dataclass(frozen=True)
class CheckpointSettings:
    """Checkpoints, from which --resume goes on."""

    every: int = setting(
        1,
        at_least(1, MOST),
        "rounds from one checkpoint to the next; the last round has one, and under --keep-best every best round so far",
        "--checkpoint-every",
    )
    keep: int = setting(
        2,
        at_least(0, MOST),
        "number of newest checkpoints to keep, beside the one with the lowest held-out loss; 0: all",
        "--keep-checkpoints",
    )


@dataclass(frozen=True)
class DataSettings:
    """Where a data set has its texts, their owners, and the part to predict."""

    format: str = setting(
        "auto", one_of(FORMATS), "kind of rows; auto: text if there is a column of that name, else chat or completion"
    )
    config: str = setting("", ANYTHING, "configuration, for a data set that has several, such as wikitext-2-raw-v1")
    split: str = setting("train", TEXT, "split, for a data set that has several, such as train or train[:10%]")
    held_out: str = setting(
        "", ANYTHING, "held-out texts: another split, a file or a folder (default: a part of each client's own texts)"
    )
    text: str = setting("text", TEXT, "column with the text")
    owner: str = setting("owner", TEXT, "column with the owner of a row")
    prompt: str = setting("prompt", TEXT, "column with the prompt, of which nothing is predicted")
    completion: str = setting("completion", TEXT, "column with the completion, which is predicted after the prompt")
    messages: str = setting("messages", TEXT, "column with chats: lists of messages with role and content")
    label: str = setting("label", TEXT, "column with the class of a text, for the format classification")
    packing: str = setting(
        "auto",
        one_of(PACKING),
        "true: several texts share a sequence; false: a text is a sequence, padded or cut; auto: true for the format "
        "text alone",
    )
    show: bool = setting(False, YES_OR_NO, "print the clients' shares of the data before the run")


@dataclass(frozen=True)
class EvalSettings:
    """Evaluation on held-out text."""

    samples: int = setting(32, at_least(1, MOST), "held-out sequences a client at most")
    after: int = setting(
        8,
        at_least(0, MOST),
        "of these, sequences that are also measured right after the client's own steps, to report what it forgets",
    )


@dataclass(frozen=True)
class TrunkSettings:
    """The shared middle of the model."""

    schedule: str = setting(
        "shared", one_of(SCHEDULES), "how clients share the trunk's adapter; docs/trunk.md explains each"
    )
    order: str = setting(
        "random", one_of(ORDERS), "order in which clients begin a round; random: drawn from the seed; cyclic: by number"
    )
    every: int = setting(
        0, at_least(0, MOST), "accumulate: steps of a client between two barriers; 0: all steps of the round"
    )
    deadline: float = setting(30.0, above(0), "batched, accumulate: seconds that clients wait for one that is late")
    group: int = setting(1, at_least(1, MOST_AT_ONCE), "with --deterministic: number of clients that train at once")
    memory: str = setting(
        "", MEMORY, "largest resident memory of the trunk's process, such as 800MB (default: no limit)"
    )
    lease: float = setting(600.0, above(0), "seconds for which the trunk keeps a forward whose gradient has not come")
    threads: int = setting(
        0, at_least(0, MOST_AT_ONCE), "threads with which each of the trunk's lanes computes; 0: chosen by the plan"
    )
    lanes: int = setting(
        0,
        at_least(0, 2),
        "2: the trunk computes a forward and a backward at the same time; 1: one after the other; "
        "0: chosen by the plan",
    )
    device: str = setting("", OWN_DEVICE, "device of the trunk (default: that of --device)")

    @property
    def memory_bytes(self) -> int | None:
        """The budget in bytes; None where there is none."""
        return parse_memory(self.memory) if self.memory else None


@dataclass(frozen=True)
class WireSettings:
    """How tensors cross between client and trunk."""

    codec: str = setting(
        "raw", one_of(CODECS), "encoding of hidden states and gradients; raw is exact; bf16 halves the bytes"
    )
