"""Window attention behind one contract (attend.py)."""
