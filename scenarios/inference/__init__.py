"""Dynamic inference: an engine with the bits of the training forward, and a service over ZMQ."""
