"""Data sets on disk: `read` returns the splits of a run."""

from support.layouts.registry import *
