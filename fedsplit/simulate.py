"""`python -m fedsplit.simulate`: a run of a federation; `fedsplit.commands.simulate` has the code."""

import sys

from fedsplit.shutdown import listen

if __name__ == "__main__":
    listen()

from fedsplit.commands.simulate import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    sys.exit(main())
