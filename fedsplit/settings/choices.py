"""Names among which a setting chooses."""

ENGINES = ("ray", "local", "flower")

# The model and its parts.
PARTS = ("bottom", "trunk", "top")
KERNELS = ("fused", "library")
DTYPES = ("fp32", "bf16", "fp16")
HEADS = ("frozen", "lora", "full")

# The trunk and the wire.
SCHEDULES = ("shared", "batched", "accumulate", "copies", "frozen", "forward-only")
ORDERS = ("random", "cyclic")
CODECS = {"raw": "fedsplit.wire.casting:Raw", "bf16": "fedsplit.wire.casting:BFloat16"}
"""Codecs by name: module and class, which `fedsplit.wire.codecs.make_codec` imports."""

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
PLACES = ("driver", "shared", "label")

# Virtual tokens and prefixes.
PROMPTED = ("prompt", "ptuning", "prefix")
"""Kinds of virtual tokens and prefixes, by PEFT's names for them."""
PROMPTS = ("off", *PROMPTED)
STARTS = ("random", "vocab", "text", "zero")
ENCODERS = ("mlp", "lstm")
