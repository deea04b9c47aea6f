"""Measure recall, tune scoring, compare with baselines, and write the report."""
