"""Sweeps over settings, their tables, plots and PIMR."""
