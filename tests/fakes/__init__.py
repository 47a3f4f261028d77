"""Stand-ins for what the tests' machine lacks: the `tensorrt` module and a CUDA GPU. Never shipped."""
