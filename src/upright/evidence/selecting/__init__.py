"""``upright select``: the expected test accuracy of the best of many candidates."""
