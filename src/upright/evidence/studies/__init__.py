"""One textbook claim per file, each with ``run(folder, seeds)``: train, write a table, say what came of it."""
