"""Reading a tar once, from start to end: its members, its samples, and what their images are."""
