"""`python -m fedsplit.estimate`: what a run would cost; `fedsplit.commands.estimate` has the code."""

import sys

from fedsplit.shutdown import listen

if __name__ == "__main__":
    listen()  # before the imports, in which a signal would show a traceback

from fedsplit.commands.estimate import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
