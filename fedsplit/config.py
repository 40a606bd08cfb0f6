"""Every setting of a run: a frozen configuration.

The dataclasses below are the only list of settings there is: flags, TOML keys, help texts
and checks are all read off their fields. Precedence: default < `--config file.toml` < flag.
"""

from __future__ import annotations

import dataclasses
import numbers
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from fedsplit.allowed import (
    ANYTHING,
    CODECS,
    COEFFICIENT,
    CUT,
    DEVICE,
    DTYPES,
    ENCODERS,
    ENGINES,
    FIELDS,
    FORMATS,
    HEADS,
    KERNELS,
    MEMORY,
    MOST,
    MOST_AT_ONCE,
    NAMES,
    OPTIMIZER_STATES,
    OPTIMIZERS,
    ORDERS,
    OWN_DEVICE,
    PACKING,
    PARTITION,
    PARTS,
    PROMPTS,
    QUANTIZATION,
    RANKS,
    RATES,
    SCHEDULES,
    SHARES,
    STARTS,
    TEXT,
    WARMUP,
    WEIGHTS,
    YES_OR_NO,
    Allowed,
    SettingError,
    above,
    at_least,
    below,
    one_of,
    parse_cut,
    parse_memory,
    parse_quantization,
)

DEFAULT_MODEL = "sotu-gpt2"
"""The name of the base model that ships with the package."""


BUNDLED_MODEL = Path(__file__).parent / "base"
"""The folder of the base model that ships with the package."""


def setting(default: Any, allowed: Allowed, help: str, alias: str = "") -> Any:
    """A field with its default, its check, its help text and the name people know from elsewhere."""
    return field(default=default, metadata={"allowed": allowed, "help": help, "alias": alias})


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
        Allowed("a text", lambda v: True),
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


