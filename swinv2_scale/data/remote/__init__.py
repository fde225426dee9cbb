"""Files that lie in stores, through a cache of the node."""
