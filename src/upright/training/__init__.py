"""Training of any network: `ImageClassifier`, losses, schedules, metrics, restoring and fine-tuning."""
