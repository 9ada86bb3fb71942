"""``upright select``: what the best of many candidates is worth."""
