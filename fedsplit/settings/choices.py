"""Names that settings choose among."""

ENGINES = ("ray", "local")

SCHEDULES = ("shared", "batched", "accumulate", "copies", "frozen", "forward-only")
ORDERS = ("random", "cyclic")
CODECS = {"raw": "fedsplit.wire.casting:Raw", "bf16": "fedsplit.wire.casting:BFloat16"}
"""Codecs by name: module and class, which `fedsplit.wire.codecs.make_codec` imports."""
KERNELS = ("fused", "library")
DTYPES = ("fp32", "bf16", "fp16")
OPTIMIZERS = ("adamw", "sgd", "adamw8bit")
RATES = ("constant", "linear", "cosine")
OPTIMIZER_STATES = ("reset", "keep")
WEIGHTS = ("examples", "tokens", "equal")
PARTS = ("bottom", "trunk", "top")
FORMATS = ("auto", "text", "completion", "chat", "classification")
PACKING = ("auto", "true", "false")
PROMPTED = ("prompt", "ptuning", "prefix")
PROMPTS = ("off", *PROMPTED)
STARTS = ("random", "vocab", "text", "zero")
ENCODERS = ("mlp", "lstm")
HEADS = ("frozen", "lora", "full")
