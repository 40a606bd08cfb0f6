"""Commands, a module each."""

COMMANDS = {
    "simulate": "run a federation on this machine",
    "evaluate": "measure the model of a finished run",
    "generate": "write text with the model of a finished run",
    "adapters": "merge, combine, compare and export adapters of finished runs",
    "clean": "remove what killed runs left in their folders, clients' text first of all",
    "data": "show who would hold which data",
    "completion": "print a script that completes flags in bash or zsh",
}
"""What each command does. The module `fedsplit.commands.NAME` has its `main`."""
