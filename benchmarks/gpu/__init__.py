"""One command that measures the project on a GPU: `python -m benchmarks.gpu --seconds 560`."""
