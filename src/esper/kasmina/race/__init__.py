"""The incubating path: survey, race, gate, and one decision after another."""
