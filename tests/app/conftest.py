"""Hypothesis: what an example takes is the machine's matter, and fails no test."""

from hypothesis import HealthCheck, settings

settings.register_profile("gate", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("gate")
