"""Runs on a SLURM cluster: chained jobs, the state of a sweep's points, and their logs."""
