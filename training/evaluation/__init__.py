"""What `python -m training evaluate` and `latency` measure, one file for each kind of measurement."""
