"""`genret demo`: index, train and query the images in the package."""
