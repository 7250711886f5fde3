"""Mistakes a user can mend, told in one line."""

import sys


class UserError(ValueError):
    """A mistake of the user's: its message is one line saying what is wrong and what to do."""

    def __init__(self, message: str):
        # A loading process hands its error on with the whole traceback as the message.
        if "\nOriginal Traceback" in message:
            message = message.strip().splitlines()[-1].split(f"{__name__}.UserError: ")[-1]
        # Names from files may hold anything; a line that can be printed everywhere does not.
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


def shorten(names: list[str], most: int = 6) -> str:
    """The first names of a list, for a message, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"{name:.100}" for name in names[:most]) + more


def run_cli(main):
    """Run ``main()`` as a command: a ``UserError`` becomes one line on stderr and exit status 2."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
