"""`python -m fedsplit.data`: the clients' data before a run; `fedsplit.commands.data` has the code."""

from fedsplit.shutdown import leave, listen

if __name__ == "__main__":
    listen()  # before the imports, in which a signal would show a traceback

from fedsplit.commands.data import main

__all__ = ["main"]

if __name__ == "__main__":
    leave(main())
