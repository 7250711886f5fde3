"""Progress bars on a terminal."""

import contextlib
import os
import sys


def progress_bar(*iterable, **options):
    """A progress bar of tqdm's, with its options, on stderr; without a terminal there is none.

    A terminal that does not know how large it is, as in ``script`` or ``docker exec -t``, counts as 80x24: on one of
    0 columns tqdm draws nothing.
    """
    with contextlib.suppress(OSError, ValueError):  # no terminal
        columns, rows = os.get_terminal_size(sys.stderr.fileno())
        if columns == 0 or rows == 0:
            options |= {"ncols": (columns or 80) - 1, "nrows": (rows or 24) - 1, "dynamic_ncols": False}
    from tqdm import tqdm

    return tqdm(*iterable, **{"disable": None} | options)
