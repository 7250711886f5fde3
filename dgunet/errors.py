"""Mistakes a user can mend, told in one line."""

import sys


class UserError(ValueError):
    """A mistake of the user's: its message is one line saying what is wrong and what to do."""


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
