"""Whether a job can run where it is to run: what ``swinv2-scale doctor`` looks at, and the quick checks of a start."""
