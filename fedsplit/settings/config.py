"""The configuration of a run, with every setting.

These dataclasses, and those of `fedsplit.settings.sections`, are the only list of settings: flags, TOML keys, help
texts, checks and docs/settings.md are made from their fields. A flag wins over `--config file.toml`, and a file over
the default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedsplit.errors import SettingError, check_all
from fedsplit.settings.choices import (
    DTYPES,
    ENGINES,
    HEADS,
    KERNELS,
    PARTS,
    WEIGHTS,
)
from fedsplit.settings.fields import Setting, setting, settings_of
from fedsplit.settings.parsing import parse_cut, parse_quantization
from fedsplit.settings.sections import (
    AdapterSettings,
    CheckpointSettings,
    ClientSettings,
    DataSettings,
    EvalSettings,
    LoraSettings,
    NetworkSettings,
    PromptSettings,
    RaySettings,
    Section,
    TrainSettings,
    TrunkSettings,
    WireSettings,
)
from fedsplit.settings.validators import (
    ANYTHING,
    COEFFICIENT,
    CUT,
    DEVICE,
    FOLDER,
    FRACTION,
    MOST,
    MOST_AT_ONCE,
    NAMES,
    PARTITION,
    QUANTIZATION,
    SHARES,
    TEXT,
    TRACKED,
    YES_OR_NO,
    Validator,
    at_least,
    one_of,
)

DEFAULT_MODEL = "sotu-gpt2"
"""Name of the base model that ships with the package."""


BUNDLED_MODEL = Path(__file__).parent.parent / "base"
"""Folder of the base model that ships with the package."""


@dataclass(frozen=True)
class Config:
    """Settings of a run.

    Example:
        >>> config = Config(clients=4, lora=LoraSettings(rank=(16,)))
        >>> config.bounds, config.lora.rank
        ((1, 5), (16,))
        >>> Config(clients=0)
        Traceback (most recent call last):
        fedsplit.errors.SettingError: clients: 0 (int) is not possible; allowed: a whole number from 1 to 2147483647
    """

    clients: int = setting(8, at_least(1, MOST), "clients in the federation")
    rounds: int = setting(5, at_least(1, MOST), "rounds of training and aggregation")
    seed: int = setting(0, at_least(0, 2**32 - 1), "seed of the data's order, of dropout, and of the initial adapters")
    model: str = setting(
        DEFAULT_MODEL,
        TEXT,
        "sotu-gpt2, smollm2, a folder with config.json and safetensors, a .gguf file, or the Hub's org/name[@revision]",
    )
    init_adapter: str = setting(
        "",
        FOLDER,
        "start from the PEFT adapter of the unsplit model in this folder; a different rank is truncated or padded with "
        "zeros",
    )
    cut: str = setting(
        "1:5", CUT, "the trunk is blocks LO to HI - 1, from 0 to the number of blocks; bottom and top are the rest"
    )
    dataset: str = setting(
        "sotu",
        TEXT,
        "sotu, synthetic, a Hub id, a .txt, .jsonl, .json, .csv or .parquet file, a folder of such files or of "
        "save_to_disk, or path/to/mine.py:load",
    )
    partition: str = setting(
        "auto",
        PARTITION,
        "division of the data among clients; auto: by owner, such as a president, or iid if there are too few owners",
    )
    strategy: str = setting(
        "fedavg",
        TEXT,
        "aggregation of the clients' adapters: a name, path/to/mine.py:Mine, or flwr.serverapp.strategy:FedAdam",
    )
    objective: str = setting(
        "cross_entropy",
        TEXT,
        "loss that training minimises: cross_entropy, label_smoothing, distillation, dpo, or path/to/mine.py:Mine; "
        "the held-out loss is cross-entropy, and of pairs the objective's",
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
        FRACTION,
        "share of the clients that train in a round; the seed decides which",
    )
    weights: str = setting("examples", one_of(WEIGHTS), "weight of a client when adapters are averaged")
    share: tuple[str, ...] = setting(
        PARTS,
        SHARES,
        "parts whose adapters are aggregated; each client keeps its own adapter of the remaining parts; the trunk may "
        "remain under trunk.schedule copies only",
    )
    kernels: str = setting(
        "fused",
        one_of(KERNELS),
        "fused: fewer passes over memory; library: the code of transformers and PEFT, equal to the unsplit model to "
        "the bit",
    )
    unproved: bool = setting(
        False,
        YES_OR_NO,
        "train a model also if its parts were not compared with the uncut model, or differ from it; summary.json "
        "says so",
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
        "ray: clients and trunk in separate processes; local: all in this process, one client after the other; "
        "flower: as ray, with Flower's own simulation engine",
    )
    workers: int = setting(
        0, at_least(0, MOST_AT_ONCE), "processes that play the clients; threads on the engine local; 0: as planned"
    )
    threads: int = setting(
        0, at_least(0, MOST_AT_ONCE), "threads of each client process; 0: chosen by the plan, so that the cores suffice"
    )
    timeout: float = setting(
        600.0,
        at_least(1, MOST),
        "seconds without any sign of life after which a process counts as dead, and code of the user's as hung",
    )
    startup_deadline: float = setting(
        3600.0,
        at_least(1, MOST),
        "seconds in which the data set must be read, and the trial round of a strategy of the user's played",
    )
    quorum: float = setting(
        0.0,
        Validator("a number from 0 to 1", lambda v: 0 <= v <= 1),
        "share of the clients asked whose updates a round needs; with fewer it is discarded and played again; "
        "0: one update is enough",
    )
    max_update_norm: float = setting(
        0.0,
        Validator("0, or a number of at least 1", lambda v: v == 0 or (math.isfinite(v) and v >= 1)),
        "a client is left out of a round of three updates or more if the norm of its update is above this multiple of "
        "the round's median; 0: no limit",
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
        "with --network, virtual seconds for the training; 0: no limit",
    )
    deterministic: bool = setting(
        False,
        YES_OR_NO,
        "make the result depend on the seed alone under any schedule; only trunk.group clients train at a time",
    )
    sinks: tuple[str, ...] = setting(
        (),
        NAMES,
        "classes that receive the events of the run, such as path/to/mine.py:MySink; may be given several times",
        "--sink",
    )
    push_to_hub: str = setting(
        "", ANYTHING, "upload the adapter with its model card to this repository of the Hub at the end, as org/name"
    )
    mods: tuple[str, ...] = setting(
        (),
        NAMES,
        "Flower's mods around the training of every client, the outermost first: fixedclipping_mod, LocalDpMod, "
        "path/to/mine.py:my_mod, several separated by commas; for the engines ray and flower",
        "--mod",
    )
    track: tuple[str, ...] = setting(
        (),
        TRACKED,
        "trackers that receive the values of each round: tensorboard, wandb, mlflow, trackio, several separated by "
        "commas; each is an extra to install, such as fedsplit[tensorboard]",
    )
    report: bool = setting(True, YES_OR_NO, "write report.html into the run's folder at its end")
    quiet: bool = setting(False, YES_OR_NO, "show failures alone, on standard error")
    json: bool = setting(
        False, YES_OR_NO, "print the events of the run as JSON, an object a line, in place of progress and table"
    )
    out: str = setting("", FOLDER, "the run's folder (default: runs/<time>)", "--save-dir")
    resume: str = setting(
        "",
        FOLDER,
        "continue the run of this folder; only rounds, patience, sinks, checkpoints, and the use of the machine may "
        "differ",
    )
    lora: LoraSettings = field(default_factory=LoraSettings)
    prompt: PromptSettings = field(default_factory=PromptSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    data: DataSettings = field(default_factory=DataSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    trunk: TrunkSettings = field(default_factory=TrunkSettings)
    wire: WireSettings = field(default_factory=WireSettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    network: NetworkSettings = field(default_factory=NetworkSettings)
    client: ClientSettings = field(default_factory=ClientSettings)
    ray: RaySettings = field(default_factory=RaySettings)
    strategy_options: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    objective_options: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    metric_options: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    sink_options: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    mod_options: Mapping[str, str | int | float | bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks every setting, for configurations from Python as well as from flags and files.

        Numbers of NumPy and the like, paths and lists become Python's numbers, texts and tuples.

        Raises:
            InputError: A setting has a value of another type, or a value that is not possible. All errors are reported
                together.
        """
        # Sections first: no setting can be read from a section of another class.
        wrong_sections = []
        for name, cls in SECTIONS.items():
            if not isinstance(getattr(self, name), cls):
                wrong_sections.append(SettingError(name, getattr(self, name), f"a {cls.__name__}"))
        check_all(wrong_sections)
        wrong = []
        for each in SETTINGS.values():
            given = self.value_of(each)
            value = each.in_python_type(given)
            if not each.accepts(value):
                wrong.append(SettingError(each.name, f"{given} ({type(given).__name__})", each.allowed_for(given)))
            elif value is not given:
                owner = getattr(self, each.section) if each.section else self
                object.__setattr__(owner, each.field, value)  # a frozen dataclass has no other way
        check_all(wrong)

    def value_of(self, setting: Setting) -> object:
        """Returns the value of a setting.

        Example:
            >>> Config().value_of(SETTINGS["lora.rank"])
            (8,)
        """
        owner = getattr(self, setting.section) if setting.section else self
        return getattr(owner, setting.field)

    @property
    def sampled(self) -> int:
        """Number of clients that train in a round."""
        # Halves are rounded up. Python's `round` would take them to the even number, and 2.5 clients to 2.
        return max(1, int(self.fraction * self.clients + 0.5))

    @property
    def asked(self) -> int:
        """Number of clients that are asked to train in a round: more than `sampled` with over-selection.

        Example:
            >>> Config(clients=8, fraction=0.5, network=NetworkSettings(profile="home", over_select=1.3)).asked
            6
        """
        wanted = round(self.sampled * self.network.over_select, 9)  # 1.1 times 10 is 11.000000000000002
        return min(self.clients, math.ceil(wanted))

    @property
    def bounds(self) -> tuple[int, int]:
        """The cut as (LO, HI)."""
        bounds = parse_cut(self.cut)
        if bounds is None:
            raise SettingError("cut", self.cut, CUT.words)
        return bounds

    @property
    def bits(self) -> dict[str, int]:
        """Bits of the base weights by part, without the parts that are not quantised."""
        return parse_quantization(self.quantization) or {}

    def device_of(self, part: str) -> str:
        """Returns the device of a part, as the settings name the device."""
        if part == "trunk" and self.trunk.device:
            return self.trunk.device
        return self.device

    @property
    def model_path(self) -> Path:
        """Folder of the bundled model, or the folder that the setting `model` names.

        `fedsplit.model.sources` finds models of every source.
        """
        return BUNDLED_MODEL if self.model == DEFAULT_MODEL else Path(self.model)


OPTIONS = {
    "strategy": "strategy_options",
    "objective": "objective_options",
    "metric": "metric_options",
    "sinks": "sink_options",
    "mods": "mod_options",
}
"""Field of the keyword arguments for a class, by the setting that names the class."""

SEVERAL = ("metric", "sinks", "mods")
"""Settings that name several classes. The key of an option is NAME.KEY, such as `rouge.stem`."""


SECTIONS: dict[str, type[Section]] = {
    "lora": LoraSettings,
    "prompt": PromptSettings,
    "train": TrainSettings,
    "checkpoint": CheckpointSettings,
    "data": DataSettings,
    "eval": EvalSettings,
    "trunk": TrunkSettings,
    "wire": WireSettings,
    "adapter": AdapterSettings,
    "network": NetworkSettings,
    "client": ClientSettings,
    "ray": RaySettings,
}
"""Class of each section, by the section's name."""


def _all_settings() -> dict[str, Setting]:
    settings = list(settings_of(Config))
    for section, cls in SECTIONS.items():
        settings += settings_of(cls, section)
    return {setting.name: setting for setting in settings}


SETTINGS = _all_settings()
"""Every setting, by dotted name, in the order of the help text."""
