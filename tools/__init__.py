"""What the makers of this project use and a run does not: made-up traces, and a spot market on one machine."""
