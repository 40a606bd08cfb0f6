"""`python -m fedsplit.data`: who would hold which data; `fedsplit.commands.data` has the code."""

import sys

from fedsplit.commands.data import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
