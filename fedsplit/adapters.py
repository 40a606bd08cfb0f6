"""`python -m fedsplit.adapters`: adapters of finished runs; `fedsplit.commands.adapters` has the code."""

import sys

from fedsplit.shutdown import listen

if __name__ == "__main__":
    listen()

from fedsplit.commands.adapters import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
