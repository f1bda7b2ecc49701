"""Seeing what the weight gradient does: metrics, shadow layers, health checks, times and memory."""

from molegrad.monitor.health import (
    Finding,
    Health,
    HealthError,
    HealthThresholds,
    parse_actions,
    reset_layer,
)
from molegrad.monitor.instruments import Instruments
from molegrad.monitor.memory import memory_bytes, saved_bytes
from molegrad.monitor.metrics import LayerMetrics, aggregate, device_checks, layer_metrics
from molegrad.monitor.phases import PhaseTimer
from molegrad.monitor.shadow import Shadow

__all__ = [
    "Finding",
    "Health",
    "HealthError",
    "HealthThresholds",
    "Instruments",
    "LayerMetrics",
    "PhaseTimer",
    "Shadow",
    "aggregate",
    "device_checks",
    "layer_metrics",
    "memory_bytes",
    "parse_actions",
    "reset_layer",
    "saved_bytes",
]
