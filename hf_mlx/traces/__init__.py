"""Traces of runs: one JSON line a step, and where two of them part."""
