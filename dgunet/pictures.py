"""The former name of `dgunet.photos`, for one release."""

import warnings

from dgunet.photos import Photo as Picture  # noqa: F401
from dgunet.photos import read_photo as read_picture  # noqa: F401
from dgunet.photos import write_photo as write_picture  # noqa: F401

warnings.warn("dgunet.pictures is now dgunet.photos", DeprecationWarning, stacklevel=2)
