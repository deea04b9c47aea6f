"""Real images with words that other people gave them, and the recall table of trained indexes."""
