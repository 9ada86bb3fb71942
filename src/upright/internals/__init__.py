"""Private names of libraries, one module per library, each with its reason. Tests fail when a name moves."""
