"""For all tests: how hypothesis runs here."""

from hypothesis import settings

# How long one example takes says something about the machine and its other guests, not about the code: pytest's own
# timeout bounds a test, benchmarks measure.
settings.register_profile("sandshift", deadline=None)
settings.load_profile("sandshift")
