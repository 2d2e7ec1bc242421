"""Build, train, measure and look inside Vision Transformers."""
