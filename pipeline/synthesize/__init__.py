"""`tamis synthesize`: data to train a generator of problems, and a new source from such a one."""
