"""Distillation of a teacher into many students at once: plan, driver, live table, results."""
