"""Seeing what the low-rank gradient does: metrics per layer, aggregated, and memory measured."""

from molegrad.monitor.memory import memory_bytes, saved_bytes
from molegrad.monitor.metrics import aggregate, layer_metrics

__all__ = ["aggregate", "layer_metrics", "memory_bytes", "saved_bytes"]
