"""Files behind URLs, and the local folder that keeps them."""
