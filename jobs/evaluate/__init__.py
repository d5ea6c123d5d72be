"""Evaluation of encoders on held-out clips, beside baselines of the same rate."""
