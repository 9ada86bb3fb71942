"""``fit validate test predict``: Lightning's command line, with Upright's run folder, restoring and errors."""
