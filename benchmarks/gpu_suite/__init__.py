"""All that needs a GPU, in one go and within a given time: `python -m benchmarks.gpu_suite --out DIR [--minutes 8]`."""
