"""Exhaustive search of the right-to-run protocol: the shims' own `handle`, not a model beside it.

    python -m tests.explore [--all] [--json] [--set NAME] [--guards-only] [--walks SECONDS] [--seed N]

side.py    one shim as the search sees it: its party, its disk, its VM; all that one event can lead to
world.py   both shims, the channel and the faults, packed into one integer; breadth-first search and its checks
rescue.py  the documented recovery, run from every state
guards.py  the protocol's guards, each of which can be dropped
story.py   a counterexample as a story
walk.py    long random walks with no bound on faults
"""
