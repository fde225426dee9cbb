"""What a job says while it runs."""
