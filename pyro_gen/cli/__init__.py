"""The command line: fit a family to a file of numbers, sample the result, state its evidence.

One command, one folder. ``pyro-gen fit FAMILY`` writes a *run*: what was asked (``config.json``), a checkpoint from
which it goes on after an interrupt, the fitted program as ``pg.load`` reads it, its history, its evidence, its
posterior for ArviZ, its figures. ``pyro-gen sample`` and ``pyro-gen evaluate`` take such a folder.

A family is a file in `pyro_gen.cli.families`: its options, what they build, how its evidence is had. What else there
is, all families share.

What ends a command is its exit status: 0 done; 2 bad input, one line that names the argument and the fix; 3 a
divergence, which names step, parameter and rows; 130 an interrupt, which says how to go on. A traceback is a bug.
"""

from pyro_gen.cli.application import app, main

__all__ = ["app", "main"]
