"""The directory around the weights: who owns it, config, side files, card."""
