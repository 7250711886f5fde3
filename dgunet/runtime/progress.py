"""Progress bars on a terminal."""

import contextlib
import os
import sys


def progress_bar(*iterable, **options):
    """tqdm's progress bar, with its options, on stderr; none without a terminal.

    A terminal of unknown size, as in ``script`` or ``docker exec -t``, counts as 80x24; tqdm would draw nothing.
    """
    with contextlib.suppress(OSError, ValueError):  # no terminal
        columns, rows = os.get_terminal_size(sys.stderr.fileno())
        if columns == 0 or rows == 0:
            options |= {"ncols": (columns or 80) - 1, "nrows": (rows or 24) - 1, "dynamic_ncols": False}
    from tqdm import tqdm

    return tqdm(*iterable, **{"disable": None} | options)
