"""Settings of all unit tests."""

from hypothesis import settings

# How long one example takes says more about what else runs on the machine than about the code.
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")
