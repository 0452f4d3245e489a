"""What a network is worth: its speed, memory and size, and the report that compares it."""
