"""Looking into a model: what it attends to, what it learnt about positions, and how to draw it."""
