"""One command for a GPU, ``python -m benchmarks gpu``: checks and measures everything that needs one.

command.py runs a plan of measurements within a budget of minutes and goes on where it stopped; log.py has the file that
they are appended to; the other modules plan them: suite.py (tests), kernels.py, whole.py (steps and trainings) and
profiling.py (Nsight Compute). Without a GPU all of it runs at toy sizes under Triton's interpreter: a rehearsal.
"""
