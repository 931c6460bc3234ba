"""Measures predictions against truth at original image size; knows neither models nor data readers."""
