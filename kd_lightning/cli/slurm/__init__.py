"""Runs on a SLURM cluster: chained jobs, what became of a sweep's points, and where their logs are."""
