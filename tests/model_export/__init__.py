"""The exporter's tests."""
