"""ImageClassifier around any network, its checkpoints, and the verbs that are Lightning's."""
