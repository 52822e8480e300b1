"""Scores and figures."""
