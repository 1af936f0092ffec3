"""Models built from ``scenarios.parallel`` layers."""
