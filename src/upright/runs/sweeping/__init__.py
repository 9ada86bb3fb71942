"""``upright sweep``: a search over the options of ``fit``."""
