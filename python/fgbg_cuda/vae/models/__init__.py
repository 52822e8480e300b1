"""The models and their networks."""
