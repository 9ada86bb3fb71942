"""One textbook claim per file: its docstring is the claim, then the protocol; ``run(bench)`` returns a `Finding`."""
