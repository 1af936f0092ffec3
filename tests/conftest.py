"""Settings of all unit tests."""

import signal

from hypothesis import settings

# How long one example takes says more about what else runs on the machine than about the code.
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")

# A shell starts background jobs with Ctrl-C ignored, and children inherit that: tests send it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
