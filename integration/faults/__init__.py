"""Tests of files when a process is killed, the disk is full or the power fails, at every possible point."""
