"""Every setting of a run: a checked, frozen configuration, and its way to plain values and back.

The dataclasses below are the only list of settings there is: flags, TOML keys, help texts
and checks are all read off their fields. Precedence: default < `--config file.toml` < flag.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

DEFAULT_MODEL = "sotu-gpt2"
"""The name of the base model that ships with the package."""

BUNDLED_MODEL = Path(__file__).parent / "base"
"""The folder of the base model that ships with the package."""

SCHEDULES = ("shared", "batched", "accumulate", "copies", "frozen", "forward-only")
ORDERS = ("random", "cyclic")
CODECS = ("raw", "bf16")
KERNELS = ("fused", "library")
DTYPES = ("fp32", "bf16", "fp16")
OPTIMIZERS = ("adamw", "sgd", "adamw8bit")
RATES = ("constant", "linear", "cosine")
OPTIMIZER_STATES = ("reset", "keep")
WEIGHTS = ("examples", "tokens", "equal")
PARTS = ("bottom", "trunk", "top")
FORMATS = ("auto", "text", "completion", "chat", "classification")
PACKING = ("auto", "true", "false")
PROMPTS = ("off", "prompt", "ptuning", "prefix")
STARTS = ("random", "vocab", "text", "zero")
ENCODERS = ("mlp", "lstm")
HEADS = ("frozen", "lora", "full")


class InputError(Exception):
    """Something that the user asked for wrongly; the message is the one line to show."""


class SettingError(InputError):
    """A setting with a value that is not possible.

    Attributes:
        setting: The setting's dotted name, as in TOML and flags.
        value: What was given.
        allowed: What could have been given instead.
    """

    def __init__(self, setting: str, value: object, allowed: str) -> None:
        super().__init__(f"{setting}: {value} is not possible; allowed: {allowed}")
        self.setting, self.value, self.allowed = setting, value, allowed

    def __reduce__(self) -> tuple[type[SettingError], tuple[str, object, str]]:
        return SettingError, (self.setting, self.value, self.allowed)


@dataclass(frozen=True)
class Allowed:
    """What values a setting may take, in words and as a test."""

    words: str
    test: Callable[[Any], bool]


def at_least(low: float, high: float = math.inf) -> Allowed:
    """A finite number in [low, high]."""
    words = f"a number from {low:g} to {high:.10g}" if high < math.inf else f"a number of at least {low:g}"
    return Allowed(words, lambda v: math.isfinite(v) and low <= v <= high)


def above(low: float) -> Allowed:
    """A finite number larger than `low`."""
    return Allowed(f"a finite number above {low:g}", lambda v: math.isfinite(v) and v > low)


def below(low: float, high: float) -> Allowed:
    """A number in [low, high)."""
    return Allowed(f"a number from {low:g} to below {high:g}", lambda v: low <= v < high)


def _is_warmup(value: float) -> bool:
    return 0 <= value < 1 or (math.isfinite(value) and value >= 1 and value == int(value))


def one_of(names: Sequence[str]) -> Allowed:
    """One of a few names."""
    return Allowed(" | ".join(names), lambda v: v in names)


YES_OR_NO = Allowed("true | false", lambda v: isinstance(v, bool))
ANYTHING = Allowed("any text", lambda v: True)
TEXT = Allowed("a text that is not empty", lambda v: bool(v.strip()))
RANKS = Allowed(
    "whole numbers from 1 to 1024, separated by commas, or a file of them",
    lambda v: v != () and all(1 <= rank <= 1024 for rank in v),
)
COEFFICIENT = Allowed(
    "a number of at least 0, or -1 for what config.json says", lambda v: v == -1 or (math.isfinite(v) and v >= 0)
)
SHARES = Allowed("parts among bottom,trunk,top", lambda v: v != () and len({*v}) == len(v) and {*v} <= {*PARTS})
FIELDS = Allowed("a JSON object of fields, or a .json file that holds one", lambda v: True)
NAMES = Allowed("names separated by commas", lambda v: all(name.strip() for name in v))
WARMUP = Allowed("a whole number of steps, or a share of them from 0 to below 1", _is_warmup)
CUT = Allowed("LO:HI with 0 <= LO < HI, such as 1:5", lambda v: _parse_cut(v) is not None)
MEMORY = Allowed("bytes with a unit, such as 800MB, 1.5GB or 2GiB", lambda v: v == "" or _parse_memory(v) is not None)
DEVICE = Allowed("auto | cpu | cuda | cuda:N", lambda v: re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", v) is not None)
OWN_DEVICE = Allowed(DEVICE.words, lambda v: v == "" or DEVICE.test(v))
QUANTIZATION = Allowed(
    "PART:BITS, separated by commas, with parts among bottom,trunk,top and 4 or 8 bits, such as trunk:4,top:8",
    lambda v: _parse_quantization(v) is not None,
)
PARTITION = Allowed(
    "auto | natural[:COLUMN] | iid | dirichlet:ALPHA[:COLUMN] | inner-dirichlet:ALPHA:SIZE,SIZE,…[:COLUMN] "
    "| pathological:N[:COLUMN] | shard:N[:COLUMN] | linear | square | exponential | size:SIZE,SIZE,…",
    lambda v: _parse_partition(v) is not None,
)


def _parse_memory(value: str) -> int | None:
    """Bytes; units are powers of 1000, those with an i of 1024."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT])(i?)B\s*", value)
    if found is None or len(value) > 20:
        return None
    power = "kMGT".index(found[2]) + 1
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** power)
    return size or None


