"""``upright report``: one page that compares models."""
