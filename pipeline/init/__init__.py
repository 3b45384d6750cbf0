"""`tamis init`: a commented recipe from a user's files and machine."""
