"""Evaluation of models: reports, selection among runs, and studies of textbook claims."""
