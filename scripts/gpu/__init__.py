"""What `scripts/gpu_check.sh` runs: gathering what is carried, the tests, and the timings."""
