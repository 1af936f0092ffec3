"""Full training, resume and inference scenarios on top of ``primitives``."""
