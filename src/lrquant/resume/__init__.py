"""The state of unfinished runs, from which the same command resumes."""
