"""Bottlenecks: records (config), the interface, and one module per family."""
