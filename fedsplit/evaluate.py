"""`python -m fedsplit.evaluate`: losses of a finished run's model; `fedsplit.commands.evaluate` has the code."""

from fedsplit.shutdown import leave, listen

if __name__ == "__main__":
    listen()  # before the imports, in which a signal would show a traceback

from fedsplit.commands.evaluate import main
from fedsplit.results.measuring import held_out_loss

__all__ = ["held_out_loss", "main"]

if __name__ == "__main__":
    leave(main())
