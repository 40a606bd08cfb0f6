"""`python -m fedsplit.evaluate`: losses of a finished run's model; `fedsplit.commands.evaluate` has the code."""

import sys

from fedsplit.shutdown import listen

if __name__ == "__main__":
    listen()

from fedsplit.commands.evaluate import held_out_loss, main

__all__ = ["held_out_loss", "main"]

if __name__ == "__main__":
    sys.exit(main())
