"""Other inference engines on the same workload; these modules run in the peers' own environment."""
