"""What a model is worth and what it costs: metrics, inference over a set, parameters and MACs."""
