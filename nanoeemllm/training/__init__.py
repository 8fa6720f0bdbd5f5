"""The stages' settings, several processes as one, run folders and forecasts. The loop is in train.py."""
