"""`python -m fedsplit.report`: a page about finished runs; `fedsplit.commands.report` has the code."""

from fedsplit.shutdown import leave, listen

if __name__ == "__main__":
    listen()  # before the imports, in which a signal would show a traceback

from fedsplit.commands.report import main

__all__ = ["main"]

if __name__ == "__main__":
    leave(main())
