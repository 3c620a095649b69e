"""Is this machine, or are these ranks, fit for training? What `launch/doctor.py` looks at, and what it makes of it."""
