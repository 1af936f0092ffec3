"""Engines: what plays a scenario on one rank."""
