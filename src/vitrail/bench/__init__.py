"""How fast a model is, how much memory it takes, and how both grow; beside others, and beside the machine."""
