"""Distillation of a teacher into many students at once: the distillation itself, its results, their report."""

STUDENTS = "resnet18,resnet34,resnet50,mobilenet_v1,mobilenet_v2,shufflenet_v2_x1_5"
"""The students of the paper's Table 4."""
BASELINE = "-baseline"
"""Ends the name of a run that trains a student without the teacher."""
