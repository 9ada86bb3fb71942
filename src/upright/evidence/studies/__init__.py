"""One textbook claim per file: its docstring says the claim and then the protocol, ``run(bench)`` gives the finding."""
