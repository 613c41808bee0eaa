"""Answering many images: what counts as one, where they lie, and how answers are written down."""
