"""Private names of other libraries, one module per library. Each has its reason, and a test that fails if it moves."""
