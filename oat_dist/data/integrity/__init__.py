"""Whether a set is what it says, and what it holds."""
