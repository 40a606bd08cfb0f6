"""`python -m fedsplit.simulate`: a run of a federation; `fedsplit.commands.simulate` has the code."""

from fedsplit.shutdown import leave, listen

if __name__ == "__main__":
    listen()  # before the imports, in which a signal would show a traceback

from fedsplit.commands.simulate import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    leave(main())
