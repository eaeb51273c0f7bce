"""Benchmarks: ratios of two ways to do the same work, measured alternately in one run. No absolute claims."""
