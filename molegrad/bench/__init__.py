"""Benchmarks as a library; the commands are in scripts/."""
