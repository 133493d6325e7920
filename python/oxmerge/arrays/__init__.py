"""The engine on arrays in memory, and what scripts read and write."""
