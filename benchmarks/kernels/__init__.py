"""Kernel benchmarks: what is measured (`ops`), by whom (`providers`), and how (`measure`)."""
