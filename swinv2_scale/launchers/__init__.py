"""Who starts the processes of a job."""
