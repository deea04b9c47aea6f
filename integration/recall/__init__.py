"""Real pictures with words that other people gave them, and the table of how well trained indexes recall them."""
