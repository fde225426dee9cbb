"""One module for each training task."""
