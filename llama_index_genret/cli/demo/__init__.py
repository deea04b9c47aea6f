"""`genret demo`: images in the package, indexed, trained and asked."""
