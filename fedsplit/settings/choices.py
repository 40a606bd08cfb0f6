"""Names among which a setting chooses."""

from dataclasses import dataclass

ENGINES = ("ray", "local", "flower")

# The model and its parts.
PARTS = ("bottom", "trunk", "top")
KERNELS = ("fused", "library")
DTYPES = ("fp32", "bf16", "fp16")
HEADS = ("frozen", "lora", "full")

# The trunk and the wire.
SCHEDULES = ("shared", "batched", "accumulate", "copies", "frozen", "forward-only")
ORDERS = ("random", "cyclic")


@dataclass(frozen=True)
class CodecEntry:
    """A codec in the table of codecs.

    Attributes:
        path: Module and class, which `fedsplit.wire.codecs.make_codec` imports.
        place: Place in a chain. "last" encodes values, and only a codec of bytes may follow. "before" leaves values to
            the next codec. "bytes" compresses the arrays of all others, at the end.
        remembers: True if the codec keeps state from step to step. In a chain, the first such codec alone does.
        word: Name of the parameter behind a colon, such as "RANK"; empty for a codec without a parameter.
        parameter: Least and largest value of the parameter; None for a codec without a parameter.
        default: Parameter of a codec without a colon; None if the colon must be there.
        is_whole: True if the parameter is a whole number.
    """

    path: str
    place: str = "last"
    remembers: bool = False
    word: str = ""
    parameter: tuple[float, float] | None = None
    default: float | None = None
    is_whole: bool = False


CODECS = {
    "delta": CodecEntry("fedsplit.wire.delta:Delta", "before", True, "THRESHOLD", (0, 1), default=0.0),
    "topk": CodecEntry("fedsplit.wire.top_k:TopK", "before", True, "SHARE", (1e-4, 1)),
    "lowrank": CodecEntry("fedsplit.wire.low_rank:LowRank", "before", True, "RANK", (1, 1024), is_whole=True),
    "raw": CodecEntry("fedsplit.wire.casting:Raw"),
    "bf16": CodecEntry("fedsplit.wire.casting:BFloat16"),
    "fp16": CodecEntry("fedsplit.wire.casting:Float16"),
    "fp8_e4m3": CodecEntry("fedsplit.wire.grouped:Float8E4M3"),
    "fp8_e5m2": CodecEntry("fedsplit.wire.grouped:Float8E5M2"),
    "int8": CodecEntry("fedsplit.wire.grouped:Int8"),
    "int8s": CodecEntry("fedsplit.wire.grouped:StochasticInt8"),
    "int4": CodecEntry("fedsplit.wire.grouped:Int4"),
    "int4s": CodecEntry("fedsplit.wire.grouped:StochasticInt4"),
    "integers": CodecEntry("fedsplit.wire.grouped:FewIntegers", word="LARGEST", parameter=(1, 7), is_whole=True),
    "nf4": CodecEntry("fedsplit.wire.value_tables:NormalFloat4"),
    "mxfp8": CodecEntry("fedsplit.wire.value_tables:MxFloat8"),
    "mxfp4": CodecEntry("fedsplit.wire.value_tables:MxFloat4"),
    "zstd": CodecEntry("fedsplit.wire.zstd:Zstd", "bytes", False, "LEVEL", (1, 19), default=3.0, is_whole=True),
}
"""Codecs by name."""

EXACT_IN_EVALUATION = ("delta", "raw", "zstd")
"""Codecs through which held-out text crosses without any loss. In an evaluation, `delta` has no earlier rows."""

NETWORKS = ("lan", "wifi", "4g", "home", "wan")
"""Named networks; `fedsplit.network.profiles` has them."""

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
"""Trackers of experiments. Each is an extra of the package, too."""

# Training and aggregation.
OPTIMIZERS = ("adamw", "sgd", "adamw8bit")
RATES = ("constant", "linear", "cosine")
OPTIMIZER_STATES = ("reset", "keep")
WEIGHTS = ("examples", "tokens", "equal")

# Data.
FORMATS = ("auto", "text", "completion", "chat", "instruction", "classification", "preference")
PAIRS = "preference"
"""Format of pairs of texts, of which one is preferred."""
PACKING = ("auto", "true", "false")
SYNCS = ("round", "step")
PLACES = ("driver", "shared", "label", "site")

# Virtual tokens and prefixes.
PROMPTED = ("prompt", "ptuning", "prefix")
"""Kinds of virtual tokens and prefixes, by PEFT's names for them."""
PROMPTS = ("off", *PROMPTED)
STARTS = ("random", "vocab", "text", "zero")
ENCODERS = ("mlp", "lstm")
