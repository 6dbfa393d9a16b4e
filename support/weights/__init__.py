"""Weights as others publish them: `load` reads a model, `save` writes one."""

from support.weights.formats import *
