"""Exhaustive search of the right-to-run protocol: the shims' own `handle`, not a model beside it.

    python -m tests.explore [--all] [--json] [--guards-only] [--stories] [--walks SECONDS] [--seed N]

side.py    one shim as the search sees it: its party, its disk, its VM; all that one event can lead to
facts.py   a state, packed into one integer
world.py   both shims, the channel and the faults: everything that can happen next, and what must never
search.py  breadth-first search
rescue.py  the documented recovery, run from every state
guards.py  the protocol's guards, each of which can be dropped
story.py   a counterexample as a story
walk.py    long random walks with no bound on faults
"""
