"""`python -m fedsplit.generate`: text from a finished run's model; `fedsplit.commands.generate` has the code."""

from fedsplit.shutdown import leave, listen

if __name__ == "__main__":
    listen()  # before the imports, in which a signal would show a traceback

from fedsplit.commands.generate import main

__all__ = ["main"]

if __name__ == "__main__":
    leave(main())
