"""Our numbers against other people's code and against the definition."""
