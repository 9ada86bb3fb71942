"""Training runs: folder, callbacks, resuming, and the commands of Lightning's command line."""
