"""Every setting of a run: a checked, frozen configuration, and its way to plain values and back.

The dataclasses below are the only list of settings there is: flags, TOML keys, help texts
and checks are all read off their fields. Precedence: default < `--config file.toml` < flag.
"""

from __future__ import annotations

import dataclasses
import difflib
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
OPTIMIZERS = ("adamw", "sgd")
WEIGHTS = ("examples", "tokens", "equal")
PARTS = ("bottom", "trunk", "top")


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


def one_of(names: Sequence[str]) -> Allowed:
    """One of a few names."""
    return Allowed(" | ".join(names), lambda v: v in names)


def _is_partition(value: str) -> bool:
    kind, _, number = value.partition(":")
    if kind == "dirichlet":
        try:
            return math.isfinite(float(number)) and float(number) > 0
        except ValueError:
            return False
    return value in ("auto", "natural", "iid")


YES_OR_NO = Allowed("true | false", lambda v: isinstance(v, bool))
TEXT = Allowed("a text that is not empty", lambda v: bool(v.strip()))
RANKS = Allowed(
    "whole numbers from 1 to 1024, separated by commas, or a file of them",
    lambda v: v != () and all(1 <= rank <= 1024 for rank in v),
)
SHARES = Allowed("parts among bottom,trunk,top", lambda v: v != () and len({*v}) == len(v) and {*v} <= {*PARTS})
NAMES = Allowed("names separated by commas", lambda v: all(name.strip() for name in v))
CUT = Allowed("LO:HI with 0 <= LO < HI, such as 1:5", lambda v: _parse_cut(v) is not None)
MEMORY = Allowed("bytes with a unit, such as 800MB, 1.5GB or 2GiB", lambda v: v == "" or _parse_memory(v) is not None)
DEVICE = Allowed("auto | cpu | cuda | cuda:N", lambda v: re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", v) is not None)
OWN_DEVICE = Allowed(DEVICE.words, lambda v: v == "" or DEVICE.test(v))
QUANTIZATION = Allowed(
    "PART:BITS, separated by commas, with parts among bottom,trunk,top and 4 or 8 bits, such as trunk:4,top:8",
    lambda v: _parse_quantization(v) is not None,
)
PARTITION = Allowed("auto | natural | iid | dirichlet:ALPHA with ALPHA above 0", _is_partition)


def _parse_memory(value: str) -> int | None:
    """Bytes; units are powers of 1000, those with an i of 1024."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT])(i?)B\s*", value)
    if found is None or len(value) > 20:
        return None
    power = "kMGT".index(found[2]) + 1
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** power)
    return size or None


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

    @property
    def top_rank(self) -> int:
        """The largest rank of any client; that of a trunk which all share."""
        return max(self.rank)

    def rank_of(self, client: int) -> int:
        """A client's rank."""
        return self.rank[client % len(self.rank)]


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
    optimizer: str = setting("adamw", one_of(OPTIMIZERS), "optimiser of clients and trunk; sgd is without momentum")
    lr: float = setting(1e-3, above(0), "learning rate, of clients and trunk", "--lr")
    weight_decay: float = setting(0.0, at_least(0), "weight decay")


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
    model: str = setting(DEFAULT_MODEL, TEXT, "the bundled base model, or a folder with config.json and safetensors")
    cut: str = setting("1:5", CUT, "the trunk is blocks LO to HI - 1; bottom and top are the rest")
    dataset: str = setting("sotu", TEXT, "sotu, or a .txt, .jsonl, .csv or .parquet file with a column 'text'")
    partition: str = setting(
        "auto", PARTITION, "who owns what; auto is by president, or iid where those do not suffice"
    )
    strategy: str = setting("fedavg", TEXT, "a name, path/to/mine.py:Mine, or flwr.serverapp.strategy:FedAdam")
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
    dtype: str = setting("fp32", one_of(DTYPES), "type of base weights and of computation; adapters are fp32")
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
        "go on with this folder's run; only rounds, threads and devices may differ",
    )
    lora: LoraSettings = field(default_factory=LoraSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
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
        """The folder that holds the base model."""
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
        elif kind is bool:
            converted = {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value
            suits = isinstance(converted, bool)
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
