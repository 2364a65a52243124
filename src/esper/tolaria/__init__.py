"""Tolaria trains: growing runs, the surgery they need, saved models, and a plain trainer."""
