"""What is found out about models without merging: how two differ, whether one is sound."""
