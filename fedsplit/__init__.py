"""fedsplit: federated split learning of causal language models, simulated faithfully.

The package imports nothing by itself, so that `python -m fedsplit.simulate --help`
answers without loading torch.
"""
