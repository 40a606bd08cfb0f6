"""`python -m fedsplit.reference`: pages made from settings and events; `fedsplit.commands.reference` has the code."""

from fedsplit.shutdown import leave, listen

if __name__ == "__main__":
    listen()  # before the imports, in which a signal would show a traceback

from fedsplit.commands.reference import main

__all__ = ["main"]

if __name__ == "__main__":
    leave(main())
