"""Stages, several processes as one, run folders, forecasts. The loop is in train.py."""
