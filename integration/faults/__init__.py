"""What happens to files when a process is killed, the disk is full or the power goes, at every point where it can."""
