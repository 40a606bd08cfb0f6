"""Commands, a module each."""

COMMANDS = {
    "simulate": "run a federation on this machine",
    "sweep": "run a grid of settings and seeds, and compare the runs",
    "evaluate": "measure the model of a finished run",
    "generate": "write text with the model of a finished run",
    "adapters": "merge, combine, compare and export adapters of finished runs",
    "report": "write a run, or a comparison of several, as an HTML page",
    "clean": "remove what killed runs left in their folders, clients' text first of all",
    "data": "show who would hold which data",
    "network": "show networks, make them from device traces, and record compute times",
    "estimate": "estimate bytes, memory and seconds of a run from a config.json, without weights",
    "check": "put a strategy, an objective or a metric of your own to its contract",
    "new": "make a project with a strategy, an objective and data of your own",
    "client": "play one client of a federation at a site of its own",
    "prove": "compare a small copy of a model, cut at every place, with the same copy uncut",
    "serve": "offer a trunk to a federation of other processes and machines, over gRPC",
    "certificates": "make certificates for tests of a trunk over gRPC",
    "completion": "print a script that completes flags in bash or zsh",
}
"""What each command does."""


def module_of(command: str) -> str:
    """Returns the module with the `main` and the `make_parser` of a command.

    Example:
        >>> module_of("simulate"), module_of("client")
        ('fedsplit.commands.simulate', 'fedsplit.commands.site_client')
    """
    # `fedsplit.client` is the client of a run, wherever the client is played.
    return "fedsplit.commands." + ("site_client" if command == "client" else command)
