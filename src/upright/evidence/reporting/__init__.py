"""``upright report``: one page of evidence about models."""
