"""`python -m fedsplit.clean`: what killed runs have left; `fedsplit.commands.clean` has the code."""

import sys

from fedsplit.shutdown import listen

if __name__ == "__main__":
    listen()

from fedsplit.commands.clean import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
