"""Measurements and figures for people."""
