"""Parallel training in canonical arithmetic: layers, gradient buckets, ZeRO-1, scaler, schedule."""
