"""What decides a stage's result: its content key, how keys differ, and the code behind it."""