@dataclass(frozen=True)
class PartitionSpec:
    """A way to deal data out, read from `--partition`.

    Attributes:
        kind: "auto", "natural", "iid", "dirichlet", "inner-dirichlet", "pathological", "shard", "linear", "square",
            "exponential" or "size".
        alpha: The concentration of the Dirichlet kinds.
        number: The classes of a pathological client, or the shards of each client.
        sizes: Sequences a client, of "size" and "inner-dirichlet".
        column: The column whose values are dealt by; empty for the usual one.
    """

    kind: str
    alpha: float = 0.0
    number: int = 0
    sizes: tuple[int, ...] = ()
    column: str = ""


_PARTITIONS: Mapping[str, tuple[str, ...]] = {
    "auto": (),
    "natural": ("column",),
    "iid": (),
    "dirichlet": ("alpha", "column"),
    "inner-dirichlet": ("alpha", "sizes", "column"),
    "pathological": ("number", "column"),
    "shard": ("number", "column"),
    "linear": (),
    "square": (),
    "exponential": (),
    "size": ("sizes",),
}
"""What follows the name of each, between colons; the column may be left out."""


def _parse_partition(value: str) -> PartitionSpec | None:
    kind, *given = value.split(":")
    wanted = _PARTITIONS.get(kind)
    if wanted is None or not len(wanted) - ("column" in wanted) <= len(given) <= len(wanted) or "" in given:
        return None
    found: dict[str, Any] = dict(zip(wanted, given, strict=False))
    try:
        if "alpha" in found:
            found["alpha"] = float(found["alpha"])
        if "number" in found:
            found["number"] = int(found["number"])
        if "sizes" in found:
            found["sizes"] = tuple(int(size) for size in found["sizes"].split(","))
    except ValueError:
        return None
    possible = math.isfinite(found.get("alpha", 1.0)) and found.get("alpha", 1.0) > 0 and found.get("number", 1) > 0
    return PartitionSpec(kind, **found) if possible and min(found.get("sizes", (1,))) > 0 else None


def parse_partition(value: str) -> PartitionSpec:
    """Reads a way to deal data out.

    Raises:
        SettingError: There is no such way.
    """
    spec = _parse_partition(value)
    if spec is None:
        raise SettingError("partition", value, PARTITION.words)
    return spec


def _parse_cut(value: str) -> tuple[int, int] | None:
    low, colon, high = value.partition(":")
    if not (colon and low.isdecimal() and high.isdecimal()) or len(value) > 20 or int(low) >= int(high):
        return None
    return int(low), int(high)


def _parse_quantization(value: str) -> dict[str, int] | None:
    """Bits by part, in the order of the parts."""
    found = [re.fullmatch(rf"({'|'.join(PARTS)}):([48])", item) for item in value.split(",")] if value else []
    bits = {match[1]: int(match[2]) for match in found if match}
    return {part: bits[part] for part in PARTS if part in bits} if len(bits) == len(found) else None


def setting(default: Any, allowed: Allowed, help: str, alias: str = "") -> Any:
    """A field with its default, its check, its help text and the name people know from elsewhere."""
    return field(default=default, metadata={"allowed": allowed, "help": help, "alias": alias})


