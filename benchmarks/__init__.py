"""Measurements that figures in README and docs come from: each is a script."""
