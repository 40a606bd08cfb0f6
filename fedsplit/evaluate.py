"""`python -m fedsplit.evaluate`: losses of a finished run's model; `fedsplit.commands.evaluate` has the code."""

import sys

from fedsplit.shutdown import listen

if __name__ == "__main__":
    listen()

from fedsplit.commands.evaluate import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
