"""The public name of `dgunet.introspect`."""

from dgunet.introspect import *  # noqa: F403
