"""Image and video files to pixels, and what is done to pixels on the way to a batch."""
