"""What is asked: recipes, their YAML and their dialect."""
