"""Every setting of a run: a frozen configuration.

The dataclasses below are the only list of settings there is: flags, TOML keys, help texts
and checks are all read off their fields. Precedence: default < `--config file.toml` < flag.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from fedsplit.errors import SettingError
from fedsplit.settings.choices import (
    DTYPES,
    ENGINES,
    HEADS,
    KERNELS,
    PARTS,
    WEIGHTS,
)
from fedsplit.settings.fields import plain, setting, suits, words_of
from fedsplit.settings.parsing import parse_cut, parse_quantization
from fedsplit.settings.sections import (
    DataSettings,
    EvalSettings,
    LoraSettings,
    PromptSettings,
    TrainSettings,
    TrunkSettings,
    WireSettings,
)
from fedsplit.settings.validators import (
    COEFFICIENT,
    CUT,
    DEVICE,
    MOST,
    MOST_AT_ONCE,
    NAMES,
    PARTITION,
    QUANTIZATION,
    SHARES,
    TEXT,
    YES_OR_NO,
    Validator,
    at_least,
    one_of,
)

DEFAULT_MODEL = "sotu-gpt2"
"""The name of the base model that ships with the package."""


BUNDLED_MODEL = Path(__file__).parent.parent / "base"
"""The folder of the base model that ships with the package."""


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
        Validator("a folder", lambda v: True),
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
    objective: str = setting(
        "cross_entropy",
        TEXT,
        "loss that training minimises: cross_entropy, label_smoothing, or path/to/mine.py:Mine; the held-out loss is "
        "cross-entropy in any case",
    )
    metric: tuple[str, ...] = setting(
        (),
        NAMES,
        "measures of held-out text beside the loss: token_accuracy, path/to/mine.py:rouge, several separated by commas",
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
        Validator("a number above 0, up to 1", lambda v: 0 < v <= 1),
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
    quorum: float = setting(
        0.0,
        Validator("a number from 0 to 1", lambda v: 0 <= v <= 1),
        "share of the clients asked whose updates a round needs; with fewer it is discarded and played again; "
        "0: one update is enough",
    )
    max_failures: int = setting(
        5,
        at_least(0, MOST_AT_ONCE),
        "attempts at one round that may be lost; after one more the run ends early, with exit code 3",
    )
    round_deadline: float = setting(
        0.0,
        at_least(0, MOST),
        "seconds that clients have for the training of a round, and for its evaluation; who is late counts as failed; "
        "0: no limit",
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
    out: str = setting(
        "", Validator("a folder", lambda v: True), "the run's folder (default: runs/<time>)", "--save-dir"
    )
    resume: str = setting(
        "",
        Validator("a folder", lambda v: True),
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
    objective_options: Mapping[str, str | int | float | bool] = field(default_factory=dict)

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
            value = plain(kind, given)
            if not suits(leaf, kind, value):
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


OPTIONS = {"strategy": "strategy_options", "objective": "objective_options"}
"""By setting that names a class, the field of the keyword arguments for the class."""


SECTIONS = {
    f.name: get_type_hints(Config)[f.name]
    for f in dataclasses.fields(Config)
    if not f.metadata and f.name not in OPTIONS.values()
}


def _leaves() -> Iterable[tuple[str, dataclasses.Field[Any], Any]]:
    """Every setting: its dotted name, its field and its type."""
    for owner, cls in {"": Config, **SECTIONS}.items():
        hints = get_type_hints(cls)
        for leaf in dataclasses.fields(cls):
            if leaf.metadata:
                yield f"{owner}.{leaf.name}".lstrip("."), leaf, hints[leaf.name]


LEAVES = {name: (leaf, kind) for name, leaf, kind in _leaves()}
