"""Sections of the settings: `--lora.…`, `--prompt.…`, `--train.…`, `--checkpoint.…`, `--data.…` and so on.

The first line of each class heads its section in `--help` and in docs/settings.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedsplit.settings.choices import (
    ENCODERS,
    FORMATS,
    OPTIMIZER_STATES,
    OPTIMIZERS,
    ORDERS,
    PACKING,
    PLACES,
    PROMPTS,
    RATES,
    SCHEDULES,
    STARTS,
    SYNCS,
)
from fedsplit.settings.fields import setting
from fedsplit.settings.parsing import parse_memory, parse_server, parse_stages, parse_weights
from fedsplit.settings.validators import (
    ADAPTER_CODEC,
    ANYTHING,
    CACHE,
    CODEC,
    DEVICES,
    FIELDS,
    FILE,
    FOLDER,
    FRACTION,
    LABELS,
    MEMORY,
    MOST,
    MOST_AT_ONCE,
    MOST_TFLOPS,
    NAMES,
    NETWORK,
    OWN_DEVICE,
    RANKS,
    RAY_ADDRESS,
    REPLICA_WEIGHTS,
    RESOURCES,
    ROLE_CODEC,
    SERVER,
    STAGES,
    TABLES,
    TEXT,
    WARMUP,
    YES_OR_NO,
    above,
    at_least,
    below,
    one_of,
)


@dataclass(frozen=True)
class LoraSettings:
    """Adapters of all three parts."""

    rank: tuple[int, ...] = setting(
        (8,),
        RANKS,
        "rank r of every adapter; a list of ranks, or a file with a list, is dealt to the clients in turn",
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
        "kind of adapter, by PEFT's name (see docs/adapters.md); prompt, ptuning and prefix set --prompt.kind",
        "--peft",
    )
    options: str = setting(
        "", FIELDS, "further fields of PEFT's configuration for this kind of adapter, by name", "--peft-config"
    )

    @property
    def top_rank(self) -> int:
        """Largest rank of any client; also the rank of a trunk that all clients share."""
        return max(self.rank)

    def rank_of(self, client: int) -> int:
        """Returns the rank of a client, whose number counts from 0.

        Example:
            >>> LoraSettings(rank=(4, 8)).rank_of(client=2)
            4
        """
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
        ANYTHING,
        "prompt with init text: the text, repeated or cut to the number of virtual tokens",
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
        """Number of virtual tokens that a client sends through the trunk, before the text."""
        return self.tokens if self.kind in ("prompt", "ptuning") else 0

    @property
    def positions(self) -> int:
        """Number of the model's positions that the text cannot use."""
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
        "parts of a batch that cross separately, so that client and trunk work at the same time; 0: chosen by the plan",
        "--micro-batches",
    )
    accumulation: int = setting(
        1, at_least(1, MOST_AT_ONCE), "batches a step; their gradients are summed, as for one large batch"
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
    eps: float = setting(1e-8, above(0), "adamw, adamw8bit: epsilon in the denominator of the update")
    optimizer_state: str = setting(
        "reset",
        one_of(OPTIMIZER_STATES),
        "state of a client's optimiser; reset: a new state every round; keep: the state after the client's last round",
    )
    schedule: str = setting("constant", one_of(RATES), "schedule of the learning rate over the steps of all rounds")
    warmup: float = setting(
        0.0,
        WARMUP,
        "steps over which the learning rate rises from 0; a value below 1 is a share of all steps",
    )


@dataclass(frozen=True)
class CheckpointSettings:
    """Checkpoints, from which --resume goes on."""

    every: int = setting(
        1,
        at_least(1, MOST),
        "rounds between two checkpoints; the last round has one, and under --keep-best every best round so far",
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
    """Columns of a data set: texts, owners, and the part to predict."""

    format: str = setting(
        "auto",
        one_of(FORMATS),
        "kind of rows; auto: text if there is a column of that name, else chat, preference, completion or instruction; "
        "instruction also beside a text if there are columns of instructions, inputs and outputs",
    )
    config: str = setting("", ANYTHING, "configuration of a data set with several, such as wikitext-2-raw-v1")
    split: str = setting("train", TEXT, "split of a data set with several, such as train or train[:10%]")
    held_out: str = setting(
        "", ANYTHING, "held-out texts: another split, a file or a folder (default: a part of each client's texts)"
    )
    text: str = setting("text", TEXT, "column with the text")
    owner: str = setting("owner", TEXT, "column with the owner of a row")
    prompt: str = setting("prompt", TEXT, "column with the prompt, which is not predicted")
    completion: str = setting("completion", TEXT, "column with the completion, which is predicted after the prompt")
    chosen: str = setting("chosen", TEXT, "preference: column with the preferred continuation of the prompt")
    rejected: str = setting("rejected", TEXT, "preference: column with the other continuation of the prompt")
    messages: str = setting(
        "messages",
        TEXT,
        "column with chats: lists of messages with role and content, or with from and value; conversations where there "
        "is no such column",
    )
    instruction: str = setting("instruction", TEXT, "instruction: column with the task, which is not predicted")
    input: str = setting("input", TEXT, "instruction: column with the task's input, which may be empty or missing")
    output: str = setting("output", TEXT, "instruction: column with the answer, which is predicted")
    label: str = setting("label", TEXT, "column with the class of a text, for the format classification")
    packing: str = setting(
        "auto",
        one_of(PACKING),
        "true: several texts share a sequence; false: a text is a sequence, padded or cut; auto: true for the format "
        "text alone",
    )
    show: bool = setting(False, YES_OR_NO, "print the clients' shares of the data before the run")
    at: str = setting(
        "driver",
        one_of(PLACES),
        "on a Ray cluster; driver: a client's data and state travel to the node that plays the client, where they are "
        "not yet; shared: all nodes see the folder of --out; label: a client is played on the node whose label "
        "fedsplit-clients has its number, such as 0-3_7, and its data and state stay there; site: each client is a "
        "site with data and settings of its own (fedsplit client), and the run is one of flwr run",
    )
    folder: str = setting(
        "~/.fedsplit",
        TEXT,
        "with --data.at label: folder on each node in which the data and the state of its clients lie",
    )

    @property
    def stays_with_clients(self) -> bool:
        """True if data and state of the clients lie out of the server's reach: on their nodes, or at their sites."""
        return self.at in ("label", "site")


@dataclass(frozen=True)
class EvalSettings:
    """Evaluation on held-out text."""

    samples: int = setting(32, at_least(1, MOST), "held-out sequences a client at most")
    after: int = setting(
        8,
        at_least(0, MOST),
        "number of these sequences that are measured right after the client's steps, too, to report what the client "
        "forgets",
    )
    fraction: float = setting(
        1.0,
        FRACTION,
        "share of the clients that measure; they are drawn from the seed once, so that the losses of all rounds are "
        "those of the same clients",
    )
    every: int = setting(1, at_least(1, MOST), "rounds from one evaluation to the next; the last round has one, too")


@dataclass(frozen=True)
class TrunkSettings:
    """The trunk: the middle of the model, which all clients share."""

    schedule: str = setting(
        "shared", one_of(SCHEDULES), "how clients share the trunk's adapter; docs/trunk.md explains each"
    )
    order: str = setting(
        "random", one_of(ORDERS), "order in which clients begin a round; random: drawn from the seed; cyclic: by number"
    )
    every: int = setting(
        0, at_least(0, MOST), "accumulate: steps of a client between two barriers; 0: all steps of the round"
    )
    deadline: float = setting(30.0, above(0), "batched, accumulate: seconds that clients wait for a late client")
    group: int = setting(1, at_least(1, MOST_AT_ONCE), "with --deterministic: number of clients that train at once")
    memory: str = setting(
        "", MEMORY, "largest resident memory of the trunk's process, such as 800MB (default: no limit)"
    )
    lease: float = setting(600.0, above(0), "seconds for which the trunk keeps a forward whose gradient has not come")
    threads: int = setting(
        0, at_least(0, MOST_AT_ONCE), "threads with which each lane of the trunk computes; 0: chosen by the plan"
    )
    lanes: int = setting(
        0,
        at_least(0, 2),
        "2: the trunk computes a forward and a backward at the same time; 1: one after the other; "
        "0: chosen by the plan",
    )
    device: str = setting("", OWN_DEVICE, "device of the trunk (default: that of --device)")
    devices: str = setting(
        "",
        DEVICES,
        "GPUs among which the trunk's blocks are divided, such as cuda:0,cuda:1; auto: all that torch sees (default: "
        "one device)",
    )
    tensor_parallel: int = setting(
        1,
        at_least(1, 1024),
        "processes that share every projection of the trunk's blocks; each has a piece of the weights",
    )
    resources: str = setting(
        "CPU=1", RESOURCES, "engine ray: resources of a node that Ray keeps for the trunk, such as CPU=4,GPU=1"
    )
    label: str = setting("", LABELS, "engine ray: labels of the node on which the trunk runs, such as site=north")

    stages: str = setting(
        "",
        STAGES,
        "cut the trunk into stages, each in a process of its own: LO:MID:HI, such as 2:6:10 under the cut 2:10; "
        "hidden states go from stage to stage",
    )
    replicas: int = setting(1, at_least(1, MOST_AT_ONCE), "number of trunks; each serves its own share of the clients")
    sync: str = setting(
        "round",
        one_of(SYNCS),
        "round: adapters of replicas are averaged at the end of a round; step: replicas sum their gradients at every "
        "step, as one trunk would (batched, accumulate)",
    )

    weights: str = setting(
        "",
        REPLICA_WEIGHTS,
        "share of the clients that each replica serves, such as 1,3; speed: by the speed of a step on each replica, "
        "measured at the start (default: equal shares)",
    )

    server: str = setting(
        "",
        SERVER,
        "use the trunk that fedsplit serve offers at this address (default: the run starts a trunk of its own)",
    )
    token_file: str = setting("", FILE, "trunk.server: file with the token that fedsplit serve has written")
    tls: str = setting(
        "",
        FOLDER,
        "trunk.server: folder that fedsplit certificates has made; packets and control messages are encrypted "
        "(default: they are not, and the server is on this machine)",
    )
    wait: float = setting(60.0, at_least(1, MOST), "trunk.server: seconds in which a server that was lost must be back")

    @property
    def server_address(self) -> tuple[str, int]:
        """Host and port of the trunk's server; an empty host without a server."""
        return parse_server(self.server) or ("", 0)

    @property
    def replica_weights(self) -> tuple[float, ...]:
        """Weight of each replica in the division of the clients; equal weights before they are measured."""
        return parse_weights(self.weights) or (1.0,) * self.replicas

    @property
    def memory_bytes(self) -> int | None:
        """Largest resident memory in bytes; None for no limit."""
        return parse_memory(self.memory) if self.memory else None

    @property
    def stage_bounds(self) -> tuple[int, ...]:
        """Numbers of the blocks at which stages begin, and of the block after the last; empty for one stage."""
        return parse_stages(self.stages) or ()


@dataclass(frozen=True)
class WireSettings:
    """Encoding of tensors between client and trunk."""

    codec: str = setting(
        "raw",
        CODEC,
        "encoding of hidden states and gradients, or a chain of encodings; raw is exact; bf16 halves the bytes",
    )
    activation_up: str = setting("", ROLE_CODEC, "… of hidden states from clients to the trunk (default: wire.codec)")
    activation_down: str = setting("", ROLE_CODEC, "… of hidden states from the trunk to clients (default: wire.codec)")
    gradient_up: str = setting("", ROLE_CODEC, "… of gradients from clients to the trunk (default: wire.codec)")
    gradient_down: str = setting("", ROLE_CODEC, "… of gradients from the trunk to clients (default: wire.codec)")
    cache: str = setting(
        "256MB",
        CACHE,
        "memory for the codec delta on each side and for each client; rows that were used least recently leave first",
    )
    tls: str = setting(
        "",
        FOLDER,
        "folder with ca.pem, cert.pem and key.pem on every node of a cluster: packets between nodes are encrypted "
        "(default: they are not)",
    )

    @property
    def codecs(self) -> dict[tuple[str, str], str]:
        """Codec by kind and direction of a tensor."""
        return {
            ("activation", "up"): self.activation_up or self.codec,
            ("activation", "down"): self.activation_down or self.codec,
            ("gradient", "up"): self.gradient_up or self.codec,
            ("gradient", "down"): self.gradient_down or self.codec,
        }

    @property
    def cache_bytes(self) -> int:
        """Most bytes of the rows that the codec delta keeps for a client on each side."""
        return parse_memory(self.cache) or 0


@dataclass(frozen=True)
class NetworkSettings:
    """A network in the field, on which a virtual clock says what the run would have taken."""

    profile: str = setting(
        "",
        NETWORK,
        "links and devices of the clients: a named network, or a TOML file with a profile for each client; see "
        "docs/network.md (default: none)",
        "--network",
    )
    client_tflops: float = setting(
        1.0,
        at_least(1e-6, MOST_TFLOPS),
        "operations that a client with the compute factor 1 makes in a second, in units of 10^12",
    )
    trunk_tflops: float = setting(
        20.0, at_least(1e-6, MOST_TFLOPS), "operations that the trunk makes in a second, in units of 10^12"
    )
    compute: str = setting(
        "", TABLES, "TOML file of measured compute times, from fedsplit network measure, in place of stated speeds"
    )
    over_select: float = setting(
        1.0,
        at_least(1, 100),
        "multiple of the sampled clients that are asked in a round; the first to arrive in virtual time count",
    )


@dataclass(frozen=True)
class AdapterSettings:
    """Encoding of adapters between server and clients."""

    codec: str = setting(
        "raw",
        ADAPTER_CODEC,
        "encoding of what a client's adapters have changed by, on the way up; on the way down, the same chain without "
        "topk and lowrank encodes their values",
    )


@dataclass(frozen=True)
class RaySettings:
    """The Ray cluster of the engine ray."""

    address: str = setting(
        "local",
        RAY_ADDRESS,
        "local: a cluster of this machine alone, for this run; auto: the cluster that runs here or that RAY_ADDRESS "
        "names; HOST:PORT: the cluster of that address",
    )
    wait: float = setting(
        60.0, at_least(1, MOST), "seconds in which a cluster must have room for the trunk and for a client process"
    )
    ship: bool = setting(
        False, YES_OR_NO, "bring the code of fedsplit to the nodes, which then need only its libraries"
    )


@dataclass(frozen=True)
class ClientSettings:
    """The processes that play clients, of the engine ray."""

    resources: str = setting(
        "CPU=1", RESOURCES, "resources of a node that Ray keeps for each client process, such as CPU=1,GPU=0.25"
    )
    label: str = setting("", LABELS, "labels of the nodes on which clients run, such as site=north")


Section = (
    AdapterSettings
    | ClientSettings
    | LoraSettings
    | PromptSettings
    | RaySettings
    | TrainSettings
    | CheckpointSettings
    | DataSettings
    | EvalSettings
    | NetworkSettings
    | TrunkSettings
    | WireSettings
)
