"""What is there: references to models, their checkpoints, configs, layers and vocabularies."""
