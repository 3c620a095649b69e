"""The checks of `launch/doctor.py`: they tell whether this machine, or these ranks, are fit for training."""
