"""Enqueues polls: python give.py MODULE COUNT. Not the module itself, whose tasks would be named after `__main__`."""

import sys
from importlib import import_module

import_module(sys.argv[1]).main(int(sys.argv[2]))
