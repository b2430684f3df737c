"""An adapter apart from any model and file: its config, its pairs and its names."""
