"""Tests of torch's suite that cannot pass on any backend but torch's own, and why."""

KNOWN_FAILURES = {
    "test_ddp_logging_data_cpu": "expects the backend's name in DDP's logging data, where torch "
    "writes 'custom' for every backend that is registered from outside torch",
}
