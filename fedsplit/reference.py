"""`python -m fedsplit.reference`: pages made from settings and events; `fedsplit.commands.reference` has the code."""

import sys

from fedsplit.shutdown import listen

if __name__ == "__main__":
    listen()

from fedsplit.commands.reference import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
