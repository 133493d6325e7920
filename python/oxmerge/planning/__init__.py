"""From what is asked and what is there to a plan."""
