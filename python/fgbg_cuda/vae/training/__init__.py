"""Lightning modules, and what goes along with a training."""
