"""Scripts that measure the figures in README and docs. Each has ``--quick``, which shows that it runs."""
