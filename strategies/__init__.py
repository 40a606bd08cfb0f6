"""Aggregation strategies: how the clients' adapters become one set again.

One file a strategy. Each needs torch and `fedsplit.updates` only.
"""

STRATEGIES = {
    "fedavg": "strategies.fedavg:FedAvg",
    "ffa": "strategies.ffa_lora:FFALoRA",
    "rolora": "strategies.rolora:RoLoRA",
    "fedsa": "strategies.fedsa_lora:FedSALoRA",
    "flora": "strategies.flora:FLoRA",
    "fedex": "strategies.fedex_lora:FedExLoRA",
    "hetlora": "strategies.hetlora:HetLoRA",
    "flexlora": "strategies.flexlora:FlexLoRA",
    "lora_fair": "strategies.lora_fair:LoRAFAIR",
    "fedsvd": "strategies.fedsvd:FedSVD",
    "fedrot": "strategies.fedrot_lora:FedRotLoRA",
}
"""The names that `--strategy` takes, and where the classes are."""
