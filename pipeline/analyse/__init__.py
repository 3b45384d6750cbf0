"""`tamis analyse`: tables about finished runs. They decide nothing and change no run."""
