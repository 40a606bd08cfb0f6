"""`python -m fedsplit.data`: the clients' data before a run; `fedsplit.commands.data` has the code."""

import sys

from fedsplit.shutdown import listen

if __name__ == "__main__":
    listen()

from fedsplit.commands.data import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
