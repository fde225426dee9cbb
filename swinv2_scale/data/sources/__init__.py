"""Data sets as their owners publish them, on their way into shards."""
