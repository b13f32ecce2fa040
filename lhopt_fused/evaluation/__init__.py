"""Evaluation: real tasks at real sizes, baselines, and what of the difference is not chance."""
