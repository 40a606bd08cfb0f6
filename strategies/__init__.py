"""Aggregation strategies: how the clients' adapters become one set again.

One file a strategy. Each needs torch and `fedsplit.updates` only.
"""

STRATEGIES = {
    "fedavg": "strategies.fedavg:FedAvg",
}
"""The names that `--strategy` takes, and where the classes are."""