@dataclass(frozen=True)
class LoraSettings:
    """The adapters on all three parts."""

    rank: tuple[int, ...] = setting(
        (8,), RANKS, "rank r of every adapter; several, or a file of them, are dealt to clients in turn", "--lora-rank"
    )
    alpha: float = setting(16.0, above(0), "adapters are scaled by alpha / rank", "--lora-alpha")
    rslora: bool = setting(False, YES_OR_NO, "scale by alpha / sqrt(rank) instead (2312.03732)")
    dropout: float = setting(0.1, below(0, 1), "dropout on the input of every adapter")
    targets: tuple[str, ...] = setting(
        (), NAMES, "projections that get an adapter (default: all of the family's)", "--lora-target-modules"
    )
    method: str = setting("lora", TEXT, "the kind of adapter, by PEFT's name for it; the README lists them", "--peft")
    options: str = setting("", FIELDS, "more fields of that kind's PEFT configuration, by name", "--peft-config")

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
        "prompt (2104.08691) and ptuning (2103.10385) put virtual tokens before the text at the client; prefix "
        "(2101.00190) gives the attention of each part past keys and values",
    )
    tokens: int = setting(8, at_least(1, 4096), "virtual tokens, which the model's positions must have room for")
    init: str = setting(
        "random",
        one_of(STARTS),
        "what they start from; prompt: random, tokens of the vocabulary or those of prompt.text; prefix: random, zero",
    )
    text: str = setting("", Allowed("a text", lambda v: True), "prompt with init text: repeated or cut to the tokens")
    encoder: str = setting("mlp", one_of(ENCODERS), "ptuning: what makes the virtual tokens")
    hidden: int = setting(
        0, at_least(0), "ptuning, and prefix with projection: width of the encoder; 0: as wide as the virtual tokens"
    )
    layers: int = setting(2, at_least(1, 64), "ptuning with encoder lstm: its layers")
    dropout: float = setting(0.0, below(0, 1), "ptuning with encoder lstm: dropout between its layers")
    projection: bool = setting(
        False, YES_OR_NO, "prefix: each part trains an embedding and an MLP that make its past keys and values"
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
    """A client's local training."""

    steps: int = setting(10, at_least(1), "local steps a round; not used where epochs is set")
    epochs: int = setting(0, at_least(0), "local passes over the client's data a round; 0: count steps", "--epochs")
    batch_size: int = setting(4, at_least(1), "sequences a step", "--batch-size")
    max_length: int = setting(128, at_least(8), "tokens a sequence", "--max-length")
    samples: int = setting(0, at_least(0), "training sequences a client at most; 0: all it has", "--samples")
    micro_batches: int = setting(
        0,
        at_least(0),
        "parts of a batch that are under way at once, so that client and trunk work at the same time; 0: planned",
        "--micro-batches",
    )
    accumulation: int = setting(
        1, at_least(1), "batches a step, whose gradients are summed as those of one large batch"
    )
    clip: float = setting(
        0.0, at_least(0), "largest norm of a step's gradient, over the adapters of all parts; 0: it is not clipped"
    )
    optimizer: str = setting(
        "adamw", one_of(OPTIMIZERS), "optimiser of clients and trunk; adamw8bit is that of bitsandbytes"
    )
    lr: float = setting(1e-3, above(0), "learning rate, of clients and trunk", "--lr")
    weight_decay: float = setting(0.0, at_least(0), "weight decay")
    momentum: float = setting(0.0, below(0, 1), "sgd: momentum")
    beta1: float = setting(0.9, below(0, 1), "adamw, adamw8bit: decay of the mean gradient")
    beta2: float = setting(0.999, below(0, 1), "adamw, adamw8bit: decay of the mean squared gradient")
    eps: float = setting(1e-8, above(0), "adamw, adamw8bit: what is added to the root of the mean squared gradient")
    optimizer_state: str = setting(
        "reset",
        one_of(OPTIMIZER_STATES),
        "what a client's optimiser remembers: reset begins every round anew, keep goes on from the client's last one",
    )
    schedule: str = setting("constant", one_of(RATES), "course of the learning rate over the steps of all rounds")
    warmup: float = setting(
        0.0, WARMUP, "steps over which the learning rate rises from 0: 1 or more count them, below 1 is their share"
    )


@dataclass(frozen=True)
class DataSettings:
    """Where texts, their owners and what is to be predicted are found in a data set."""

    format: str = setting(
        "auto", one_of(FORMATS), "what a row is; auto: text where there is such a column, else chat or completion"
    )
    config: str = setting("", ANYTHING, "configuration of a data set that has several, such as wikitext-2-raw-v1")
    split: str = setting("train", TEXT, "split of a data set that has several, such as train or train[:10%]")
    held_out: str = setting(
        "", ANYTHING, "held-out texts: another split, or a file or folder (default: a part of each client's own)"
    )
    text: str = setting("text", TEXT, "column of the text")
    owner: str = setting("owner", TEXT, "column of whose a row is")
    prompt: str = setting("prompt", TEXT, "column of what is given, of which nothing is predicted")
    completion: str = setting("completion", TEXT, "column of what is predicted after a prompt")
    messages: str = setting("messages", TEXT, "column of chats: lists of messages with role and content")
    label: str = setting("label", TEXT, "column of the class of a text, under the format classification")
    packing: str = setting(
        "auto",
        one_of(PACKING),
        "put several texts into one sequence; else a text is a sequence, padded and cut; auto: true for text alone",
    )
    show: bool = setting(False, YES_OR_NO, "print who holds what before the run")


@dataclass(frozen=True)
class EvalSettings:
    """Evaluation on held-out text."""

    samples: int = setting(32, at_least(1), "held-out sequences a client at most")
    after: int = setting(
        8,
        at_least(0),
        "of these, sequences measured right after a client's own steps, too, to tell what it loses later",
    )


@dataclass(frozen=True)
class TrunkSettings:
    """The shared middle of the model."""

    schedule: str = setting("shared", one_of(SCHEDULES), "who updates the trunk's adapter, and when")
    order: str = setting("random", one_of(ORDERS), "order in which clients begin a round; cyclic: the same in each")
    every: int = setting(0, at_least(0), "accumulate: a client's steps between two barriers; 0: the whole round")
    deadline: float = setting(30.0, above(0), "batched, accumulate: seconds the others wait for a client that is late")
    group: int = setting(1, at_least(1), "with --deterministic: clients that train at once")
    memory: str = setting("", MEMORY, "the most resident memory of the trunk's process, such as 800MB")
    lease: float = setting(600.0, above(0), "seconds that a forward may wait for its gradient")
    threads: int = setting(0, at_least(0), "threads of the trunk's process; 0: planned")
    device: str = setting("", OWN_DEVICE, "what the trunk computes on, where it is not what the clients do (--device)")

    @property
    def memory_bytes(self) -> int | None:
        """The budget in bytes; None where there is none."""
        return _parse_memory(self.memory) if self.memory else None


@dataclass(frozen=True)
class WireSettings:
    """How tensors cross between client and trunk."""

    codec: str = setting("raw", one_of(CODECS), "how hidden states and gradients are encoded; raw loses nothing")


@dataclass(frozen=True)
class Config:
    """A whole run."""

    clients: int = setting(8, at_least(1), "clients in the federation")
    rounds: int = setting(5, at_least(1), "rounds of training and aggregation")
    seed: int = setting(0, at_least(0, 2**32 - 1), "decides data order, dropout and adapters at the start")
    model: str = setting(
        DEFAULT_MODEL,
        TEXT,
        "sotu-gpt2, smollm2, a folder with config.json and safetensors, a .gguf file, or the Hub's org/name[@revision]",
    )
    cut: str = setting("1:5", CUT, "the trunk is blocks LO to HI - 1; bottom and top are the rest")
    dataset: str = setting(
        "sotu",
        TEXT,
        "sotu, synthetic, a Hub id, a .txt, .jsonl, .json, .csv or .parquet file, or a folder of such files or of "
        "save_to_disk",
    )
    partition: str = setting(
        "auto", PARTITION, "who owns what; auto is by president or synthetic owner, or iid where those do not suffice"
    )
    strategy: str = setting("fedavg", TEXT, "a name, path/to/mine.py:Mine, or flwr.serverapp.strategy:FedAdam")
    patience: int = setting(
        0, at_least(0), "rounds in a row without a better held-out loss after which the run stops; 0: it does not"
    )
    min_delta: float = setting(
        0.0, at_least(0), "patience: by how much, in nats a token, a held-out loss must be lower to be better"
    )
    keep_best: bool = setting(
        False, YES_OR_NO, "the adapter that the run leaves is that of its best round, not that of its last"
    )
    fraction: float = setting(
        1.0, Allowed("a number above 0, up to 1", lambda v: 0 < v <= 1), "clients that train in a round"
    )
    weights: str = setting("examples", one_of(WEIGHTS), "what a client counts by when adapters are averaged")
    share: tuple[str, ...] = setting(
        PARTS, SHARES, "parts whose adapters are aggregated; the others stay personal, the trunk's only under copies"
    )
    kernels: str = setting(
        "fused",
        one_of(KERNELS),
        "fused makes fewer passes over memory; library is the unsplit model's own code, equal to it to the bit",
    )
    lm_head: str = setting(
        "frozen", one_of(HEADS), "what of the head trains: nothing, an adapter on it (lora), or its weight whole (full)"
    )
    dtype: str = setting("fp32", one_of(DTYPES), "type of base weights and of computation; adapters are fp32")
    router_aux_loss: float = setting(
        -1.0,
        COEFFICIENT,
        "coefficient of the loss that balances a mixture of experts; -1: as the model's config.json has it; 0: none",
    )
    device: str = setting("cpu", DEVICE, "what the parts compute on; auto: a GPU where torch sees one")
    quantization: str = setting(
        "", QUANTIZATION, "parts whose base weights are kept in 4 or 8 bits by bitsandbytes, such as trunk:4,top:8"
    )
    workers: int = setting(0, at_least(0), "processes that play the clients; 0: as many as cores")
    threads: int = setting(0, at_least(0), "threads of each client process; 0: planned, so that cores suffice")
    deterministic: bool = setting(
        False, YES_OR_NO, "same seed, same result, under any schedule; the price: clients train trunk.group at a time"
    )
    out: str = setting("", Allowed("a folder", lambda v: True), "the run's folder (default: runs/<time>)", "--save-dir")
    resume: str = setting(
        "",
        Allowed("a folder", lambda v: True),
        "go on with the run of this folder; only rounds, patience, threads and devices may differ",
    )
    lora: LoraSettings = field(default_factory=LoraSettings)
    prompt: PromptSettings = field(default_factory=PromptSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    data: DataSettings = field(default_factory=DataSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    trunk: TrunkSettings = field(default_factory=TrunkSettings)
    wire: WireSettings = field(default_factory=WireSettings)
    strategy_options: Mapping[str, str | int | float | bool] = field(default_factory=dict)

    @property
    def sampled(self) -> int:
        """How many clients train in a round."""
        return max(1, int(self.fraction * self.clients + 0.5))

    @property
    def bounds(self) -> tuple[int, int]:
        """The cut as (LO, HI)."""
        bounds = _parse_cut(self.cut)
        if bounds is None:
            raise SettingError("cut", self.cut, CUT.words)
        return bounds

    @property
    def bits(self) -> dict[str, int]:
        """By part, the bits of its base weights; parts that are not quantised are left out."""
        return _parse_quantization(self.quantization) or {}

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


def _convert(name: str, value: object, kind: Any) -> Any:
    """Turns a flag's text or a TOML value into the setting's type, and checks it."""
    allowed: Allowed = LEAVES[name][0].metadata["allowed"]
    try:
        if kind == tuple[str, ...]:
            converted: Any = tuple(value.split(",")) if isinstance(value, str) else tuple(value)  # type: ignore[arg-type]
            suits = all(isinstance(item, str) for item in converted)
        elif kind == tuple[int, ...]:
            converted = _whole_numbers(value)
            suits = True
        elif allowed is FIELDS:
            converted, suits = _object(value), True
        elif kind is bool:
            converted = {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value
            suits = isinstance(converted, bool)
        elif isinstance(value, bool) and kind is str and name == "data.packing":  # a switch that may also be planned
            converted, suits = str(value).lower(), True
        else:
            suits = not isinstance(value, bool) and (isinstance(value, str) or kind is not str)
            converted = kind(value)
            suits = suits and (kind is not int or isinstance(value, str) or value == converted)
        suits = suits and allowed.test(converted)
    except (TypeError, ValueError, OverflowError):
        suits = False
    if not suits:
        words = allowed.words.replace("a number", "a whole number") if kind is int else allowed.words
        raise SettingError(name, _short(value), words)
    return converted


def _whole_numbers(value: object) -> tuple[int, ...]:
    """Numbers from a list, from a text with commas, or from the file it names.

    Raises:
        ValueError, TypeError: It is none of these.
    """
    if isinstance(value, str) and not re.fullmatch(r"[\d,\s+-]*", value):
        try:
            value = ",".join(Path(value).read_text(encoding="utf-8").replace(",", " ").split())
        except OSError as error:
            raise ValueError from error
    items: Sequence[Any] = value.split(",") if isinstance(value, str) else [value]
    if isinstance(value, list | tuple):
        items = value
    if any(isinstance(item, bool) or not isinstance(item, int | str) for item in items):
        raise TypeError
    return tuple(int(item) for item in items)


def _object(value: object) -> str:
    """A JSON object as one line, from its text, from the file that the text names, or from a table; "" for none.

    Raises:
        ValueError, TypeError: It is none of these.
    """
    if isinstance(value, str):
        text = value.strip()
        if text and not text.startswith("{"):
            try:
                text = Path(text).read_text(encoding="utf-8")
            except OSError as error:
                raise ValueError from error
        value = json.loads(text or "{}")
    if not isinstance(value, Mapping):
        raise TypeError
    return json.dumps(value, sort_keys=True, allow_nan=False) if value else ""


def _short(value: object) -> str:
    """A value as a message shows it."""
    text = str(value) if not isinstance(value, int) or abs(value) < 10**20 else "a number of many digits"
    return "nothing" if text == "" else text if len(text) <= 200 else f"{text[:200]}…"


def build(values: Mapping[str, object], options: Mapping[str, Any] | None = None) -> Config:
    """Makes a configuration from dotted names.

    Args:
        values: Settings by dotted name; those not named keep their defaults.
        options: Keyword arguments for the strategy.

    Raises:
        InputError: A name is unknown or a value is not allowed.
    """
    top: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for name, value in values.items():
        if name not in LEAVES:
            raise InputError(f"there is no setting {name}; {suggest(name, LEAVES)}")
        section, _, leaf = name.rpartition(".")
        (parts[section] if section else top)[leaf] = _convert(name, value, LEAVES[name][1])
    for name, value in (options or {}).items():
        if not isinstance(value, str | int | float):
            raise SettingError(f"strategy.{name}", value, "a text, a number, true or false")
    sections = {name: cls(**parts[name]) for name, cls in SECTIONS.items()}
    return Config(**top, **sections, strategy_options=dict(options or {}))


def suggest(name: str, known: Iterable[str]) -> str:
    """What somebody may have meant by a name that is not known."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return "did you mean " + " or ".join(close) + "?" if close else "see --help for the list"


def dotted(document: Mapping[str, Any]) -> dict[str, object]:
    """Nested values, as a file has them, by dotted name."""
    values: dict[str, object] = {}
    for key, value in document.items():
        if key in SECTIONS and isinstance(value, dict):
            values |= {f"{key}.{leaf}": inner for leaf, inner in value.items()}
        else:
            values[key] = value
    return values


def set_by_user(section: Any) -> dict[str, Any]:
    """The settings of a section, by the names of its fields, that do not have their defaults."""
    values = {leaf.name: (getattr(section, leaf.name), leaf.default) for leaf in dataclasses.fields(section)}
    return {name: value for name, (value, default) in values.items() if value != default}


def as_document(config: Config) -> dict[str, Any]:
    """The configuration as nested plain values, ready to be written as TOML.

    The run's folder is left out: who runs the file again gets a folder of its own.
    """
    document = dataclasses.asdict(config)
    del document["out"], document["resume"]
    document["share"] = list(config.share)
    document["lora"]["targets"] = list(config.lora.targets)
    document["lora"]["rank"] = list(config.lora.rank) if len(config.lora.rank) > 1 else config.lora.rank[0]
    return document


def from_document(document: Mapping[str, Any]) -> Config:
    """The inverse of `as_document`."""
    settings = {key: value for key, value in document.items() if key != OPTIONS}
    return build(dotted(settings), document.get(OPTIONS))
