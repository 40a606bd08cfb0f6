"""`python -m fedsplit.generate`: text from a finished run's model; `fedsplit.commands.generate` has the code."""

import sys

from fedsplit.shutdown import listen

if __name__ == "__main__":
    listen()

from fedsplit.commands.generate import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