@dataclass(frozen=True)
class Config:
    """A whole run."""

    clients: int = setting(8, at_least(1, MOST), "clients in the federation")
    rounds: int = setting(5, at_least(1, MOST), "rounds of training and aggregation")
    seed: int = setting(
        0, at_least(0, 2**32 - 1), "seed of the data's order, of dropout, and of the adapters at the start"
    )
    model: str = setting(
        DEFAULT_MODEL,
        TEXT,
        "sotu-gpt2, smollm2, a folder with config.json and safetensors, a .gguf file, or the Hub's org/name[@revision]",
    )
    init_adapter: str = setting(
        "",
        Allowed("a folder", lambda v: True),
        "start from the PEFT adapter of the unsplit model in this folder; another rank is cut or filled with zeros",
    )
    cut: str = setting(
        "1:5", CUT, "the trunk is blocks LO to HI - 1, from 0 to the number of blocks; bottom and top are the rest"
    )
    dataset: str = setting(
        "sotu",
        TEXT,
        "sotu, synthetic, a Hub id, a .txt, .jsonl, .json, .csv or .parquet file, or a folder of such files or of "
        "save_to_disk",
    )
    partition: str = setting(
        "auto",
        PARTITION,
        "how data are dealt to clients; auto: by owner, such as a president, or iid if there are too few owners",
    )
    strategy: str = setting(
        "fedavg",
        TEXT,
        "aggregation of the clients' adapters: a name, path/to/mine.py:Mine, or flwr.serverapp.strategy:FedAdam",
    )
    patience: int = setting(
        0,
        at_least(0, MOST),
        "rounds in a row without an improvement of the held-out loss after which the run stops; 0: no early stopping",
    )
    min_delta: float = setting(
        0.0,
        at_least(0),
        "patience: the held-out loss must fall by more than this, in nats a token, to count as an improvement",
    )
    keep_best: bool = setting(False, YES_OR_NO, "leave the adapter of the best round, not of the last")
    fraction: float = setting(
        1.0,
        Allowed("a number above 0, up to 1", lambda v: 0 < v <= 1),
        "share of the clients that train in a round; the seed decides which",
    )
    weights: str = setting("examples", one_of(WEIGHTS), "weight of a client when adapters are averaged")
    share: tuple[str, ...] = setting(
        PARTS,
        SHARES,
        "parts whose adapters are aggregated; other parts stay each client's own, which the trunk may under copies "
        "only",
    )
    kernels: str = setting(
        "fused",
        one_of(KERNELS),
        "fused: fewer passes over memory; library: the code of transformers and PEFT, equal to the unsplit model to "
        "the bit",
    )
    lm_head: str = setting(
        "frozen", one_of(HEADS), "training of the head; frozen: none; lora: an adapter on it; full: its whole weight"
    )
    dtype: str = setting("fp32", one_of(DTYPES), "type of base weights and of computation; adapters are always fp32")
    router_aux_loss: float = setting(
        -1.0,
        COEFFICIENT,
        "coefficient of the loss that balances a mixture of experts; -1: that of the model's config.json; "
        "0: no such loss",
    )
    device: str = setting("cpu", DEVICE, "device of the parts; auto: a GPU if torch finds one, else the CPU")
    quantization: str = setting(
        "", QUANTIZATION, "parts whose base weights bitsandbytes keeps in 4 or 8 bits, such as trunk:4,top:8"
    )
    engine: str = setting(
        "ray",
        one_of(ENGINES),
        "ray: clients and trunk in processes of their own; local: all in this process, one client after the other",
    )
    workers: int = setting(0, at_least(0, MOST_AT_ONCE), "processes that play the clients; 0: one for each core")
    threads: int = setting(
        0, at_least(0, MOST_AT_ONCE), "threads of each client process; 0: chosen by the plan, so that the cores suffice"
    )
    timeout: float = setting(
        600.0,
        at_least(1, MOST),
        "seconds without any sign of life after which a process counts as dead",
    )
    deterministic: bool = setting(
        False,
        YES_OR_NO,
        "the same seed gives the same result under any schedule; for that, only trunk.group clients train at a time",
    )
    sinks: tuple[str, ...] = setting(
        (),
        NAMES,
        "classes that receive the events of the run, such as path/to/mine.py:MySink; may be given several times",
        "--sink",
    )
    out: str = setting("", Allowed("a folder", lambda v: True), "the run's folder (default: runs/<time>)", "--save-dir")
    resume: str = setting(
        "",
        Allowed("a folder", lambda v: True),
        "go on with the run of this folder; only rounds, patience, sinks, and what it uses of the machine may differ",
    )
    lora: LoraSettings = field(default_factory=LoraSettings)
    prompt: PromptSettings = field(default_factory=PromptSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    data: DataSettings = field(default_factory=DataSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    trunk: TrunkSettings = field(default_factory=TrunkSettings)
    wire: WireSettings = field(default_factory=WireSettings)
    strategy_options: Mapping[str, str | int | float | bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks every setting, whoever makes the configuration.

        Numbers of other libraries, paths and lists become Python's own numbers, texts and tuples.

        Raises:
            SettingError: A setting has a value of another type, or one that is not possible.
        """
        for name, cls in SECTIONS.items():
            if not isinstance(getattr(self, name), cls):
                raise SettingError(name, getattr(self, name), f"a {cls.__name__}")
        for name, (leaf, kind) in LEAVES.items():
            section, _, field = name.rpartition(".")
            owner = getattr(self, section) if section else self
            given = getattr(owner, field)
            value = _plain(kind, given)
            if not _suits(leaf, kind, value):
                raise SettingError(name, f"{given} ({type(given).__name__})", words_of(leaf, kind))
            if value is not given:
                object.__setattr__(owner, field, value)

    @property
    def sampled(self) -> int:
        """How many clients train in a round."""
        return max(1, int(self.fraction * self.clients + 0.5))

    @property
    def bounds(self) -> tuple[int, int]:
        """The cut as (LO, HI)."""
        bounds = parse_cut(self.cut)
        if bounds is None:
            raise SettingError("cut", self.cut, CUT.words)
        return bounds

    @property
    def bits(self) -> dict[str, int]:
        """By part, the bits of its base weights; parts that are not quantised are left out."""
        return parse_quantization(self.quantization) or {}

    def device_of(self, part: str) -> str:
        """What a part computes on, as the settings name it."""
        return (part == "trunk" and self.trunk.device) or self.device

    @property
    def model_path(self) -> Path:
        """The bundled model's folder, or the one that the name is; `fedsplit.model.sources` finds every model."""
        return BUNDLED_MODEL if self.model == DEFAULT_MODEL else Path(self.model)


OPTIONS = "strategy_options"


SECTIONS = {
    f.name: get_type_hints(Config)[f.name] for f in dataclasses.fields(Config) if not f.metadata and f.name != OPTIONS
}


def _leaves() -> Iterable[tuple[str, dataclasses.Field[Any], Any]]:
    """Every setting: its dotted name, its field and its type."""
    for owner, cls in {"": Config, **SECTIONS}.items():
        hints = get_type_hints(cls)
        for leaf in dataclasses.fields(cls):
            if leaf.metadata:
                yield f"{owner}.{leaf.name}".lstrip("."), leaf, hints[leaf.name]


LEAVES = {name: (leaf, kind) for name, leaf, kind in _leaves()}


_TYPES: Mapping[Any, tuple[type, ...]] = {float: (float, int), tuple[int, ...]: (tuple,), tuple[str, ...]: (tuple,)}

_ITEMS: Mapping[Any, type] = {tuple[int, ...]: int, tuple[str, ...]: str}


def _plain(kind: Any, value: Any) -> Any:
    """A value in Python's own type of a setting, where it is of one that stands for it; else as it is."""
    if kind in _ITEMS and isinstance(value, list | tuple):
        return tuple(_plain(_ITEMS[kind], item) for item in value)
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, bool | int | float):
        return value
    if kind in (int, float) and isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if kind is float and isinstance(value, numbers.Real) else value


def _suits(leaf: dataclasses.Field[Any], kind: Any, value: Any) -> bool:
    """Whether a setting may have a value.

    Args:
        leaf: The setting's field.
        kind: Its type.
        value: The value, of that type or not.
    """
    if not isinstance(value, _TYPES.get(kind, (kind,))) or (isinstance(value, bool) and kind is not bool):
        return False
    if kind in _ITEMS and not all(type(item) is _ITEMS[kind] for item in value):
        return False
    try:
        for text in (value,) if kind is str else value if kind == tuple[str, ...] else ():
            text.encode()
        return bool(leaf.metadata["allowed"].test(value))
    except (ValueError, OverflowError):  # half a character, or a number that is none
        return False


def words_of(leaf: dataclasses.Field[Any], kind: Any) -> str:
    """What a setting may be, in words."""
    words: str = leaf.metadata["allowed"].words
    return words.replace("a number", "a whole number") if kind is int else words
