"""Several budgets from one dense network: which are tried, each as a run of its own, compared."""
